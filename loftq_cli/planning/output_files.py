"""Stage 4 of a plan: the output's files with the place of every tensor, and the text files that the plan determines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loftq_cli.errors import UsageError
from loftq_cli.formats import adapter, get_container, get_format
from loftq_cli.formats.adapter import AdapterTarget
from loftq_cli.formats.base import DTYPE_NAMES, Request
from loftq_cli.modules.orientation import orientation_of
from loftq_cli.modules.roles import ModuleMap
from loftq_cli.planning.build_units import WorkUnits
from loftq_cli.planning.choices import Choices
from loftq_cli.planning.source import Source
from loftq_cli.planning.units import Unit
from loftq_cli.recipe.model import Recipe, parse_size, write_yaml
from loftq_cli.tensorfile.layout import backbone_metadata, lay_out, lay_out_shards
from loftq_cli.tensorfile.tensors import TensorFile

INDEX = "model.safetensors.index.json"
_SCRATCH = "scratch.safetensors"


@dataclass(frozen=True)
class Layout:
    """The output's files.

    Attributes:
        fingerprint: of recipe and model; written into the metadata of the backbone and the adapter.
        files: the safetensors files; `texts`: every other file whose content is known now, by name.
        scratch: the file that is needed only during the conversion; None if there is none.
    """

    fingerprint: str
    files: tuple[TensorFile, ...]
    scratch: TensorFile | None
    texts: Mapping[str, bytes]


def lay_out_output(source: Source, choices: Choices, work: WorkUnits, output: Path, version: str) -> Layout:
    """Assign every byte of the output its place.

    Args:
        version: of loftq, which is part of the fingerprint.

    Raises:
        UsageError: for this container, transformers would build other modules than the checkpoint has.
    """
    units, recipe, request = work.units, choices.recipe, work.request
    identity = recipe.fingerprint(f"{version} {source.fingerprint}{_later_choices(source, units)}")
    files, scratch, index = lay_out_files(units, recipe, identity, request)
    config = source.checkpoint.config
    texts = output_texts(recipe, config, source.modules, units, request, choices.dtype, output, index, identity)
    return Layout(identity, files, scratch, texts)


def _later_choices(source: Source, units: Sequence[Unit]) -> str:
    """Return what tells the output from one of loftq 0.1 with the same recipe, which kept layers with needs: an
    unfinished one cannot be resumed."""
    quantized = {unit.source.name for unit in units if unit.matrix is not None}
    return " needs" if any(role.needs and role.tensor in quantized for role in source.modules.roles) else ""


def lay_out_files(
    units: Sequence[Unit], recipe: Recipe, fingerprint: str, request: Request
) -> tuple[tuple[TensorFile, ...], TensorFile | None, dict[str, str]]:
    """Return the files, the scratch file, and the index's tensor → shard map (empty for a single shard)."""
    metadata = backbone_metadata(fingerprint)
    matrices = [unit.matrix for unit in units if unit.matrix is not None]
    backbone = [tensor for unit in units for tensor in unit.backbone]
    container = get_format(recipe.format)
    adapter_files, scratch = _adapter_files(units, recipe, metadata, request)
    single = container.container(backbone, matrices, request, fingerprint)
    if single is not None:
        return (single, *adapter_files), scratch, {}
    sharded = lay_out_shards((unit.backbone for unit in units), parse_size(recipe.max_shard_size), metadata)
    return (*sharded.files, *adapter_files), scratch, dict(sharded.index)


def _adapter_files(
    units: Sequence[Unit], recipe: Recipe, metadata: Mapping[str, str], request: Request
) -> tuple[list[TensorFile], TensorFile | None]:
    """Return the files of adapters, and the scratch file."""
    adapters, apart = [], []
    for unit in units:
        if unit.target is None:
            continue
        joint = adapter.joint_b(unit.target)
        first, second = adapter.adapter_tensors(unit.target)
        adapters += [first, joint or second]
        apart += [second] if joint else []
    files = [lay_out(adapter.WEIGHTS, adapters, metadata)] if adapters else []
    copies = [tensor for unit in units for tensor in unit.copies]
    other = get_format(recipe.format).copies_container(copies, request, recipe.rank) if copies else None
    return files if other is None else [*files, other], lay_out(_SCRATCH, apart, metadata) if apart else None


def output_texts(
    recipe: Recipe,
    source_config: Mapping[str, Any],
    modules: ModuleMap,
    units: Sequence[Unit],
    request: Request,
    dtype: torch.dtype,
    output: Path,
    index: Mapping[str, str],
    fingerprint: str,
) -> dict[str, bytes]:
    """Return every file besides the weights whose content is known now, by name.

    Args:
        source_config: config.json of the source.
        index: from `lay_out_files`.
        fingerprint: of the conversion.

    Raises:
        UsageError: for this container, transformers would build other modules than the checkpoint has.
    """
    config = _config(recipe, source_config, modules, units, request, dtype)
    texts = {"config.json": _json(config), "loftq.yaml": write_yaml(recipe).encode()}
    if index:
        texts[INDEX] = index_text(sum(unit.backbone_bytes for unit in units), index)
    targets = [unit.target for unit in units if unit.target is not None]
    if targets:
        texts[adapter.CONFIG] = _json(_adapter_config(recipe, modules, targets, output, fingerprint))
    return texts


def _config(
    recipe: Recipe,
    source_config: Mapping[str, Any],
    modules: ModuleMap,
    units: Sequence[Unit],
    request: Request,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return the source's config.json with the dtype and the container's part."""
    matrices = [unit.matrix for unit in units if unit.matrix is not None]
    packed = {matrix.module for matrix in matrices}
    dense_linears = [module for module in modules.linear_modules if module not in packed]
    config = {key: value for key, value in source_config.items() if key not in ("torch_dtype", "_name_or_path")}
    config["dtype"] = DTYPE_NAMES[dtype]
    quantization = get_format(recipe.format).quantization_config(matrices, dense_linears, dtype, request)
    if quantization is None:
        return config
    if quantization["quant_method"] in modules.rebuilt_for:
        raise UsageError(
            f"transformers builds {modules.architecture} with other modules for {quantization['quant_method']} than "
            "this checkpoint has: choose --format packed or --format dense."
        )
    return {**config, "quantization_config": quantization}


def _adapter_config(
    recipe: Recipe, modules: ModuleMap, targets: Sequence[AdapterTarget], output: Path, fingerprint: str
) -> dict[str, Any]:
    """Return adapter_config.json.

    Raises:
        UsageError: PEFT would put adapters on other modules too.
    """
    config = adapter.adapter_config(
        targets,
        modules.modules or modules.linear_modules,
        scaling=recipe.scaling,
        task_type=modules.task_type,
        base_model=str(output),
        # Only a dense module keeps its [in, out] orientation at run time.
        fan_in_fan_out=get_container(recipe.format).keeps_conv1d
        and any(orientation_of(target.kind).transposed for target in targets),
        fingerprint=fingerprint,
    )
    if modules.splits_patterns and isinstance(config["target_modules"], str):
        raise UsageError(
            f"PEFT cannot adapt the chosen modules of {modules.architecture} alone, because others have paths that "
            "end like theirs: choose those too, or leave both out with --exclude."
        )
    return config


def index_text(size: int, index: Mapping[str, str]) -> bytes:
    """Return model.safetensors.index.json for `size` bytes of tensors and the shard of each."""
    return _json({"metadata": {"total_size": size}, "weight_map": index})


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
