"""`loftq plan`."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from loftq_cli.cli import options as o
from loftq_cli.cli.terminal import duration, guarded, print_json, quiet_hub_logging, results, styled, warn
from loftq_cli.machine.sizes import size_text

if TYPE_CHECKING:
    from rich.console import Console

    from loftq_cli.artifacts.summary import TextSizes
    from loftq_cli.planning.plan import Plan
    from loftq_cli.planning.units import Unit


def plan_command(
    model: o.Model = None,
    output: o.Output = None,
    config: o.Config = None,
    stream: o.Stream = False,
    device: o.Device = "auto",
    json: o.Json = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
    **recipe: Any,
) -> None:
    """Show what `quantize` would do with the same flags, without reading weights. Only a budget (mean bits, a size or a
    mean rank) requires reading and measuring every matrix once.

    Shows the matrices with bits and ranks, the tensors left unchanged and why, the exact size of every output file, and
    the estimated time and memory on this machine (from a short trial run, which is cached).

    Example: loftq plan path/to/Llama-2-13b --bits 2 --rank 64
    """
    with guarded(debug):
        from loftq_cli.api import plan
        from loftq_cli.artifacts.summary import text_sizes
        from loftq_cli.cli.progress import choose_reporter
        from loftq_cli.engine.cost.estimate import estimate
        from loftq_cli.machine.devices import choose_device

        quiet_hub_logging(silent=json)
        reporter = choose_reporter(silent=json, verbose=verbose)
        made = plan(
            model,
            output=output,
            config=config,
            stream=stream,
            device=device,
            measuring=reporter.measuring,
            **recipe,
        )
        sizes, cost = text_sizes(made), estimate(made, choose_device(device))
        if json:
            print_json(plan_values(made, sizes) | {"estimate": dataclasses.asdict(cost)})
        else:
            _print_plan(made, sizes, verbose)
            results().print(f"about {duration(cost.seconds)} and {size_text(cost.peak_memory_bytes)} of memory here")


def output_sizes(plan: Plan, sizes: TextSizes) -> dict[str, int]:
    """Return every output file with its size in bytes."""
    from loftq_cli.artifacts.manifest import NAME
    from loftq_cli.artifacts.summary import CARD

    found = {file.name: file.nbytes for file in plan.files}
    found |= {name: len(content) for name, content in plan.texts.items()}
    found |= {side.name: side.nbytes for side in plan.side_files}
    return found | {CARD: sizes.card, NAME: sizes.manifest}


def plan_values(plan: Plan, sizes: TextSizes) -> dict[str, Any]:
    """Return the plan as printed by `--json`."""
    return {
        "architecture": plan.modules.architecture,
        "format": plan.recipe.format,
        "output": str(plan.output),
        "fingerprint": plan.fingerprint,
        "source_bytes": plan.source_bytes,
        "backbone_bytes": plan.backbone_bytes,
        "adapter_bytes": plan.adapter_bytes,
        "bits_mean": round(mean_bits(plan), 4),
        "widths": {str(width): count for width, count in widths(plan).items()},
        "bits_effective": round(plan.bits_effective, 4),
        "bits_stored": round(plan.bits_stored, 4),
        "notes": list(plan.notes),
        "files": output_sizes(plan, sizes),
        "matrices": [
            {
                "tensor": unit.tensor,
                "module": unit.module,
                "shape": list(unit.matrix.shape),
                "bits": unit.matrix.grid.bits,
                "data_type": unit.matrix.grid.data_type,
                "block_size": unit.matrix.grid.block_size,
                "rank": unit.target.rank if unit.target else 0,
                "bytes": unit.backbone_bytes,
            }
            for unit in plan.matrices
            if unit.matrix
        ],
        "kept": [
            {"tensor": unit.tensor, "reason": str(unit.reason), "bytes": unit.backbone_bytes} for unit in plan.kept
        ],
    }


def widths(plan: Plan) -> dict[int, int]:
    """Return the number of matrices of each width in bits."""
    return dict(sorted(Counter(unit.matrix.grid.bits for unit in plan.matrices if unit.matrix).items()))


def mean_bits(plan: Plan) -> float:
    """Return the mean number of code bits of a quantized weight."""
    codes = sum(unit.matrix.grid.bits * unit.matrix.weights for unit in plan.matrices if unit.matrix)
    return codes / plan.quantized_weights


def _print_allocation(console: Console, plan: Plan) -> None:
    """Print how the budget is spent, in one or two lines."""
    counts = widths(plan)
    if plan.recipe.mix:
        shown = ", ".join(f"{count} at {width}" for width, count in counts.items())
        console.print()
        console.print(
            styled((plan.recipe.mix, "bold"), f" mix: {shown} bits; mean {mean_bits(plan):.3f} bits of code"),
            soft_wrap=True,
        )
    if plan.recipe.rank_budget is not None:
        ranks = [unit.target.rank for unit in plan.matrices if unit.target]
        console.print(
            f"ranks from {min(ranks)} to {max(ranks)}, with as many parameters as rank {plan.recipe.rank_budget:g}"
        )


def _print_plan(plan: Plan, sizes: TextSizes, verbose: bool) -> None:
    console = results()
    weights = plan.quantized_weights
    console.print(
        styled(
            (plan.modules.architecture or "checkpoint", "bold"),
            f", {size_text(plan.source_bytes)}: {len(plan.matrices)} matrices "
            f"({weights / 1e6:,.1f} million weights) to ",
            (plan.recipe.format, "bold"),
            f", {plan.bits_effective:.2f} bits effective, {plan.bits_stored:.2f} stored",
        ),
        soft_wrap=True,
    )
    console.print()
    # If each matrix has its own width, groups would hide it.
    _print_matrices(console, plan.matrices, verbose or plan.recipe.allocates)
    _print_allocation(console, plan)
    _print_kept(console, plan.kept, verbose)
    _print_files(console, plan, sizes)
    for note in plan.notes:
        warn(note)


def _print_matrices(console: Console, units: tuple[Unit, ...], verbose: bool) -> None:
    from loftq_cli.cli.tables import Name, name_table

    numbers = ("count", "out × in", "bits", "block", "rank", "bytes")
    table = name_table(console, "matrices", *numbers, right=numbers)
    groups: dict[tuple[str, ...], list[Unit]] = defaultdict(list)
    for unit in units:
        assert unit.matrix is not None
        grid = unit.matrix.grid
        name = unit.matrix.parameter if unit.kind == "expert" else unit.matrix.module
        name = name if verbose else re.sub(r"\b\d+\b", "*", name)
        shape = f"{unit.matrix.out_features} × {unit.matrix.in_features}"
        bits = f"{grid.bits} {grid.data_type}"
        rank = str(unit.target.rank) if unit.target else "-"
        groups[name, shape, bits, str(grid.block_size), rank].append(unit)
    for (name, *cells), members in groups.items():
        size = size_text(sum(unit.backbone_bytes for unit in members))
        table.add_row(Name(name), str(len(members)), *cells, size)
    console.print(table)


def _print_kept(console: Console, units: tuple[Unit, ...], verbose: bool) -> None:
    from loftq_cli.cli.tables import Name, name_table

    table = name_table(console, "in full precision", "count", "bytes", "why", right=("count", "bytes"))
    groups: dict[tuple[str, str], list[Unit]] = defaultdict(list)
    for unit in units:
        # Vectors are many and rarely of interest, so each reason gets one line.
        matrix = len(unit.source.shape) > 1
        name = unit.tensor if verbose else re.sub(r"\b\d+\b", "*", unit.tensor) if matrix else "(vectors)"
        groups[name, str(unit.reason)].append(unit)
    for (name, reason), members in groups.items():
        size = size_text(sum(unit.backbone_bytes for unit in members))
        table.add_row(Name(name), str(len(members)), size, reason)
    console.print()
    console.print(table)


def _print_files(console: Console, plan: Plan, sizes: TextSizes) -> None:
    from loftq_cli.cli.tables import Name, name_table

    files = output_sizes(plan, sizes)
    table = name_table(console, "writes", "bytes", right=("bytes",))
    for name, size in files.items():
        table.add_row(Name(name), f"{size:,}")
    table.add_row(styled(("total", "bold")), styled((f"{sum(files.values()):,}", "bold")))
    console.print()
    console.print(table)
    console.print()
    console.print(
        f"{size_text(plan.source_bytes)} → {size_text(plan.backbone_bytes)} backbone + "
        f"{size_text(plan.adapter_bytes)} adapter in {plan.output}",
        soft_wrap=True,
    )
