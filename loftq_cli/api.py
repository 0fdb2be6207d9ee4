"""`loftq_cli.quantize` and `loftq_cli.plan`: recipe → plan → engine → manifest, as on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from loftq_cli.engine.workers.order import make_orders
from loftq_cli.engine.workers.supervisor import make_team
from loftq_cli.errors import UsageError
from loftq_cli.machine.confined import real_path, user_path
from loftq_cli.machine.devices import choose_device, choose_devices
from loftq_cli.recipe.keywords import RecipeKeywords
from loftq_cli.recipe.model import Recipe, make_recipe, parse_size, read_places

if TYPE_CHECKING:
    import torch

    from loftq_cli.artifacts.manifest import Manifest
    from loftq_cli.engine.workers.launcher import World
    from loftq_cli.engine.workers.order import Order
    from loftq_cli.planning.plan import Plan
    from loftq_cli.progress import Reporter

_NO_RUN = "finished"  # announced to the launcher's other processes if nothing is left to convert


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
    progress: bool = False,
    reporter: Reporter | None = None,
    **recipe: Unpack[RecipeKeywords],
) -> Manifest:
    """Convert a checkpoint to a quantized backbone and a LoRA adapter.

    Args:
        model: directory of a checkpoint (safetensors, pytorch_model.bin or Meta's), or a model on the Hub as `org/name`
            or `org/name@revision`; may come from `config`.
        output: directory to write; by default named after the model, in the working directory; may come from `config`.
        config: a YAML recipe; arguments given here override it.
        device: `auto`, `cpu`, `cuda` (all GPUs, as with `auto` if there are any), `cuda:1`.
        num_processes: workers that share the matrices; by default one for every GPU in use, or one on the CPU. If a
            launcher (`accelerate launch`, torchrun, mpirun, srun) has started several processes, they are the workers
            and share `output`, on one machine or on several; each returns the manifest.
        max_memory: resident memory to stay below, such as `"2GB"`; by default twice what the largest matrix needs.
        stream: read a model on the Hub by range requests and keep no copy of its weights.
        overwrite: replace a finished conversion, or discard the state of an unfinished one.
        push_to: `ORG/NAME` on the Hub to push the finished conversion to, as `push` does. May come from `config`.
        progress: show a bar, which is a widget in a notebook with ipywidgets, and a line of text elsewhere.
        reporter: receives progress events, instead of a bar; silent by default.
        **recipe: the fields of a recipe, with the names and defaults of the command line: see `loftq quantize --help`
            and `loftq_cli.Recipe`.

    Returns:
        The manifest of the finished directory, as written to `loftq.json`. A directory that is finished already, with
        the same recipe and source, is left as it is.

    Raises:
        UsageError: an argument is invalid, or the output directory is in use.
        LoftqError: the checkpoint cannot be converted; an unfinished output is kept, and the same call resumes it.
    """
    from loftq_cli.engine.workers.launcher import joined_world

    file = Path(config) if config else None
    asked, places = make_recipe({"model": model, **recipe}, file), read_places(file)
    job = _Job(
        asked,
        output=output or places.get("output"),
        push_to=push_to or places.get("push_to"),
        devices=choose_devices(device, num_processes),
        max_memory=None if max_memory is None else parse_size(max_memory),
        stream=stream,
        overwrite=overwrite,
        reporter=_reporter(progress, reporter),
    )
    with joined_world() as world:
        if world is not None and num_processes is not None:
            raise UsageError(
                "--num-processes cannot be used under a launcher, which has started the processes: drop it."
            )
        if world is not None and not world.main:
            return _follow(job, world)
        done = _convert(job, world)
    if job.push_to:
        _push(done.output, job.push_to)
    return done.manifest


def plan(
    model: str | Path | None = None,
    *,
    output: str | Path | None = None,
    config: str | Path | None = None,
    stream: bool = False,
    device: str = "auto",
    measuring: Callable[[int, int], None] = lambda done, total: None,
    **recipe: Unpack[RecipeKeywords],
) -> Plan:
    """Plan what `quantize` would do with the same arguments, from headers alone.

    Only the headers of a model on the Hub are fetched, with or without `stream`, unless its weights are pickles. If
    bits or ranks are allocated, every matrix is read once, and the cost of each choice is measured on `device`;
    `quantize` does not measure again.

    Args:
        measuring: called with the number of matrices measured so far and the number to measure.

    Raises:
        UsageError, LoftqError: as `quantize` would before it starts to convert.
    """
    from loftq_cli.calibration.calibrate import pin_calibration
    from loftq_cli.checkpoint import open_source
    from loftq_cli.engine.output.resume import foresee

    file = Path(config) if config else None
    asked = make_recipe({"model": model, **recipe}, file)
    with open_source(asked, stream=stream, weights=False) as (checkpoint, resolved):
        target = output or read_places(file).get("output")
        made = _plan(pin_calibration(resolved), checkpoint, target, choose_device(device), measuring)
        expected = foresee(made, checkpoint)
        return dataclasses.replace(made, notes=(*made.notes, expected)) if expected else made


@dataclass(frozen=True)
class _Job:
    """The arguments of `quantize`, with devices and sizes resolved.

    Attributes:
        output: as given; None for the default, which depends on the resolved model.
        max_memory: bytes for all workers of this machine together; None for twice what the largest matrix needs.
    """

    asked: Recipe
    output: str | Path | None
    push_to: str | None
    devices: tuple[torch.device, ...]
    max_memory: int | None
    stream: bool
    overwrite: bool
    reporter: Reporter

    def orders(self, recipe: Recipe, output: Path, world: World | None) -> list[Order]:
        return make_orders(recipe, output, self.devices, self.stream, self.max_memory, world)


@dataclass(frozen=True)
class _Done:
    """A finished directory and its manifest, which still holds the old path if the directory was moved."""

    output: Path
    manifest: Manifest


def _reporter(progress: bool, reporter: Reporter | None) -> Reporter:
    from loftq_cli.progress import Reporter
    from loftq_cli.progress.bar import BarReporter

    if progress and reporter is not None:
        raise UsageError("progress=True shows a bar of its own: leave it out, or leave out reporter.")
    return reporter or (BarReporter() if progress else Reporter())


def _convert(job: _Job, world: World | None) -> _Done:
    """Run the conversion as the main process."""
    from loftq_cli.calibration.calibrate import pin_calibration
    from loftq_cli.checkpoint import open_source
    from loftq_cli.engine.output.finished import find_finished, remove_leftovers

    _check_push(job.push_to)
    with open_source(job.asked, stream=job.stream) as (checkpoint, resolved):
        plan = _measured_plan(job, checkpoint, pin_calibration(resolved))
        orders = job.orders(plan.recipe, plan.output, world)
        finished = None if job.overwrite else find_finished(plan)
        if finished is not None:
            remove_leftovers(plan)
            job.reporter.note(f"{plan.output} is finished already, with the same recipe: nothing to convert.")
        if finished is not None and world is not None:
            world.announce(_NO_RUN)
        return _Done(plan.output, finished or _run(job, plan, checkpoint, orders, world))


def _measured_plan(job: _Job, checkpoint: Any, recipe: Recipe) -> Plan:
    """Return the plan; if the recipe allows NaN and infinity, every matrix is read first to find them."""
    from loftq_cli.engine.compute.finite import find_nonfinite

    nonfinite = None
    if recipe.allow_nonfinite:
        nonfinite = find_nonfinite(_unmixed_plan(recipe, checkpoint, job.output), checkpoint, job.reporter)
    return _plan(recipe, checkpoint, job.output, job.devices[0], job.reporter.measuring, nonfinite)


def _run(job: _Job, plan: Plan, checkpoint: Any, orders: list[Order], world: World | None) -> Manifest:
    from loftq_cli.calibration.calibrate import calibrated
    from loftq_cli.engine.run import run_plan

    return run_plan(
        calibrated(plan, checkpoint, job.devices[0], job.reporter),
        checkpoint,
        device=job.devices[0],
        reporter=job.reporter,
        overwrite=job.overwrite,
        max_memory=orders[0].max_memory,
        team=make_team(orders, world),
    )


def _follow(job: _Job, world: World) -> Manifest:
    """Do this process's share of a launcher's run, unless the main process finds the output finished."""
    from loftq_cli.artifacts.manifest import read_manifest
    from loftq_cli.engine.workers.worker import follow

    order = job.orders(job.asked, _output(job.asked, job.output), world)[0]
    run_id = world.receive()
    if run_id == _NO_RUN:
        return read_manifest(order.output)
    return follow(dataclasses.replace(order, run_id=run_id))


def _check_push(repo: str | None) -> None:
    """Refuse a push that would fail, before hours of work rather than after."""
    if repo:
        from loftq_cli.publishing.push import check_repo, require_login

        check_repo(repo)
        require_login()


def _push(output: Path, repo: str) -> None:
    from loftq_cli.errors import LoftqError
    from loftq_cli.publishing.push import push

    try:
        push(output, repo)
    except LoftqError as error:
        message = f"{output} is finished, but was not pushed: {error}"
        raise LoftqError(message, exit_code=error.exit_code) from error


def default_output(recipe: Recipe) -> Path:
    """Return `Llama-2-13b-loftq-2.5bit-r64`, or `Llama-2-13b-loftq-6GB-r64` with a target size."""
    name = real_path(user_path(recipe.model)).name
    size = f"{recipe.bits:g}bit" if recipe.target_size is None else recipe.target_size.replace(" ", "")
    return Path(f"{name}-{recipe.method}-{size}-r{recipe.rank_budget or recipe.rank:g}")


def _output(recipe: Recipe, output: str | Path | None) -> Path:
    path = real_path(user_path(output) if output else default_output(recipe))
    for flag, value in (("MODEL", recipe.model), ("-o", str(path))):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{flag} {value!r} is not valid UTF-8, which loftq.yaml and the card need: rename it."
            ) from None
    return path


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
    """Return the plan of a conversion before bits and ranks are allocated."""
    from loftq_cli._version import __version__
    from loftq_cli.planning.plan import make_plan

    return make_plan(recipe.unmixed(), checkpoint, _output(recipe, output), __version__)
