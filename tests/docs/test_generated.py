"""What the docs take from the code is complete and current."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
from support.paths import ROOT

import loftq_cli
from loftq_cli.cli import app
from loftq_cli.errors import ExitCode
from loftq_cli.formats import FORMATS
from loftq_cli.recipe.model import recipe_fields

PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.fixture(scope="module", autouse=True)
def scripts():
    sys.path.insert(0, str(ROOT / "scripts" / "docs"))
    yield
    sys.path.remove(str(ROOT / "scripts" / "docs"))


def generate(name: str) -> str:
    from generated import GENERATORS

    return GENERATORS[name]()


def test_pages_ask_for_text_that_is_generated_and_all_of_it_is_used() -> None:
    from generated import GENERATORS

    asked = {
        name for page in PAGES for name in re.findall(r"^<!-- generated: (\S+) -->$", page.read_text(), re.MULTILINE)
    }
    assert asked == set(GENERATORS)


def test_every_command_and_its_options_are_listed() -> None:
    text = generate("cli")
    names = [command.name for command in app.registered_commands]
    assert [line.removeprefix("## loftq ") for line in text.splitlines() if line.startswith("## ")] == names
    for flag in ("--bits", "--symmetric", "--asymmetric", "--output", "-o", "--dry-run", "--create-pr"):
        assert f"`{flag}`" in text, flag
    assert "[dim]" not in text and "default: " not in text


def test_every_recipe_field_is_listed() -> None:
    text = generate("recipe")
    rows = [row for row in text.splitlines() if row.startswith("| `")]
    named = [re.match(r"\| `(\w+)`", row)[1] for row in rows]  # type: ignore[index]
    assert set(recipe_fields()) <= set(named) and len(named) == len(set(named))
    (method,) = (row for row in rows if row.startswith("| `method`"))
    assert "`refined`" in method and "`loftq`" in method
    assert not [row for row in rows if row.count("|") - row.count("\\|") != text.splitlines()[0].count("|")]


def test_every_container_is_listed() -> None:
    assert re.findall(r"^\| `(\w[\w-]*)` \|", generate("formats"), re.MULTILINE) == list(FORMATS)


def test_every_public_name_is_documented() -> None:
    public = {name for name in loftq_cli.__all__ if not name.startswith("_")}
    assert set(re.findall(r"^::: loftq_cli\.(\w+)$", generate("python-api"), re.MULTILINE)) == public


def test_every_exit_code_is_listed() -> None:
    assert re.findall(r"^\| `(\d+)`", generate("exit-codes"), re.MULTILINE) == [str(int(code)) for code in ExitCode]


def test_the_tree_shows_every_package_with_its_purpose() -> None:
    text = generate("tree")
    package = ROOT / "loftq_cli"
    packages = [path.parent.relative_to(package).as_posix() for path in package.rglob("__init__.py")]
    for name in packages[1:]:
        assert re.search(rf"^\| `{name}/` \| \S", text, re.MULTILINE), f"{name} has no docstring"


def test_the_layers_are_all_of_the_package() -> None:
    text = generate("layers")
    for path in (ROOT / "loftq_cli").iterdir():
        if (path.suffix == ".py" and path.name != "__init__.py") or (path / "__init__.py").exists():
            assert re.search(rf"\b{path.stem}\b", text), path.stem


def test_every_topic_of_messages_is_known() -> None:
    from messages import OTHER, TOPICS, all_messages

    text = all_messages()
    assert f"### {OTHER}" not in text, "a package with errors has no topic"
    assert [line.removeprefix("### ") for line in text.splitlines() if line.startswith("### ")] == list(TOPICS)
    assert text.count("\n- ") > 200


def test_messages_are_found_in_every_file_that_raises_errors() -> None:
    from messages import messages_of

    raises = re.compile(r"raise (?:Usage|Loftq)Error\(\s*f?[\"']")
    for source in (ROOT / "loftq_cli").rglob("*.py"):
        text = source.read_text(encoding="utf-8")
        assert not raises.search(text) or messages_of(text), source


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ('raise UsageError(f"{a.path!r} is {len(b)} long: {c[0]}.")', ["<path> is <b> long: <c>."]),
        ('_TEXT = "one two {}"\nraise LoftqError(_TEXT.format(1))', ["one two {}"]),
        ('def why(x):\n    return f"no {x} here"\nraise LoftqError(why(1))', ["no <x> here"]),
        ('raise LoftqError("a b" if x else "c d")', ["a b", "c d"]),
        ('raise LoftqError("a b " + ("c" if x else "d") + ".")', ["a b c.", "a b d."]),
        ('hint = "see there"\nraise UsageError(f"bad: {hint}")', ["bad: <hint>"]),
        ('raise ValueError("not for users")', []),
        ("raise UsageError(str(error))", []),
    ],
)
def test_messages_of(code: str, expected: list[str]) -> None:
    from messages import messages_of

    assert messages_of(code) == expected


def test_the_hook_fills_pages_and_refuses_what_does_not_exist() -> None:
    exceptions = pytest.importorskip("mkdocs.exceptions", reason="mkdocs is not installed (extra 'docs')")
    import hooks

    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))

    def render(text: str) -> str:
        return hooks.on_page_markdown(text, page=page, config={"repo_url": "https://example.org/x/"}, files=None)

    assert render("<!-- generated: exit-codes -->") == generate("exit-codes")
    assert render("[a](repo:README.md#b) [c](repo:docs)") == (
        "[a](https://example.org/x/blob/main/README.md#b) [c](https://example.org/x/tree/main/docs)"
    )
    with pytest.raises(exceptions.PluginError, match=r"page\.md asks for 'nothing'"):
        render("<!-- generated: nothing -->")
    with pytest.raises(exceptions.PluginError, match=r"page\.md links to nowhere\.md"):
        render("[a](repo:nowhere.md)")
