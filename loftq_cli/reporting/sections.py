"""The pictures of the page: tiles, heatmaps and charts, a card for each conversion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loftq_cli.machine.sizes import size_text
from loftq_cli.reporting import charts
from loftq_cli.reporting.data import Conversion, by_layer
from loftq_cli.reporting.heatmap import Panel, heatmap, legend
from loftq_cli.reporting.text import breakable, clipped, number, residual, shown, table

_MOST_CELLS = 6000  # of all heatmaps together: about 2 MB
_HUES = 7
_BARS = 104  # height of a chart of bars


@dataclass(frozen=True)
class Section:
    """A heading, a sentence about it, and HTML: one card for each conversion, or `whole` for all of them."""

    title: str
    about: str
    cards: tuple[str, ...] = ()
    whole: str = ""


def pictures(conversions: Sequence[Conversion]) -> tuple[Section, ...]:
    """Return the sections with drawings; scales are the same for all conversions, so that colours can be compared."""
    found = [_tiles(conversions), _residuals(conversions), _steps(conversions), _layers(conversions)]
    if any(_varies(conversion) for conversion in conversions):
        found.append(_choices(conversions))
    found += [_sizes(conversions), _worst(conversions)]
    if any(conversion.spectra or conversion.no_spectra for conversion in conversions):
        found.append(_spectra(conversions))
    return tuple(found)


def _tiles(conversions: Sequence[Conversion]) -> Section:
    return Section(
        "At a glance",
        "The residual is ‖W − Q − BA‖ / ‖W‖ in the Frobenius norm, the mean over the quantized matrices; plain is "
        "quantization alone, without an adapter. It measures the weights, not the quality of the model.",
        tuple(f'<div class="tiles">{"".join(_headlines(conversion))}</div>' for conversion in conversions),
    )


def _headlines(conversion: Conversion) -> list[str]:
    manifest = conversion.manifest
    totals, output = manifest.totals, manifest.totals.backbone_bytes + manifest.totals.adapter_bytes
    adapter = f", {size_text(totals.adapter_bytes)} of it the adapter" if totals.adapter_bytes else ", no adapter"
    gain = 1 - totals.residual / totals.plain_residual if totals.plain_residual else 0.0
    tiles = [
        (f"{size_text(totals.source_bytes)} → {size_text(output)}", f"weights before and after{adapter}"),
        (f"{totals.bits_effective:.2f} bits", f"effective; {totals.bits_stored:.2f} bits stored for each weight"),
        (f"{residual(totals.plain_residual)} → {residual(totals.residual)}", _change("residual, plain → kept", gain)),
    ]
    pairs = [
        (record.weighted_plain_residual, record.weighted_residual)
        for record in manifest.matrices
        if record.weighted_plain_residual is not None and record.weighted_residual is not None
    ]
    if pairs:
        plain, kept = (sum(values) / len(values) for values in zip(*pairs))
        text = _change("error of the layers' outputs", 1 - kept / plain if plain else 0.0)
        tiles.append((f"{residual(plain)} → {residual(kept)}", text))
    if conversion.embedding_share:
        tiles.append((f"{conversion.embedding_share:.1%}", "of the output is the embedding"))
    tiles.append((f"{totals.matrices}", f"matrices quantized, {len(manifest.kept)} tensors in full precision"))
    peak = f"on {manifest.device}, peak memory {size_text(totals.peak_memory_bytes)}"
    tiles.append((_duration(totals.seconds), peak))
    return [f'<div class="tile"><b>{shown(value)}</b><span>{shown(label)}</span></div>' for value, label in tiles]


def _change(label: str, gain: float) -> str:
    return label if abs(gain) < 0.0005 else f"{label}: {abs(gain):.1%} {'smaller' if gain > 0 else 'larger'}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _residuals(conversions: Sequence[Conversion]) -> Section:
    top = max((max(cell.plain, cell.kept) for item in conversions for cell in item.cells), default=0.0)
    panels = (
        Panel("plain", lambda cell: cell.plain, 0.0, top),
        Panel("kept", lambda cell: cell.kept, 0.0, top),
    )
    return Section(
        "Residual by layer and module",
        "A row is a layer, a column a module in it; experts share a cell, which shows their mean. Point at a cell, or "
        "tap it, for its numbers. Blank cells are in full precision.",
        tuple(legend(panels[0]) + _maps(item, panels, len(conversions)) for item in conversions),
    )


def _maps(conversion: Conversion, panels: Sequence[Panel], share: int) -> str:
    """Return the heatmaps of all stacks of layers, and a table of the matrices outside of them."""
    parts, most = [], _MOST_CELLS // share
    for stack in conversion.stacks:
        cells = [cell for cell in conversion.cells if cell.stack == stack and cell.layer is not None]
        if most > 0:
            parts.append(f"<h4>{shown(stack or 'layers')}</h4>")
            parts.append(heatmap(f"{panels[0].title} and {panels[1].title}, {stack}", cells, panels, most))
        else:
            parts.append(f"<p>{shown(stack)} is not drawn.</p>")
        most -= len(cells)
    if conversion.loose:
        names = [panel.title for panel in panels]
        rows = [
            [breakable(cell.module), *(number(panel.value(cell)) for panel in panels)] for cell in conversion.loose[:50]
        ]
        parts += ["<h4>outside of the layers</h4>", table(["module", *names], rows, "numbers")]
    return "".join(parts)


def _steps(conversions: Sequence[Conversion]) -> Section:
    top = max((point.high for item in conversions for point in item.steps), default=0.0)
    last = max((len(item.steps) - 1 for item in conversions), default=0)
    axes = charts.Axes("step", "residual", (0, last), (0, top * 1.05), marks=True)
    return Section(
        "Residual after each step",
        "Step 0 is plain quantization. The line is the mean, the band the middle 80 % of the matrices.",
        tuple(_steps_of(item, axes) for item in conversions),
    )


def _steps_of(conversion: Conversion, axes: charts.Axes) -> str:
    if not conversion.steps:
        return "<p>No matrix was iterated.</p>"
    curve = charts.Line(
        "residual",
        tuple((point.step, point.mean) for point in conversion.steps),
        low=tuple(point.low for point in conversion.steps),
        high=tuple(point.high for point in conversion.steps),
    )
    chosen = ", ".join(f"{step} by {count}" for step, count in enumerate(conversion.best) if count)
    return charts.lines("residual after each step", [curve], axes) + f"<p>Step kept: {chosen} matrices.</p>"


def _layers(conversions: Sequence[Conversion]) -> Section:
    most_bits = max(cell.bits for item in conversions for cell in item.cells)
    most_rank = max(max(cell.rank for item in conversions for cell in item.cells), 1)
    cards = []
    for item in conversions:
        parts = [f"<p>{shown(_summary(item))}</p>"]
        for stack in item.stacks if _varies(item) else ():
            cells = [cell for cell in item.cells if cell.stack == stack]
            bits, ranks = by_layer(cells, lambda cell: cell.bits), by_layer(cells, lambda cell: cell.rank)
            span = (bits[0][0] - 0.5, bits[-1][0] + 0.5)
            axes = charts.Axes("layer", "bits", span, (0, most_bits), height=_BARS)
            parts += [f"<h4>{shown(stack or 'layers')}</h4>", charts.bars("bits by layer", bits, axes)]
            if any(rank for _, rank in ranks):
                axes = charts.Axes("layer", "rank", span, (0, most_rank), height=_BARS)
                parts.append(charts.bars("rank by layer", ranks, axes, 2))
        cards.append("".join(parts))
    return Section("Bits and rank by layer", "Means over the matrices of a layer.", tuple(cards))


def _summary(conversion: Conversion) -> str:
    """Return the bits and ranks that occur."""
    records = conversion.manifest.matrices
    bits, ranks = sorted({record.bits for record in records}), sorted({record.rank for record in records})
    rank = "no adapter" if ranks == [0] else "rank " + _listed(ranks)
    return f"{_listed(bits)} bits and {rank}, {'over' if _varies(conversion) else 'for'} all matrices."


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) if len(values) < 6 else f"{values[0]} to {values[-1]}"


def _varies(conversion: Conversion) -> bool:
    return len({(record.bits, record.rank) for record in conversion.manifest.matrices}) > 1


def _choices(conversions: Sequence[Conversion]) -> Section:
    cells = [cell for item in conversions for cell in item.cells]
    panels = (
        Panel("bits", lambda cell: cell.bits, 0.0, max(cell.bits for cell in cells)),
        Panel("rank", lambda cell: cell.rank, 0.0, max(cell.rank for cell in cells)),
    )
    cards = tuple(
        f"{legend(panels[0])}{legend(panels[1])}{_maps(item, panels, len(conversions))}" for item in conversions
    )
    return Section(
        "Bits and rank by layer and module", "The first scale is of the bits, the second of the rank.", cards
    )


def _sizes(conversions: Sequence[Conversion]) -> Section:
    return Section(
        "Where the bytes are",
        "The embedding is often the largest part of a small model. Headers of files are not counted.",
        tuple(_sizes_of(item) for item in conversions),
    )


def _sizes_of(conversion: Conversion) -> str:
    total = sum(share.nbytes for share in conversion.shares) or 1
    hues = [min(place, _HUES) for place in range(1, len(conversion.shares) + 1)]
    parts = "".join(
        f'<span class="part s{hue}" style="width:{share.nbytes / total:.2%}" title="{shown(share.label)}"></span>'
        for hue, share in zip(hues, conversion.shares)
    )
    rows = [
        [
            f'<i class="s{hue}"></i>{shown(share.label)}',
            shown(share.note),
            size_text(share.nbytes),
            f"{share.nbytes / total:.1%}",
        ]
        for hue, share in zip(hues, conversion.shares)
    ]
    return f'<div class="bar-row">{parts}</div>' + table(["part", "", "size", "share"], rows, "numbers")


def _worst(conversions: Sequence[Conversion]) -> Section:
    cards = []
    for item in conversions:
        rows = [
            [
                breakable(record.module),
                residual(record.plain_residual),
                residual(record.residual),
                str(record.bits),
                str(record.rank or "-"),
            ]
            for record in item.worst
        ]
        cards.append(table(["matrix", "plain", "kept", "bits", "rank"], rows, "numbers"))
    return Section("The largest residuals", "Matrices whose weights are reproduced worst.", tuple(cards))


def _spectra(conversions: Sequence[Conversion]) -> Section:
    values = [
        value
        for item in conversions
        for one in item.spectra
        for value in (*one.weight, *one.backbone, *(one.error or ()))
    ]
    low = max(min((value for value in values if value > 0), default=1e-3), 1e-3)
    last = max((one.indices[-1] for item in conversions for one in item.spectra), default=1)
    axes = charts.Axes("number of the singular value", "relative to W", (1, max(last, 2)), (low, 1), logarithmic=True)
    cards = []
    for item in conversions:
        parts = [f"<p>{shown(item.no_spectra)}</p>"] if item.no_spectra else []
        for one in item.spectra:
            curves = [
                charts.Line("W", tuple(zip(one.indices, one.weight)), 7),
                charts.Line("W − Q", tuple(zip(one.indices, one.backbone)), 2),
            ]
            if one.error is not None:
                curves.append(charts.Line(f"W − Q − BA, rank {one.rank}", tuple(zip(one.indices, one.error)), 1))
            parts.append(f"<h4>{shown(clipped(one.module, 200))}</h4>")
            parts.append(charts.lines(f"singular values of {one.module}", curves, axes))
        cards.append("".join(parts))
    about = (
        "Of a few matrices, recomputed from the written files: the weight, the error of the backbone, and the error "
    )
    return Section("Singular values of the error", about + "that the adapter leaves.", tuple(cards))
