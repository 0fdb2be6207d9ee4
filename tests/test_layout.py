"""How the tests are laid out: by the packages they test, and none of them leans on another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT, TESTS

# Directories that mirror no package: helpers, data, and tests of whole commands, of the docs and of the examples.
OWN = {"support", "data", "end_to_end", "docs", "examples"}


def python_files() -> list[Path]:
    return sorted(path for path in TESTS.rglob("*.py") if "__pycache__" not in path.parts)


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module, and every name from a module, that code imports at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def imported_tests(tree: ast.AST, modules: set[str]) -> list[str]:
    return [name for name in imported(tree) if modules & set(name.split("."))]


def test_no_test_imports_a_test() -> None:
    modules = {path.stem for path in python_files() if path.stem.startswith("test_")} | {"conftest"}
    assert len(modules) > 40
    found = {
        path.relative_to(TESTS).as_posix(): names
        for path in python_files()
        if (names := imported_tests(ast.parse(path.read_text(encoding="utf-8")), modules))
    }
    assert not found, "move what they share into tests/support"


@pytest.mark.parametrize(
    "code",
    [
        "import test_a",
        "from test_a import helper",
        "from end_to_end.test_a import helper",
        "from end_to_end import test_a as other",
        "from .test_a import helper",
        "def late():\n    from conftest import fixture",
    ],
)
def test_every_way_to_import_a_test_is_seen(code: str) -> None:
    assert imported_tests(ast.parse(code), {"test_a", "conftest"})


def test_directories_mirror_the_package() -> None:
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")} - {Path(".")}
    mirrored = {folder for folder in folders if folder.parts[0] not in OWN}
    assert len(mirrored) > 10
    missing = [str(folder) for folder in mirrored if not (ROOT / "loftq_cli" / folder / "__init__.py").is_file()]
    assert not missing, "tests/<package>/ stands for loftq_cli/<package>/"


def test_helpers_and_data_hold_no_tests() -> None:
    for folder in ("support", "data"):
        assert not list((TESTS / folder).rglob("test_*.py"))
