"""Heatmaps of layers and modules as inline SVG, two quantities side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loftq_cli.reporting.data import Cell
from loftq_cli.reporting.text import clipped, number, residual, shown

LEVELS = 10
_CELL, _GUTTER, _GAP = 17, 26, 16
_LABEL = 18  # characters of a module's name
_ROW, _LOW_ROW, _MANY_ROWS = 11, 7, 40


@dataclass(frozen=True)
class Panel:
    """One quantity of a heatmap; `low` to `high` are the ends of its colours."""

    title: str
    value: Callable[[Cell], float]
    low: float
    high: float


def heatmap(title: str, cells: Sequence[Cell], panels: Sequence[Panel], most: int) -> str:
    """Return one stack of layers, a row for each layer and a column for each module in it.

    Args:
        most: cells to draw; layers beyond that are left out, and a note says so.
    """
    layers = sorted({cell.layer for cell in cells if cell.layer is not None})
    columns = tuple(dict.fromkeys(cell.place for cell in cells))
    drawn = layers[: max(1, most // max(1, len(columns)))]
    labels = column_labels(columns)
    row = _LOW_ROW if len(drawn) > _MANY_ROWS else _ROW
    top = round(22 + 6.3 * max(map(len, labels)))
    panel_width = _CELL * len(columns)
    parts = [
        f'<text x="{_GUTTER - 5}" y="{top + row * place + row - 2}" text-anchor="end">{layer}</text>'
        for place, layer in enumerate(drawn)
        if place % (1 if len(drawn) <= 16 else 4) == 0
    ]
    by_layer = {layer: [cell for cell in cells if cell.layer == layer] for layer in drawn}
    for place, panel in enumerate(panels):
        left = _GUTTER + place * (panel_width + _GAP)
        parts.append(f'<text class="name" x="{left}" y="10">{shown(panel.title)}</text>')
        parts += [_column(left + _CELL * at, top, label) for at, label in enumerate(labels)]
        for line, layer in enumerate(drawn):
            parts += [
                _tile(cell, panel, left + _CELL * columns.index(cell.place), top + row * line, row)
                for cell in by_layer[layer]
            ]
    width, height = _GUTTER + len(panels) * (panel_width + _GAP) - _GAP + 14, top + row * len(drawn) + 4
    left_out = f"<p>{len(layers) - len(drawn)} more layers are not drawn.</p>" if len(layers) > len(drawn) else ""
    return (
        f'<div class="wide"><svg class="map" role="img" viewBox="0 0 {width} {height}" '
        f'style="min-width:{width}px;max-width:{width * 1.5:.0f}px" aria-label="{shown(title)}">{"".join(parts)}'
        f"</svg></div>{left_out}"
    )


def legend(panel: Panel) -> str:
    """Return the scale of the colours."""
    boxes = "".join(f'<rect class="h{level}" x="{level * 12}" width="12" height="9"/>' for level in range(LEVELS))
    return (
        f'<p class="scale">{number(panel.low)} <svg viewBox="0 0 {12 * LEVELS} 9" width="{12 * LEVELS}" height="9" '
        f'aria-hidden="true">{boxes}</svg> {number(panel.high)}</p>'
    )


def level_of(value: float, low: float, high: float) -> int:
    """Return the colour of a value, 0 to 9."""
    if high <= low:
        return LEVELS // 2
    return min(LEVELS - 1, max(0, int((value - low) / (high - low) * LEVELS)))


def column_labels(modules: Sequence[str]) -> tuple[str, ...]:
    """Return short names of modules: the last parts of each, as many as tell it from the others."""
    return tuple(clipped(_shortest(module, modules), _LABEL) for module in modules)


def _shortest(module: str, modules: Sequence[str]) -> str:
    parts = module.split(".")
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if not any(other != module and f".{other}".endswith(f".{end}") for other in modules):
            return end
    return module


def cell_text(cell: Cell) -> str:
    """Return the numbers of a cell for its tooltip."""
    many = f"{cell.count} matrices, " if cell.count > 1 else ""
    ends = f" ({residual(cell.low)} to {residual(cell.high)})" if cell.count > 1 else ""
    return (
        f"{cell.module}: {many}{residual(cell.plain)} plain, {residual(cell.kept)} kept{ends}, {number(cell.bits)} "
        f"bits {'/'.join(cell.types)}, rank {number(cell.rank)}"
    )


def _column(x: float, y: float, label: str) -> str:
    x += _CELL / 2 + 3
    return f'<text x="{x}" y="{y - 4}" transform="rotate(-90 {x} {y - 4})">{shown(label)}</text>'


def _tile(cell: Cell, panel: Panel, x: float, y: float, row: int) -> str:
    level = level_of(panel.value(cell), panel.low, panel.high)
    return (
        f'<rect class="h{level}" x="{x}" y="{y}" width="{_CELL - 1}" height="{row - 1}">'
        f"<title>{shown(cell_text(cell))}</title></rect>"
    )
