"""Drawings of the code: the tree with one line a package, and the import layers that `lint-imports` enforces."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "loftq_cli"


def tree() -> str:
    """The package's directories and top-level files, each with the first sentence of its docstring."""
    lines = ["loftq_cli/"]
    for path in sorted(PACKAGE.iterdir(), key=lambda path: (path.is_file(), path.name)):
        lines += _entries(path, depth=1)
    width = max(len(line.split("\0")[0]) for line in lines) + 2
    rows = [line.split("\0") for line in lines]
    text = "\n".join(row[0] if len(row) == 1 else f"{row[0]:<{width}}{row[1]}" for row in rows)
    return f"```text\n{text}\n```"


def _entries(path: Path, depth: int) -> list[str]:
    indent = "  " * depth
    if path.is_file():
        named = path.suffix == ".py" and path.name != "__init__.py"
        return [f"{indent}{path.name}\0{_summary(path)}"] if named else []
    if not (path / "__init__.py").exists():
        return []
    inner = [line for child in sorted(path.iterdir()) if child.is_dir() for line in _entries(child, depth + 1)]
    return [f"{indent}{path.name}/\0{_summary(path / '__init__.py')}", *inner]


def _summary(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.) ", paragraph)[0].rstrip(".")


def layers() -> str:
    """The layers of pyproject.toml as a Mermaid graph, highest first."""
    rows = [[name.strip() for name in re.split(r"[|:]", layer)] for layer in _contract()]
    lines = ["```mermaid", "flowchart TB"]
    for number, names in enumerate(rows):
        label = "&nbsp;&nbsp;·&nbsp;&nbsp;".join(name.strip("()") for name in names)
        lines.append(f'  L{number}["{label}"]')
    lines.append("  " + " --> ".join(f"L{number}" for number in range(len(rows))))
    return "\n".join([*lines, "```"])


def _contract() -> list[str]:
    """The `layers` of the first contract of that type. Read by hand: Python 3.10 has no TOML reader."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^layers = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert found is not None, "pyproject.toml declares the import layers"
    return re.findall(r'^\s*"([^"]+)"', found[1], re.MULTILINE)
