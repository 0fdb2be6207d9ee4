"""`--calibrate`: compute the second moments of every linear layer's inputs on a text, and cache them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.machine.cache import cache_folder
from loftq_cli.machine.confined import real_path, user_path
from loftq_cli.machine.precision import full_precision
from loftq_cli.machine.sizes import size_text
from loftq_cli.recipe.model import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from loftq_cli.checkpoint import Checkpoint
    from loftq_cli.planning.plan import Plan
    from loftq_cli.progress import Reporter

_WHOLE = "{} cannot be run block by block, so calibration holds the whole model in memory in float32, {} of weights"


DEFAULT = "default"  # names the text that ships with loftq


def text_of(calibrate: str) -> str:
    """Return the path or the dataset that `--calibrate` names; `default` is the text that ships with loftq."""
    return str(Path(__file__).parent / "default" / "text.txt") if calibrate == DEFAULT else calibrate


def is_moments_file(path: str | Path) -> bool:
    """True if `--calibrate` names a file of second moments and not a text."""
    return Path(path).suffix == ".safetensors"


def pin_calibration(recipe: Recipe) -> Recipe:
    """Return the recipe with the hash of its calibration text, or of the file of second moments.

    Raises:
        UsageError, LoftqError: the file cannot be read, or is not the one that the recipe was made with.
    """
    if recipe.calibrate is None:
        return recipe
    path = user_path(text_of(recipe.calibrate))
    if is_moments_file(path):
        digest = _hash_of_moments(path, recipe)
    else:
        from loftq_cli.forward.text import read_text

        digest = read_text(path, "--calibrate").sha256
    if recipe.calibration_hash not in (None, digest):
        raise LoftqError(
            f"{path} is not what this recipe was calibrated on (sha256 {digest[:12]}…, not "
            f"{str(recipe.calibration_hash)[:12]}…): give that file, or drop calibration_hash from the recipe."
        )
    # A dataset on the Hub and our own text keep their names.
    place = str(real_path(path)) if path.exists() and recipe.calibrate != DEFAULT else recipe.calibrate
    return dataclasses.replace(recipe, calibrate=place, calibration_hash=digest)


def _hash_of_moments(path: Path, recipe: Recipe) -> str:
    from loftq_cli.calibration.moments import open_moments
    from loftq_cli.tensorfile.hashing import hash_file

    if not path.is_file():
        raise UsageError(f"--calibrate {path}: there is no such file or directory: check the path.")
    about = open_moments(path).about
    if recipe.calibrate_kind == "full" and about["kind"] == "diagonal":
        raise UsageError(f"--calibrate-kind full: {path} holds only diagonals; collect it again with that flag.")
    return hash_file(path).sha256


def calibrated(plan: Plan, checkpoint: Checkpoint, device: torch.device, reporter: Reporter) -> Plan:
    """Return the plan with its file of second moments, which is collected if it is not cached.

    Raises:
        LoftqError: the model does not run on text, or the text is too short.
    """
    from loftq_cli.machine.memory import free_memory

    recipe = plan.recipe
    if recipe.calibrate is None:
        return plan
    if is_moments_file(recipe.calibrate):
        file = Path(recipe.calibrate)
    else:
        file = moments_file(recipe, checkpoint)
        if not file.is_file():
            reporter.note(
                f"calibrating on {recipe.calibration_tokens} tokens of {_described(recipe.calibrate)}, block by block"
            )
            collect_moments(plan, checkpoint, device, file, reporter)
            free_memory(device)
    _check(plan, file)
    return dataclasses.replace(plan, moments=file)


def _described(calibrate: str) -> str:
    return "loftq's own text" if calibrate == DEFAULT else calibrate


def moments_again(recipe: Recipe, checkpoint: Checkpoint, device: torch.device) -> Path | None:
    """Return the second moments that a finished conversion was made with, collected again if they are not cached.

    Returns:
        None if the recipe has no calibration, or its text or file is not here any more.
    """
    from loftq_cli._version import __version__
    from loftq_cli.planning.plan import make_plan
    from loftq_cli.progress import Reporter

    if recipe.calibrate is None:
        return None
    try:
        pinned = pin_calibration(recipe)
    except (UsageError, LoftqError):
        return None
    if is_moments_file(str(pinned.calibrate)):
        return Path(str(pinned.calibrate))
    file = moments_file(pinned, checkpoint)
    if not file.is_file():
        plan = make_plan(pinned.unmixed(), checkpoint, checkpoint.path, __version__)
        collect_moments(plan, checkpoint, device, file, Reporter())
    return file


def known_moments(plan: Plan, checkpoint: Checkpoint) -> Plan:
    """Return the plan with its file of second moments, which another process has collected.

    Raises:
        LoftqError: the file does not exist.
    """
    recipe = plan.recipe
    if recipe.calibrate is None:
        return plan
    file = Path(recipe.calibrate) if is_moments_file(recipe.calibrate) else moments_file(recipe, checkpoint)
    if not file.is_file():
        raise LoftqError(
            f"{file}, which the main process calibrated, is not on this machine: set XDG_CACHE_HOME to a folder that "
            "all machines share."
        )
    return dataclasses.replace(plan, moments=file)


def moments_file(recipe: Recipe, checkpoint: Checkpoint) -> Path:
    """Return the path in the user's cache folder for the second moments of a source on a text."""
    from loftq_cli._version import __version__

    if recipe.revision is not None:
        source: list[object] = [recipe.model, recipe.revision]
    else:
        files = sorted({info.file for info in checkpoint.tensors.values()})
        stats = [(checkpoint.path / file).stat() for file in files]
        source = [str(checkpoint.path), *((f, s.st_size, s.st_mtime_ns) for f, s in zip(files, stats))]
    key = [
        __version__,
        source,
        recipe.calibration_hash,
        recipe.calibration_tokens,
        recipe.calibrate_kind,
        recipe.lm_head,
    ]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    return cache_folder() / "moments" / f"{name}.safetensors"


