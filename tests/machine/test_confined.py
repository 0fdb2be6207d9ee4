"""Nothing leaves a confined folder, by name or by link."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loftq_cli.errors import LoftqError
from loftq_cli.machine.confined import ConfinedFolder, check_name


@pytest.fixture
def folder(tmp_path: Path) -> ConfinedFolder:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "file").write_text("ours")
    return ConfinedFolder(tmp_path / "in")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "..", "../outside/secret", "a/../b", "a//b", "./a", "a/", "a\0b"])
def test_names_that_lead_out_are_refused(name: str, folder: ConfinedFolder) -> None:
    with pytest.raises(LoftqError, match="outside of its folder"):
        check_name(name, "loftq.json")
    for method in (folder.path, folder.open, folder.read, folder.write, folder.unlink, folder.exists):
        with pytest.raises(LoftqError, match="outside of its folder"):
            method(name)


def test_files_below_the_root_are_read_written_renamed_and_removed(folder: ConfinedFolder) -> None:
    with folder.read("sub/file") as handle:
        assert handle.read() == b"ours"
    with folder.write("new/deep/file") as handle:
        handle.write(b"more")
    folder.replace("new/deep/file", "other/file")
    assert folder.path("other/file").read_bytes() == b"more" and not folder.exists("new/deep/file")
    folder.unlink("other/file")
    folder.unlink("other/file")
    assert not folder.exists("other/file") and not folder.exists("no/such/folder")
    folder.remove_tree("new")
    assert not folder.exists("new")


def test_no_link_is_followed(folder: ConfinedFolder) -> None:
    outside = folder.root.parent / "outside"
    (folder.root / "folder").symlink_to(outside)
    (folder.root / "file").symlink_to(outside / "secret")
    for name in ("folder/secret", "file"):
        for method in (folder.path, folder.open, folder.read, folder.write):
            with pytest.raises(LoftqError, match="is a link"):
                method(name)
    with pytest.raises(LoftqError, match="is a link"):
        folder.unlink("folder/secret")
    with pytest.raises(LoftqError, match="is a link"):
        folder.replace("sub/file", "folder/stolen")
    with pytest.raises(LoftqError, match="is a link"):
        folder.remove_tree("folder")
    folder.unlink("file")
    assert not (folder.root / "file").is_symlink() and (outside / "secret").read_text() == "secret"
    assert sorted(path.name for path in outside.iterdir()) == ["secret"]


def test_a_fifo_is_refused_at_once(folder: ConfinedFolder) -> None:
    os.mkfifo(folder.root / "pipe")
    with pytest.raises(LoftqError, match="not a regular file"):
        folder.read("pipe")
