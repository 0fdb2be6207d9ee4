"""`loftq quantize`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from loftq_cli.cli import options as o
from loftq_cli.cli.terminal import duration, guarded, print_json, quiet_hub_logging, results, styled
from loftq_cli.engine.workers.launcher import launched_rank
from loftq_cli.machine.collection import collection_paused
from loftq_cli.machine.sizes import size_text

if TYPE_CHECKING:
    from rich.text import Text

    from loftq_cli.artifacts.manifest import Manifest


def quantize_command(
    model: o.Model = None,
    output: o.Output = None,
    config: o.Config = None,
    stream: o.Stream = False,
    overwrite: o.Overwrite = False,
    push_to: o.PushTo = None,
    device: o.Device = "auto",
    num_processes: o.NumProcesses = None,
    max_memory: o.MaxMemory = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
    **recipe: Any,
) -> None:
    """Convert a checkpoint to a quantized backbone and a LoRA adapter, ready to train.

    The output loads through transformers and PEFT exactly as it was computed. To resume a conversion that was stopped,
    run the same command again.

    Example: loftq quantize path/to/Llama-2-13b --bits 2 --rank 64 --iters 5 -o llama-2bit
    """
    mute = launched_rank() > 0  # of a launcher's processes, only the main one prints
    resumable = "interrupted; finished matrices are kept: run the same command again to resume."
    with guarded(debug, resumable=resumable, mute=mute):
        with collection_paused():
            from loftq_cli.api import quantize
        from loftq_cli.cli.progress import choose_reporter
        from loftq_cli.recipe.model import read_places

        quiet_hub_logging(silent=quiet or json or mute)
        reporter = choose_reporter(silent=quiet or json or mute, verbose=verbose)
        manifest = quantize(
            model,
            output=output,
            config=config,
            device=device,
            num_processes=num_processes,
            max_memory=max_memory,
            stream=stream,
            overwrite=overwrite,
            push_to=push_to,
            reporter=reporter,
            **recipe,
        )
        if mute:
            return
        if json:
            print_json(summary(manifest))
        elif not quiet:
            print_summary(manifest)
            if repo := push_to or read_places(config).get("push_to"):
                results().print(f"pushed to {repo}", soft_wrap=True)


def summary(manifest: Manifest) -> dict[str, object]:
    """Return the values that `--json` prints: the manifest without its lists."""
    values = dataclasses.asdict(manifest)
    return {name: values[name] for name in values if name not in ("matrices", "kept", "files", "manifest_version")}


def print_summary(manifest: Manifest) -> None:
    """Print the summary of a conversion: sizes, bits, residuals, time, memory, output, and how to load it."""
    from rich.table import Table

    totals, console = manifest.totals, results()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    size = totals.backbone_bytes + totals.adapter_bytes
    table.add_row("weights", f"{size_text(totals.source_bytes)} → {size_text(size)}")
    parts = f"backbone {size_text(totals.backbone_bytes)}, adapter {size_text(totals.adapter_bytes)}"
    table.add_row("", styled((parts, "dim")))
    table.add_row("bits per weight", f"{totals.bits_effective:.2f} effective, {totals.bits_stored:.2f} stored")
    table.add_row("residual", _residual_text(manifest))
    table.add_row("", styled(("mean error of the weights; `loftq eval` measures the model", "dim")))
    table.add_row("time", f"{duration(totals.seconds)} on {manifest.device}")
    peak = f"{size_text(totals.peak_memory_bytes)}"
    if totals.peak_device_memory_bytes:
        peak += f", {size_text(totals.peak_device_memory_bytes)} on the GPU"
    table.add_row("peak memory", peak)
    table.add_row("format", f"{manifest.format}, {manifest.dtype}")
    console.print(table)
    output = manifest.output
    console.print()
    console.print(styled("written to ", (str(output), "bold")), soft_wrap=True)
    console.print(f"load it:   loftq_cli.load({str(output)!r}, trainable=True)", soft_wrap=True)


def _residual_text(manifest: Manifest) -> Text:
    """Return the mean error of the weights. It says nothing about the model's output, which `loftq eval` measures."""
    totals = manifest.totals
    if not any(record.best for record in manifest.matrices):
        return styled(f"{totals.plain_residual:.4f} plain (the adapter starts at zero)")
    kept = (f"{totals.residual:.4f}", "bold")
    return styled(kept, f" with the adapter, {totals.plain_residual:.4f} plain")
