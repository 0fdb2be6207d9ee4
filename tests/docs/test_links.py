"""The README is short, and every link of README and docs leads to a file that exists."""

from __future__ import annotations

import re

import pytest
from support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
HOME = re.search(r"^repo_url: (\S+)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)[1]  # type: ignore[index]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_the_readme_is_short_and_names_the_two_commands() -> None:
    assert len(README.splitlines()) <= 150
    assert "bash scripts/demo.sh" in README and "bash scripts/test.sh" in README


def test_links_of_the_readme_survive_on_a_package_index() -> None:
    raw = HOME.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main/"
    links = _LINK.findall(README)
    assert len(links) > 20
    for link in links:
        assert link.startswith("https://"), f"{link} is relative"
        for start in (f"{HOME}/blob/main/", f"{HOME}/tree/main/", raw):
            if link.startswith(start):
                assert (ROOT / link.removeprefix(start).partition("#")[0]).exists(), link
                break
        else:
            assert not link.startswith(HOME), f"{link} is not a file of this repository"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_pages_link_to_exist(page) -> None:
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        target = link.partition("#")[0]
        if link.startswith("repo:"):
            assert (ROOT / target.removeprefix("repo:")).exists(), link
        elif target and not link.startswith("https://"):
            assert (page.parent / target).exists(), link


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r": ([\w/-]+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == [page.relative_to(ROOT / "docs").as_posix() for page in PAGES]


def test_the_picture_is_small() -> None:
    assert (ROOT / "docs" / "images" / "overview.png").stat().st_size < 300_000
