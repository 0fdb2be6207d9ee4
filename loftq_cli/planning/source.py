"""Stage 1 of a plan: find what to convert from the checkpoint's headers and config.json alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.checkpoint import Checkpoint, SideFile, pickled, safetensors
from loftq_cli.checkpoint.base import fingerprint, name_order
from loftq_cli.checkpoint.local import ADAPTER_CONFIG, adapter_base
from loftq_cli.checkpoint.quantized import quantization_method
from loftq_cli.checkpoint.remote.model import repository_files
from loftq_cli.checkpoint.side_files import left_behind
from loftq_cli.errors import LoftqError
from loftq_cli.modules.kept_maps import map_modules_once
from loftq_cli.modules.reasons import Reason, Why
from loftq_cli.modules.roles import ModuleMap, TensorRole
from loftq_cli.recipe.model import Recipe

_SHOWN = 5  # files named in a note
_PACKED = (".qweight", ".weight_packed", ".SCB", ".absmax", ".W_q")  # names that only quantized weights have


@dataclass(frozen=True)
class Source:
    """The model to convert.

    Attributes:
        modules: the role of every tensor; weights that a pickle stores twice appear once.
        fingerprint: of the model, the same for every kind of source.
        side_files: files copied beside the weights.
        notes: sentences for the user.
    """

    checkpoint: Checkpoint
    modules: ModuleMap
    fingerprint: str
    side_files: tuple[SideFile, ...]
    notes: tuple[str, ...]

    @property
    def tokenizer(self) -> Callable[[], bytes] | None:
        """Reads tokenizer.json; None if the source has none."""
        return next((file.read for file in self.side_files if file.name == "tokenizer.json"), None)


def read_source(recipe: Recipe, checkpoint: Checkpoint, modules: ModuleMap | None = None) -> Source:
    """Find every tensor's role and make sure that the checkpoint is complete; reads no weights.

    Args:
        modules: the result of `find_modules`, if known already.

    Raises:
        LoftqError: the checkpoint is quantized already, is damaged, does not match its config.json, or has no model
            class and the recipe does not choose matrices by name.
    """
    modules = modules or find_modules(checkpoint)
    _refuse_unknown(checkpoint, modules, recipe)
    _refuse_missing(checkpoint, modules)
    missing = [f"the checkpoint has no {name}: transformers will start it at random." for name in modules.missing]
    return Source(
        checkpoint=checkpoint,
        modules=modules,
        fingerprint=_fingerprint(checkpoint, modules),
        side_files=checkpoint.side_files(),
        notes=(*modules.notes, *missing, *_directory_notes(checkpoint)),
    )


def _directory_notes(checkpoint: Checkpoint) -> list[str]:
    """Return notes on files in the source's directory that transformers treats in another way, or that stay behind."""
    path, notes = checkpoint.path, []
    files = {info.file for info in checkpoint.tensors.values()}
    if adapter_base(path) is not None:
        notes.append(
            f"{ADAPTER_CONFIG} in {path} is a PEFT adapter, which transformers loads along: only the base model is "
            "converted; merge the adapter first to convert both."
        )
    for single in (safetensors.SINGLE, pickled.SINGLE):
        index = f"{single}.index.json"
        if single in files and (path / index).exists():
            notes.append(f"{index} is ignored, as transformers does, because {single} is there.")
    metas = any(file.endswith(".pth") for file in files)  # whose config and tokenizer are converted, not copied
    behind = [] if metas else left_behind(path, files, repository_files(path))
    if behind:
        more = f" and {len(behind) - _SHOWN} more" if len(behind) > _SHOWN else ""
        notes.append(f"not copied, because no class of transformers reads them: {', '.join(behind[:_SHOWN])}{more}.")
    return notes


def find_modules(checkpoint: Checkpoint) -> ModuleMap:
    """Return the role of every tensor of a checkpoint.

    Raises:
        LoftqError: it is quantized already, or does not match its config.json.
    """
    _refuse_quantized(checkpoint)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return _without_repeats(map_modules_once(checkpoint.config, shapes), checkpoint)


def _without_repeats(modules: ModuleMap, checkpoint: Checkpoint) -> ModuleMap:
    """Leave out tied weights that a pickle stores as a second view of the same memory, as safetensors files do. Sort
    the rest by name, so that the source's order does not matter."""
    first: dict[object, str] = {}
    tables = {role.tensor for role in modules.roles if role.tied}
    for name, info in checkpoint.tensors.items():
        place = (info.file, info.start, info.shape, info.dtype) if info.nbytes else name
        first[place] = name if name in tables else first.get(place, name)
    unique = set(first.values())
    roles = [role for role in modules.roles if role.tensor in unique or not _is_tied(role)]
    # A table that is stored a second time under the name it is tied to must stay equal to the first.
    if any(_is_tied(role) and role.kind in ("head", "embedding") for role in roles):
        roles = [dataclasses.replace(role, keep=Reason(Why.TIED, role.tied)) if role.tied else role for role in roles]
    return dataclasses.replace(modules, roles=tuple(sorted(roles, key=lambda role: name_order(role.tensor))))


def _is_tied(role: TensorRole) -> bool:
    return role.keep is not None and role.keep.why is Why.TIED


def _fingerprint(checkpoint: Checkpoint, modules: ModuleMap) -> str:
    """Return the checkpoint's own fingerprint, or that of the same model without repeated tensors."""
    used = {role.tensor: checkpoint.tensors[role.tensor] for role in modules.roles}
    return checkpoint.fingerprint if len(used) == len(checkpoint.tensors) else fingerprint(checkpoint.config, used)


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    """
    Raises:
        LoftqError: config.json or the names of the tensors say that the source is quantized already.
    """
    method = quantization_method(checkpoint)
    if method is None:
        if not any(name.endswith(_PACKED) for name in checkpoint.tensors):
            return
        method = "unknown method"
    name = checkpoint.config.get("_name_or_path")
    where = f", perhaps {name}" if name and Path(str(name)) != checkpoint.path else ""
    raise LoftqError(
        f"{checkpoint.path} is already quantized ({method}): give the full-precision model it was made from{where}."
    )


def _refuse_unknown(checkpoint: Checkpoint, modules: ModuleMap, recipe: Recipe) -> None:
    """
    Raises:
        LoftqError: there is no model class, and the user has not chosen matrices by name.
    """
    if modules.architecture is None and not recipe.include:
        raise LoftqError(
            f"{checkpoint.path}: {modules.unbuilt}; check config.json or upgrade transformers, or give --include '*' "
            "to choose matrices by name and shape."
        )


def _refuse_missing(checkpoint: Checkpoint, modules: ModuleMap) -> None:
    """Heads and poolers may be missing: transformers initializes them.

    Raises:
        LoftqError: a tensor of a numbered layer is missing.
    """
    lost = [name for name in modules.missing if re.search(r"\.\d+\.", name)]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise LoftqError(
            f"{checkpoint.path} lacks {lost[0]}{more}, which {modules.architecture} built from config.json has: finish "
            "the download, or check that config.json belongs to these weights."
        )