@full_precision()
def collect_moments(plan: Plan, checkpoint: Checkpoint, device: torch.device, file: Path, reporter: Reporter) -> None:
    """Run the source on the text and write the second moments of its linear layers' inputs."""
    from loftq_cli.calibration.collector import MomentCollector, write_moments
    from loftq_cli.forward.objectives import model_inputs
    from loftq_cli.forward.opening import open_model
    from loftq_cli.forward.text import make_windows, position_limit, read_text
    from loftq_cli.forward.weights import SourceWeights

    recipe = plan.recipe
    text = read_text(text_of(str(recipe.calibrate)), "--calibrate")
    tokenizer = source_tokenizer(checkpoint)
    model = open_model(checkpoint, device)
    if not model.blocks:
        weights = sum(p.numel() for p in model.model.parameters())
        reporter.note(_WHOLE.format(plan.modules.architecture, size_text(4 * weights)))
    limit = position_limit(model.model.config)
    windows = make_windows(text, tokenizer, positions=limit, max_tokens=recipe.calibration_tokens, window=None)
    batch = model_inputs(model.model, windows)
    layers = _layers(plan)
    head = any(not path.startswith(f"{model.model.base_model_prefix}.") for path in layers)
    with tempfile.TemporaryDirectory(prefix="loftq-moments-") as folder:
        collector = MomentCollector(model, layers, recipe.calibrate_kind, Path(folder))
        model.load(SourceWeights(checkpoint))
        count, size = len(windows.ids), model.group(*windows.ids.shape)
        for start in range(0, count, size):
            model.run({name: ids[start : start + size] for name, ids in batch.items()}, head=head)
        about = {
            "kind": recipe.calibrate_kind,
            "tokens": str(windows.ids.numel()),
            "text_sha256": text.sha256,
            "source_fingerprint": checkpoint.fingerprint,
        }
        write_moments(file, collector, about)


def _layers(plan: Plan) -> Sequence[str]:
    """Return every layer that some recipe for this source could quantize; the output head only if this recipe does."""
    quantized = {unit.module for unit in plan.matrices}
    return [
        role.module
        for role in plan.modules.roles
        if role.module
        and (not role.keep or role.module in quantized)
        and (role.kind in ("linear", "conv1d") or (role.kind == "head" and role.module in quantized))
    ]


def _check(plan: Plan, file: Path) -> None:
    """Check that the moments belong to this model's layers.

    Raises:
        LoftqError: a layer has another number of inputs, or the file covers no layer.
    """
    from safetensors import safe_open

    from loftq_cli.calibration.moments import open_moments

    moments = open_moments(file)
    known = 0
    with safe_open(file, framework="pt") as opened:
        for unit in plan.matrices:
            assert unit.matrix is not None
            if unit.matrix.module in moments.shared:
                width = opened.get_slice(moments.shared[unit.matrix.module]).get_shape()[0]
                if width != unit.matrix.in_features:
                    raise LoftqError(
                        f"{file} is of another model: {unit.matrix.module} takes {unit.matrix.in_features} inputs here "
                        f"and {width} there; calibrate on a text instead."
                    )
                known += 1
    if not known:
        raise LoftqError(f"{file} covers none of this model's matrices: calibrate on a text instead.")


def source_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a source, local or on the Hub."""
    from loftq_cli.forward.text import open_tokenizer

    with tempfile.TemporaryDirectory(prefix="loftq-tokenizer-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(checkpoint.config))
        for side in checkpoint.side_files():
            if "/" not in side.name and not side.name.endswith(".py"):
                with side.open() as source, open(Path(folder) / side.name, "wb") as copy:
                    shutil.copyfileobj(source, copy)
        return open_tokenizer(Path(folder), named=str(checkpoint.path))
