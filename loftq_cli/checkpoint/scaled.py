"""Weights stored as FP8, MXFP4 or packed integers with scales, presented as the weights that they encode.

FP8: `X` (F8_E4M3 or F8_E5M2) with `X_scale_inv` (DeepSeek-V3: one scale per 128 × 128 block) or `X_scale`
(compressed-tensors, fbgemm, modelopt: one per tensor, row or block); both multiply. MXFP4 (gpt-oss): `X_blocks`
[experts, out, groups, 16] uint8, two 4-bit floats a byte, and `X_scales` [experts, out, groups], exponents of two.
Integers: see `checkpoint.int_packed`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq_cli.checkpoint.base import Checkpoint, SideFile, TensorInfo
from loftq_cli.checkpoint.int_packed import (
    PACKED,
    IntPacked,
    dequantize_int,
    find_int_packed,
    int_scheme,
    unpacked_info,
)
from loftq_cli.errors import LoftqError

METHODS = frozenset({"fp8", "fbgemm_fp8", "mxfp8", "mxfp4", "compressed-tensors", "modelopt"})
_FP8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
_SCALES = ("_scale_inv", "_scale")
# Scales of activations and caches: they configure a runtime and are not part of a weight.
_RUNTIME = ("input_scale", "input_scale_ub", "activation_scale", "output_scale", "k_scale", "v_scale", "q_scale")
# OCP Microscaling Formats 1.0, E2M1: the sign is the highest of the four bits.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_CHUNK = 1 << 24  # elements held in float32 at a time


@dataclass(frozen=True)
class Scaled:
    """The two stored tensors of one weight; `block` is the FP8 block [rows, columns] from the config, if any."""

    values: str
    scales: str
    mxfp4: bool
    block: tuple[int, int] | None = None

    @property
    def stored(self) -> tuple[str, ...]:
        return self.values, self.scales


@dataclass(frozen=True)
class ScaledCheckpoint:
    """Implements `checkpoint.base.Checkpoint` around a source with scales."""

    inner: Checkpoint
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    scaled: Mapping[str, Scaled | IntPacked]

    @property
    def path(self) -> Path:
        return self.inner.path

    @property
    def fingerprint(self) -> str:
        return self.inner.fingerprint

    def read(self, name: str) -> Tensor:
        if name not in self.scaled:
            return self.inner.read(name)
        scaled = self.scaled[name]
        values, scales = self.inner.read(scaled.values), self.inner.read(scaled.scales)
        if isinstance(scaled, IntPacked):
            self._check_shape(name, scaled)
            others = (self.inner.read(other) if other else None for other in (scaled.zeros, scaled.groups))
            try:
                return dequantize_int(values, scales, scaled.scheme, *others)
            except ValueError as error:
                raise _damaged(self.inner.tensors[scaled.values], error) from error
        if scaled.mxfp4:
            return dequantize_mxfp4(values, scales)
        return dequantize_fp8(values, scales, scaled.block)

    def read_piece(self, name: str, index: int) -> Tensor:
        if name not in self.scaled:
            return self.inner.read_piece(name, index)
        scaled = self.scaled[name]
        if isinstance(scaled, IntPacked):
            return self.read(name)[index].clone()
        values = self.inner.read_piece(scaled.values, index)[None]
        if scaled.mxfp4:
            return dequantize_mxfp4(values, self.inner.read_piece(scaled.scales, index)[None])[0]
        shape = self.inner.tensors[scaled.scales].shape
        shared = prod(shape) == 1 or shape[0] == 1
        scales = self.inner.read(scaled.scales) if shared else self.inner.read_piece(scaled.scales, index)[None]
        return dequantize_fp8(values, scales, scaled.block)[0]

    def _check_shape(self, name: str, weight: IntPacked) -> None:
        """
        Raises:
            LoftqError: the stored shape is not the one that words and scales add up to.
        """
        if weight.shape is not None:
            stored = tuple(self.inner.read(weight.shape).tolist())
            if stored != self.tensors[name].shape:
                raise LoftqError(
                    f"{weight.shape} in {self.tensors[name].file} is {list(stored)}, but {weight.values} has the size "
                    f"of {list(self.tensors[name].shape)}: download it again."
                )

    def side_files(self) -> tuple[SideFile, ...]:
        return self.inner.side_files()

    def cancel(self) -> None:
        self.inner.cancel()

    def close(self) -> None:
        self.inner.close()


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the quantization settings in config.json or, for multimodal models, in one of its parts; None if there are
    none, {} if they are not a mapping."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for name in ("quantization_config", "compression_config"):
            if part.get(name) is not None:
                return part[name] if isinstance(part[name], Mapping) else {}
    return None


def with_scales(checkpoint: Checkpoint) -> Checkpoint:
    """Return `checkpoint` itself, or a view of it without scales if every quantized weight can be computed exactly.

    Raises:
        LoftqError: a weight and its scales do not fit together.
    """
    quantization = quantization_of(checkpoint.config)
    if quantization is not None and quantization.get("quant_method") not in METHODS:
        return checkpoint
    quantization = quantization or {}
    if quantization.get("transform_config"):  # weights were rotated before they were quantized
        return checkpoint
    scaled: dict[str, Scaled | IntPacked] = dict(_find_scaled(checkpoint.tensors, _block(quantization)))
    scaled |= find_int_packed(checkpoint.tensors, int_scheme(quantization))
    used = {name for pair in scaled.values() for name in pair.stored}
    rest = {
        name: info
        for name, info in checkpoint.tensors.items()
        if name not in used and not name.endswith(tuple(f".{suffix}" for suffix in _RUNTIME))
    }
    if not scaled or any(_is_packed(info, rest) for info in rest.values()):
        return checkpoint  # another kind of quantization, which the plan refuses by name
    computed = {name: _computed(name, pair, checkpoint.tensors) for name, pair in scaled.items()}
    place = {pair.values: name for name, pair in scaled.items()}
    tensors: dict[str, TensorInfo] = {}
    for name in checkpoint.tensors:
        if name in rest:
            tensors[name] = rest[name]
        elif name in place:
            tensors[place[name]] = computed[place[name]]
    return ScaledCheckpoint(checkpoint, tensors, _without_quantization(checkpoint.config), scaled)


def dequantize_fp8(values: Tensor, scales: Tensor, block: tuple[int, int] | None = None) -> Tensor:
    """Return values [..., out, in] × scales, computed in float32 and rounded once to bfloat16.

    Args:
        scales: a single one, or a grid with cells of size `block` (the last ones may be smaller); see `cells_of`.

    Raises:
        ValueError: the grid does not fit the values.
    """
    cells = cells_of(tuple(values.shape), tuple(scales.shape), block)
    rows, columns = values.shape[-2:]
    # Bytes are exponents of two, as in MX formats.
    grid = torch.exp2(scales.float() - 127) if scales.dtype is torch.uint8 else scales.float()
    grid = grid.reshape(cells.grid).expand(*values.shape[:-2], *cells.grid[-2:]).reshape(-1, *cells.grid[-2:])
    result = torch.empty(values.shape, dtype=torch.bfloat16)
    step = max(1, _CHUNK // max(1, columns))
    for matrix, factors, target in zip(values.reshape(-1, rows, columns), grid, result.view(-1, rows, columns)):
        for first in range(0, rows, step):
            chunk = matrix[first : first + step].float()
            factor = factors[torch.arange(first, first + len(chunk)) // cells.rows]
            if factor.shape[1] > 1:
                factor = factor.repeat_interleave(cells.columns, 1)[:, :columns]
            target[first : first + step] = chunk.mul_(factor)
    return result


@dataclass(frozen=True)
class Cells:
    """Layout of scales over a weight: `grid` is their shape with as many dimensions as the weight, and its last two
    dimensions count cells of `rows` × `columns` weights."""

    grid: tuple[int, ...]
    rows: int
    columns: int


def cells_of(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None) -> Cells:
    """Return the cells given by the config's block if it fits, or else by even division; missing last dimensions of
    `scales` are 1.

    Raises:
        ValueError: the scales do not fit the weight.
    """
    misfit = ValueError(f"scales {list(scales)} do not fit a weight {list(shape)}")
    grid = (1,) * len(shape) if prod(scales) == 1 else (*scales, *(1,) * (len(shape) - len(scales)))
    if len(shape) < 2 or len(grid) != len(shape) or any(n not in (1, size) for n, size in zip(grid[:-2], shape)):
        raise misfit
    sizes = []
    for axis in (-2, -1):
        if block is not None and -(-shape[axis] // block[axis]) == grid[axis]:
            sizes.append(block[axis])
        elif grid[axis] and shape[axis] % grid[axis] == 0:
            sizes.append(shape[axis] // grid[axis])
        else:
            raise misfit
    return Cells(grid, sizes[0], sizes[1])


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """[experts, out, groups, 16], [experts, out, groups] → bfloat16 [experts, in, out], the layout in transformers."""
    experts, rows, groups, width = blocks.shape
    table = torch.tensor(_E2M1)
    result = torch.empty(experts, groups * width * 2, rows, dtype=torch.bfloat16)
    for expert in range(experts):
        codes = torch.stack((blocks[expert] & 15, blocks[expert] >> 4), -1).reshape(rows, groups, 2 * width)
        values = torch.ldexp(table[codes.int()], scales[expert].int()[..., None] - 127)
        result[expert] = values.reshape(rows, -1).T
    return result


def _find_scaled(tensors: Mapping[str, TensorInfo], block: tuple[int, int] | None) -> dict[str, Scaled]:
    """Return the quantized weights by their names in the model."""
    found = {}
    for name, info in tensors.items():
        base = name.removesuffix("_blocks")
        if info.dtype is torch.uint8 and base != name and f"{base}_scales" in tensors:
            found[base] = Scaled(name, f"{base}_scales", mxfp4=True)
        elif info.dtype in _FP8:
            scales = next((name + suffix for suffix in _SCALES if name + suffix in tensors), None)
            if scales is not None:
                found[name] = Scaled(name, scales, mxfp4=False, block=block)
    return found


def _is_packed(info: TensorInfo, rest: Mapping[str, TensorInfo]) -> bool:
    """True for a tensor that is quantized in some other way: it has scales, or is FP8 without scales."""
    has_scales = any(info.name + suffix in rest for suffix in (*_SCALES, "_scales"))
    return info.dtype in _FP8 or has_scales or info.name.endswith((PACKED, "qweight", "zero_point"))


def _computed(name: str, pair: Scaled | IntPacked, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    values, scales = tensors[pair.values], tensors[pair.scales]
    shape = values.shape
    try:
        if isinstance(pair, IntPacked):
            return unpacked_info(name, pair, tensors)
        if pair.mxfp4:
            if len(shape) != 4 or scales.shape != shape[:3] or scales.dtype is not torch.uint8:
                raise ValueError(f"scales {list(scales.shape)} do not fit blocks {list(shape)}")
            shape = (shape[0], shape[2] * shape[3] * 2, shape[1])
        else:
            cells_of(shape, scales.shape, pair.block)
    except ValueError as error:
        raise _damaged(values, error) from error
    return dataclasses.replace(values, name=name, dtype=torch.bfloat16, shape=shape)


def _damaged(stored: TensorInfo, error: ValueError) -> LoftqError:
    return LoftqError(f"{stored.name} in {stored.file} cannot be dequantized ({error}): download it again.")


def _block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    block = quantization.get("weight_block_size")
    if isinstance(block, (list, tuple)) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block):
        return block[0], block[1]
    return None


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_quantization(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name not in ("quantization_config", "compression_config")
    }
