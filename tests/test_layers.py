"""The import graph: the contracts in pyproject.toml cover every package, hold, and break on a wrong import."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

grimp = pytest.importorskip("grimp", reason="import-linter, which draws the import graph, is missing (extra 'dev')")

ROOT_PACKAGE = "loftq_cli"
LAYERS, CYCLES = "layers", "acyclic_siblings"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package beside a copy of its contracts."""
    shutil.copytree(ROOT / ROOT_PACKAGE, tmp_path / ROOT_PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def contracts() -> list[dict]:
    from importlinter.api import read_configuration

    return read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]


def contract(kind: str) -> dict:
    (found,) = [options for options in contracts() if options["type"] == kind]
    return found


def lint(tree: Path) -> tuple[int, str]:
    """Exit code and output of `lint-imports` in a tree."""
    command = "import sys; from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"
    environment = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=tree, env=environment, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def broken(tree: Path) -> set[str]:
    """Types of the contracts that a tree breaks."""
    code, output = lint(tree)
    kinds = {options["type"] for options in contracts() if f"{options['name']} BROKEN" in output}
    assert (code != 0) == bool(kinds), output
    return kinds


def add(tree: Path, file: str, *lines: str) -> None:
    path = tree / ROOT_PACKAGE / file
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([before, *lines, ""]), encoding="utf-8")


def test_the_package_keeps_every_contract() -> None:
    code, output = lint(ROOT)
    assert code == 0 and "0 broken" in output, output


def test_an_upward_import_breaks_the_contracts(tree: Path) -> None:
    """The lowest layer imports the command line; every layer between closes the circle."""
    add(tree, "errors.py", "from loftq_cli import cli as _cli  # noqa: F401")
    assert broken(tree) == {LAYERS, CYCLES}


def test_an_upward_import_inside_a_function_breaks_them_too(tree: Path) -> None:
    add(tree, "errors.py", "def _late() -> None:", "    import loftq_cli.engine  # noqa: F401")
    assert broken(tree) == {LAYERS, CYCLES}


def test_a_cycle_within_a_package_breaks_the_contracts(tree: Path) -> None:
    add(tree, "numerics/chicken.py", "from loftq_cli.numerics import egg  # noqa: F401")
    add(tree, "numerics/egg.py", "from loftq_cli.numerics import chicken  # noqa: F401")
    assert broken(tree) == {CYCLES}


def test_a_package_that_no_layer_names_breaks_the_contracts(tree: Path) -> None:
    add(tree, "unplaced/__init__.py")
    code, output = lint(tree)
    assert code != 0 and "unplaced" in output, output


def test_the_layers_cover_every_package() -> None:
    layers = contract(LAYERS)
    assert layers["containers"] == [ROOT_PACKAGE] and layers["exhaustive"] in (True, "True", "true")
    assert not layers.get("exhaustive_ignores") and not layers.get("ignore_imports")
    named = {name.strip() for layer in layers["layers"] for name in layer.replace(":", "|").split("|")}
    children = grimp.build_graph(ROOT_PACKAGE, cache_dir=None).find_children(ROOT_PACKAGE)
    assert named == {child.removeprefix(f"{ROOT_PACKAGE}.") for child in children}
    cycles = contract(CYCLES)
    assert cycles["ancestors"] == [ROOT_PACKAGE] and not cycles.get("ignore_imports")


def test_only_the_command_line_imports_the_root_package() -> None:
    """`loftq_cli/__init__.py` is what users import: below the command line it would close a cycle."""
    graph = grimp.build_graph(ROOT_PACKAGE, exclude_type_checking_imports=True, cache_dir=None)
    importers = graph.find_modules_that_directly_import(ROOT_PACKAGE)
    below = {name for name in importers if name.split(".")[1] not in ("__main__", "cli")}
    assert not below
