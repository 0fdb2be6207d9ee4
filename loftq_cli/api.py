"""`loftq_cli.quantize` and `loftq_cli.plan`: recipe → plan → engine → manifest, as the command line runs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import UsageError
from loftq_cli.recipe import Recipe, make_recipe, parse_size

if TYPE_CHECKING:
    import torch

    from loftq_cli.artifacts.manifest import Manifest
    from loftq_cli.engine.progress import Reporter
    from loftq_cli.planner import Plan


def quantize(
    model: str | Path | None = None,
    *,
    output: str | Path | None = None,
    config: str | Path | None = None,
    device: str = "auto",
    max_memory: str | int | None = None,
    stream: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **recipe: Any,
) -> Manifest:
    """Convert a checkpoint to a quantized backbone and a LoRA adapter.

    Args:
        model: directory of a checkpoint (safetensors, pytorch_model.bin or Meta's), or a model on the Hub as `org/name`
            or `org/name@revision`; may come from `config`.
        output: directory to write; by default named after the model, in the working directory.
        config: a YAML recipe; arguments given here win over it.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        max_memory: resident memory to stay below, such as `"2GB"`; by default what the largest matrix takes, twice.
        stream: read a model on the Hub by range requests and keep no copy of its weights.
        overwrite: replace a finished conversion, or drop the state of an unfinished one.
        reporter: hears of progress; silent by default.
        **recipe: the fields of `Recipe` with the command line's names and defaults: revision=None, bits=4, rank=16,
            iters=None (5; refined: 12), method="loftq", init=None, levels=None, data_type="nf", block_size=64,
            format="auto", rule=(), include=(), exclude=(), embeddings="keep", lm_head="keep", alpha=None,
            keep_last=False, svd="fast", dtype="auto", calibrate=None, calibration_tokens=16384,
            calibrate_kind="diagonal", seed=0, max_shard_size="5GB", meta_version="auto".

    Returns:
        The manifest of the finished directory, as it stands in `loftq.json`.

    Raises:
        UsageError: an argument cannot be meant, or the output is not free.
        LoftqError: the checkpoint cannot be converted; an unfinished output is kept and the same call goes on.
    """
    from loftq_cli.calibration import calibrated
    from loftq_cli.checkpoint import open_source
    from loftq_cli.engine.progress import Reporter
    from loftq_cli.engine.run import run_plan

    asked = make_recipe({"model": model, **recipe}, Path(config) if config else None)
    chosen = choose_device(device)
    with open_source(asked, stream=stream) as (checkpoint, resolved):
        reporter = reporter or Reporter()
        made = calibrated(_plan(resolved, checkpoint, output), checkpoint, chosen, reporter)
        return run_plan(
            made,
            checkpoint,
            device=chosen,
            reporter=reporter,
            overwrite=overwrite,
            max_memory=None if max_memory is None else parse_size(max_memory),
        )


def plan(
    model: str | Path | None = None,
    *,
    output: str | Path | None = None,
    config: str | Path | None = None,
    stream: bool = False,
    **recipe: Any,
) -> Plan:
    """What `quantize` with the same arguments would do; reads headers, no weights. Of a model on the Hub only headers
    are fetched, with or without `stream`, unless its weights are pickles.

    Raises:
        UsageError, LoftqError: as `quantize` would before it starts to work.
    """
    from loftq_cli.checkpoint import open_source

    asked = make_recipe({"model": model, **recipe}, Path(config) if config else None)
    with open_source(asked, stream=stream, weights=False) as (checkpoint, resolved):
        return _plan(resolved, checkpoint, output)


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one.

    Raises:
        UsageError: no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device cannot be '{name}': give auto, cpu, cuda or cuda:1.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine shows torch {torch.cuda.device_count()} CUDA devices.")
    if device.type not in ("cpu", "cuda", "xpu", "mps"):
        raise UsageError(f"--device cannot be '{name}': give auto, cpu, cuda or cuda:1.")
    return device


def default_output(recipe: Recipe) -> Path:
    """`Llama-2-13b-loftq-2bit-r64` in the working directory."""
    name = Path(recipe.model).expanduser().resolve().name
    return Path(f"{name}-{recipe.method}-{recipe.bits}bit-r{recipe.rank}")


def _plan(recipe: Recipe, checkpoint: Any, output: str | Path | None) -> Plan:
    from loftq_cli import __version__
    from loftq_cli.calibration import pin_calibration
    from loftq_cli.planner import make_plan

    target = Path(output).expanduser() if output else default_output(recipe)
    return make_plan(pin_calibration(recipe), checkpoint, target.resolve(), __version__)
