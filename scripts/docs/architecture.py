"""Drawings of the code: the tree with one line a package, and the import layers that `lint-imports` enforces."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "loftq_cli"


def tree() -> str:
    """The package's directories and top-level files, each with the first sentence of its docstring, as a table."""
    lines = []
    for path in sorted(PACKAGE.iterdir(), key=lambda path: (path.is_file(), path.name)):
        lines += _entries(path, "")
    return "\n".join(["| `loftq_cli/` | |", "|---|---|", *lines])


def _entries(path: Path, above: str) -> list[str]:
    name = f"{above}{path.name}"
    if path.is_file():
        named = path.suffix == ".py" and path.name != "__init__.py"
        return [_row(name, path)] if named else []
    if not (path / "__init__.py").exists():
        return []
    inner = [line for child in sorted(path.iterdir()) if child.is_dir() for line in _entries(child, f"{name}/")]
    return [_row(f"{name}/", path / "__init__.py"), *inner]


def _row(name: str, path: Path) -> str:
    summary = _summary(path).replace("|", "\\|")
    return f"| `{name}` | {summary} |"


def _summary(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.) ", paragraph)[0].rstrip(".")


def layers() -> str:
    """The layers of pyproject.toml as a drawing, highest first."""
    rows = [[name.strip(" ()") for name in re.split(r"[|:]", layer)] for layer in _contract()]
    height, width = 44, 640
    parts = []
    for number, names in enumerate(rows):
        top, share = number * height, width / len(names)
        for place, name in enumerate(names):
            parts.append(_box(place * share + 2, top, share - 4, 28, [name]))
        if number + 1 < len(rows):
            parts.append(_arrow(width / 2, top + 28, width / 2, top + height))
    return _svg(
        width, (len(rows) - 1) * height + 30, parts, "Import layers: each package imports only from those below it"
    )


def flow() -> str:
    """The way of the data, from the recipe to what is done with a finished directory."""
    middle, steps = (
        320,
        [
            ["plan", "units of work and every output byte's place"],
            ["engine", "read, LoftQ, encode, write, one matrix at a time"],
            ["manifest", "what was done, hashed"],
            ["verify, merge, eval, push, load"],
        ],
    )
    parts = [_box(60, 2, 250, 44, ["recipe", "what the user asks"])]
    parts += [_box(330, 2, 250, 44, ["checkpoint headers", "names, shapes, dtypes"])]
    parts += [_arrow(185, 46, 250, 72), _arrow(455, 46, 390, 72)]
    for number, lines in enumerate(steps):
        top = 74 + 72 * number
        parts.append(_box(middle - 180, top, 360, 26 + 18 * (len(lines) - 1), lines))
        if number + 1 < len(steps):
            parts.append(_arrow(middle, top + 44, middle, top + 70))
    title = "Recipe and headers give the plan, the engine carries it out, the manifest records it"
    return _svg(640, 320, parts, title)


def _svg(width: float, height: float, parts: list[str], title: str) -> str:
    """An inline drawing in the colours of the page, light or dark."""
    marker = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="currentColor"/></marker></defs>'
    )
    style = f"max-width:{width:.0f}px;width:100%;height:auto;color:var(--md-default-fg-color)"
    head = f'<svg role="img" aria-label="{title}" viewBox="0 0 {width:.0f} {height:.0f}" style="{style}">'
    return f"<div>{head}{marker}{''.join(parts)}</svg></div>"


def _box(x: float, y: float, width: float, height: float, lines: list[str]) -> str:
    """A box with its name in bold, and what it is below."""
    shape = (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" rx="4" fill="none" '
        'stroke="currentColor"/>'
    )
    weights = ["bold", *["normal"] * (len(lines) - 1)]
    texts = "".join(
        f'<text x="{x + width / 2:.0f}" y="{y + 18 + 18 * number:.0f}" text-anchor="middle" font-size="13" '
        f'font-weight="{weight}" fill="currentColor">{line}</text>'
        for number, (weight, line) in enumerate(zip(weights, lines))
    )
    return shape + texts


def _arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<path d="M{x:.0f},{y:.0f} L{to_x:.0f},{to_y:.0f}" stroke="currentColor" marker-end="url(#tip)"/>'


def _contract() -> list[str]:
    """The `layers` of the first contract of that type. Read by hand: Python 3.10 has no TOML reader."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^layers = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert found is not None, "pyproject.toml declares the import layers"
    return re.findall(r'^\s*"([^"]+)"', found[1], re.MULTILINE)
