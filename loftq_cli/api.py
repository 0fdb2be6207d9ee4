"""`loftq_cli.quantize` and `loftq_cli.plan`: recipe → plan → engine → manifest, as the command line runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.engine.workers.order import make_orders
from loftq_cli.engine.workers.supervisor import make_team
from loftq_cli.errors import UsageError
from loftq_cli.machine.devices import choose_device, choose_devices
from loftq_cli.recipe.model import Recipe, make_recipe, parse_size, read_places

_NO_RUN = "finished"  # what a launcher's other processes hear where nothing is left to convert

if TYPE_CHECKING:
    import torch

    from loftq_cli.artifacts.manifest import Manifest
    from loftq_cli.engine.workers.order import Order
    from loftq_cli.planning.plan import Plan
    from loftq_cli.progress import Reporter


def quantize(
    model: str | Path | None = None,
    *,
    output: str | Path | None = None,
    config: str | Path | None = None,
    device: str = "auto",
    num_processes: int | None = None,
    max_memory: str | int | None = None,
    stream: bool = False,
    overwrite: bool = False,
    push_to: str | None = None,
    reporter: Reporter | None = None,
    **recipe: Any,
) -> Manifest:
    """Convert a checkpoint to a quantized backbone and a LoRA adapter.

    Args:
        model: directory of a checkpoint (safetensors, pytorch_model.bin or Meta's), or a model on the Hub as `org/name`
            or `org/name@revision`; may come from `config`.
        output: directory to write; by default named after the model, in the working directory. May come from `config`.
        config: a YAML recipe; arguments given here win over it.
        device: `auto`, `cpu`, `cuda` (all GPUs, as `auto` where there are any), `cuda:1`.
        num_processes: workers that share the matrices; by default one for every GPU in use, and one on the CPU. Where
            a launcher (`accelerate launch`, torchrun, mpirun, srun) has started several processes, they are the workers
            and share `output`, on one machine or on several; each returns the manifest.
        max_memory: resident memory to stay below, such as `"2GB"`; by default what the largest matrix takes, twice.
        stream: read a model on the Hub by range requests and keep no copy of its weights.
        overwrite: replace a finished conversion, or drop the state of an unfinished one.
        push_to: `ORG/NAME` on the Hub to push the finished conversion to, as `push` does; one that is finished already
            is only pushed. May come from `config`.
        reporter: hears of progress; silent by default.
        **recipe: the fields of `Recipe` with the command line's names and defaults: revision=None, bits=4, mix="",
            target_size=None, weigh="relative", rank=16, rank_budget=None, iters=None (5; refined: 16), method="loftq",
            init=None, levels=None, data_type="auto", block_size=64, group_size=None, scale="auto", symmetric=None,
            double_quant=False, format="auto", dequantize=True, rule=(), include=(), exclude=(), embeddings="keep",
            lm_head="keep", experts="quantize", allow_nonfinite=False, alpha=None, keep_last=False, svd="fast",
            dtype="auto", calibrate=None, calibration_tokens=16384, calibrate_kind="diagonal", seed=0,
            max_shard_size="5GB", meta_version="auto".

    Returns:
        The manifest of the finished directory, as it stands in `loftq.json`.

    Raises:
        UsageError: an argument cannot be meant, or the output is not free.
        LoftqError: the checkpoint cannot be converted; an unfinished output is kept and the same call goes on.
    """
    from loftq_cli.calibration.calibrate import calibrated, pin_calibration
    from loftq_cli.checkpoint import open_source
    from loftq_cli.engine.compute.finite import find_nonfinite
    from loftq_cli.engine.output.finished import find_finished
    from loftq_cli.engine.run import run_plan
    from loftq_cli.engine.workers.launcher import joined_world
    from loftq_cli.progress import Reporter

    file = Path(config) if config else None
    asked, places = make_recipe({"model": model, **recipe}, file), read_places(file)
    output, repo = output or places.get("output"), push_to or places.get("push_to")
    memory = None if max_memory is None else parse_size(max_memory)
    devices = choose_devices(device, num_processes)
    reporter = reporter or Reporter()
    with joined_world() as world:
        if world is not None and num_processes is not None:
            raise UsageError("--num-processes is for a run without a launcher, which has started processes already.")
        if world is not None and not world.main:
            orders = make_orders(asked, _output(asked, output), devices, stream, memory, world)
            return _follow(orders[0], world.hear())
        repo = _may_push(repo)
        with open_source(asked, stream=stream) as (checkpoint, resolved):
            resolved = pin_calibration(resolved)
            nonfinite = None
            if resolved.allow_nonfinite:
                nonfinite = find_nonfinite(_unmixed_plan(resolved, checkpoint, output), checkpoint, reporter)
            made = _plan(resolved, checkpoint, output, devices[0], reporter.measuring, nonfinite)
            orders = make_orders(made.recipe, made.output, devices, stream, memory, world)
            manifest = find_finished(made) if repo and not overwrite else None
            if manifest is not None and world is not None:
                world.announce(_NO_RUN)
            if manifest is None:
                made = calibrated(made, checkpoint, devices[0], reporter)
                manifest = run_plan(
                    made,
                    checkpoint,
                    device=devices[0],
                    reporter=reporter,
                    overwrite=overwrite,
                    max_memory=orders[0].max_memory,
                    team=make_team(orders, world),
                )
    if repo:
        _push(made.output, repo)
    return manifest


def plan(
    model: str | Path | None = None,
    *,
    output: str | Path | None = None,
    config: str | Path | None = None,
    stream: bool = False,
    device: str = "auto",
    measuring: Callable[[int, int], None] = lambda done, total: None,
    **recipe: Any,
) -> Plan:
    """What `quantize` with the same arguments would do; reads headers, no weights. Of a model on the Hub only headers
    are fetched, with or without `stream`, unless its weights are pickles. Where bits or ranks are allocated, every
    matrix is read once, on `device`, to measure what its choices cost; `quantize` does not measure again.

    Args:
        measuring: hears how many matrices are measured, of how many.

    Raises:
        UsageError, LoftqError: as `quantize` would before it starts to work.
    """
    from loftq_cli.calibration.calibrate import pin_calibration
    from loftq_cli.checkpoint import open_source

    file = Path(config) if config else None
    asked = make_recipe({"model": model, **recipe}, file)
    with open_source(asked, stream=stream, weights=False) as (checkpoint, resolved):
        target = output or read_places(file).get("output")
        return _plan(pin_calibration(resolved), checkpoint, target, choose_device(device), measuring)


def _follow(order: Order, run_id: str) -> Manifest:
    """A launcher's other process: its share of the run, or nothing where the main one has found the output finished."""
    from loftq_cli.artifacts.manifest import read_manifest
    from loftq_cli.engine.workers.worker import follow

    if run_id == _NO_RUN:
        return read_manifest(order.output)
    return follow(dataclasses.replace(order, run_id=run_id))


def _may_push(repo: str | None) -> str | None:
    """What would stop the push is said before hours of work, not after."""
    if repo:
        from loftq_cli.publishing.push import check_repo, require_login

        check_repo(repo)
        require_login()
    return repo


def _push(output: Path, repo: str) -> None:
    from loftq_cli.errors import LoftqError
    from loftq_cli.publishing.push import push

    try:
        push(output, repo)
    except LoftqError as error:
        said = f"{output} is finished, but not on the Hub: {error}"
        raise LoftqError(said, exit_code=error.exit_code) from error






def default_output(recipe: Recipe) -> Path:
    """`Llama-2-13b-loftq-2.5bit-r64`, or with a target size `Llama-2-13b-loftq-6GB-r64`, in the working directory."""
    name = Path(recipe.model).expanduser().resolve().name
    size = f"{recipe.bits:g}bit" if recipe.target_size is None else recipe.target_size.replace(" ", "")
    return Path(f"{name}-{recipe.method}-{size}-r{recipe.rank_budget or recipe.rank:g}")






def _output(recipe: Recipe, output: str | Path | None) -> Path:
    return (Path(output).expanduser() if output else default_output(recipe)).resolve()


def _plan(
    recipe: Recipe,
    checkpoint: Any,
    output: str | Path | None,
    device: torch.device,
    measuring: Callable[[int, int], None],
    nonfinite: Mapping[str, str] | None = None,
) -> Plan:
    from loftq_cli._version import __version__
    from loftq_cli.budget.mixing import mix
    from loftq_cli.planning.plan import find_modules, make_plan

    modules = find_modules(checkpoint)
    mixed = mix(recipe, checkpoint, modules, device, measuring, nonfinite)
    made = make_plan(mixed.recipe, checkpoint, _output(recipe, output), __version__, nonfinite, modules)
    return dataclasses.replace(made, notes=(*made.notes, *mixed.notes))


def _unmixed_plan(recipe: Recipe, checkpoint: Any, output: str | Path | None) -> Plan:
    """The matrices of a conversion, before bits and ranks are allocated."""
    from loftq_cli._version import __version__
    from loftq_cli.planning.plan import make_plan

    return make_plan(recipe.unmixed(), checkpoint, _output(recipe, output), __version__)
