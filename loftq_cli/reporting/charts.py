"""Small charts as inline SVG: lines with bands, and bars. Pure functions from numbers to markup."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loftq_cli.reporting.text import number, shown

_WIDTH, _HEIGHT = 340, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 32


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        points: x and y.
        low, high: the edges of a band around it, at the same x; empty without one.
        hue: 1 to 3, the colour.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    hue: int = 1
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class Axes:
    """Labels and ranges of a chart.

    Attributes:
        logarithmic: both axes; values that are not positive are left out.
        marks: draw every point, with its values as a tooltip.
        height: of the drawing.
    """

    x: str
    y: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    logarithmic: bool = False
    marks: bool = False
    height: int = _HEIGHT


def lines(title: str, curves: Sequence[Line], axes: Axes) -> str:
    """Return a chart of lines, with a legend where there are several."""
    parts = [_frame(axes)]
    for curve in curves:
        points = [(x, y) for x, y in curve.points if not axes.logarithmic or (x > 0 and y > 0)]
        if curve.low:
            xs = [x for x, _ in curve.points]
            edge = [*zip(xs, curve.high), *reversed([*zip(xs, curve.low)])]
            parts.append(f'<polygon class="band s{curve.hue}" points="{_path(edge, axes)}"/>')
        parts.append(f'<polyline class="line s{curve.hue}" points="{_path(points, axes)}"/>')
        parts += [_mark(x, y, curve, axes) for x, y in points if axes.marks]
    legend = "".join(f'<span class="key s{curve.hue}">{shown(curve.name)}</span>' for curve in curves)
    return _svg(title, parts, axes.height) + (f'<p class="legend">{legend}</p>' if len(curves) > 1 else "")


def bars(title: str, values: Sequence[tuple[int, float]], axes: Axes, hue: int = 1) -> str:
    """Return a chart of one bar for each layer, with its value as a tooltip."""
    parts = [_frame(axes)]
    start, end = axes.x_range
    width = (_WIDTH - _LEFT - _RIGHT) / (end - start or 1)
    for layer, value in values:
        x, top = _x(layer - 0.5, axes), _y(value, axes)
        height = _y(axes.y_range[0], axes) - top
        text = f"{axes.x} {layer}: {number(value)} {axes.y}"
        parts.append(
            f'<rect class="bar s{hue}" x="{x + width * 0.1:.1f}" y="{top:.1f}" width="{width * 0.8:.1f}" '
            f'height="{height:.1f}"><title>{shown(text)}</title></rect>'
        )
    return _svg(title, parts, axes.height)


def _svg(title: str, parts: Sequence[str], height: int) -> str:
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {_WIDTH} {height}" aria-label="{shown(title)}">{"".join(parts)}'
        "</svg>"
    )


def _mark(x: float, y: float, curve: Line, axes: Axes) -> str:
    text = f"{axes.x} {number(x)}: {curve.name} {number(y)}"
    return (
        f'<circle class="dot s{curve.hue}" cx="{_x(x, axes):.1f}" cy="{_y(y, axes):.1f}" r="3">'
        f"<title>{shown(text)}</title></circle>"
    )


def _path(points: Sequence[tuple[float, float]], axes: Axes) -> str:
    return " ".join(f"{_x(x, axes):.1f},{_y(y, axes):.1f}" for x, y in points)


def _frame(axes: Axes) -> str:
    """Return grid lines, tick labels and the names of both axes."""
    parts = []
    bottom, right = axes.height - _BOTTOM, _WIDTH - _RIGHT
    for tick in ticks(axes.y_range, axes.logarithmic):
        y = _y(tick, axes)
        parts.append(f'<path class="grid" d="M{_LEFT},{y:.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{_tick(tick)}</text>')
    for tick in ticks(axes.x_range, axes.logarithmic, whole=True):
        parts.append(f'<text x="{_x(tick, axes):.1f}" y="{bottom + 13}" text-anchor="middle">{_tick(tick)}</text>')
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text x="{(_LEFT + right) / 2:.0f}" y="{axes.height - 4}" text-anchor="middle">{shown(axes.x)}</text>'
    )
    parts.append(
        f'<text x="9" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 9 {middle:.0f})">'
        f"{shown(axes.y)}</text>"
    )
    return "".join(parts)


def ticks(limits: tuple[float, float], logarithmic: bool, whole: bool = False) -> tuple[float, ...]:
    """Return about five round numbers within the limits; powers of ten on a logarithmic axis."""
    low, high = limits
    if logarithmic:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        stride = max(1, (last - first) // 4)
        return tuple(10.0**power for power in range(first, last + 1, stride))
    if high <= low:
        return (low,)
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    step = max(1.0, step) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(index * step for index in range(first, last + 1))


def _tick(value: float) -> str:
    if value and (value < 1e-3 or value >= 1e5):
        return f"1e{math.floor(math.log10(value) + 0.5)}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _x(value: float, axes: Axes) -> float:
    return _LEFT + _position(value, axes.x_range, axes.logarithmic) * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, axes: Axes) -> float:
    share = _position(value, axes.y_range, axes.logarithmic)
    return axes.height - _BOTTOM - share * (axes.height - _TOP - _BOTTOM)


def _position(value: float, limits: tuple[float, float], logarithmic: bool) -> float:
    low, high = (math.log10(limit) for limit in limits) if logarithmic else limits
    at = math.log10(value) if logarithmic else value
    return min(1.0, max(0.0, (at - low) / (high - low))) if high > low else 0.5
