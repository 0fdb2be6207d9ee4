"""Layers that store a packed weight and dequantize it when they run.

They are subclasses of `nn.Linear` and `nn.Embedding`, so PEFT wraps them in its ordinary LoRA layers and transformers
recognizes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loftq_cli.errors import LoftqError
from loftq_cli.numerics.grids.affine import AffineGrid
from loftq_cli.numerics.grids.blocks import BlockGrid
from loftq_cli.numerics.grids.grid import Grid
from loftq_cli.numerics.grids.packing import packed_width
from loftq_cli.numerics.grids.trellis import TrellisGrid, tiles_of_rows
from loftq_cli.runtime.codes import guard
from loftq_cli.runtime.decode import decode_rows

if TYPE_CHECKING:
    from typing_extensions import Self

LEVELS = "weight_levels"


class PackedWeight(nn.Module):
    """Base of both layers: the codes `weight`, their scales, and the grid they belong to.

    Attributes:
        codes_name: name of the parameter that holds the codes.
        weight: uint8 parameter [rows, packed_width(columns, bits)], frozen.
        weight_absmax: buffer [rows, blocks of a row] in the grid's scale dtype, whatever the model's is. Integer grids
            have `weight_scales` instead, and `weight_zeros` if they are asymmetric. A layer tied to another has none
            and uses the other's.
        weight_levels: buffer float32 [2**bits] if the codebook is `fitted`; shared like the scales.
        grid: levels, block size, dtypes.
        columns: the dense width.
    """

    # Without this flag transformers would initialize the module at random.
    _is_hf_initialized = True

    codes_name = "weight"
    grid: Grid
    columns: int

    def _init_storage(self, rows: int, columns: int, grid: Grid, device: torch.device | str | None) -> None:
        self.grid, self.columns = grid, columns
        # In a tuple, so that the other layer does not become a submodule of this one.
        self._scales_of: tuple[PackedWeight, ...] = ()
        codes = torch.zeros(rows, packed_width(columns, grid.bits), dtype=torch.uint8, device=device)
        self.register_parameter(self.codes_name, nn.Parameter(codes, requires_grad=False))
        self._scale_dtypes = scale_dtypes(grid)
        for name, dtype in self._scale_dtypes.items():
            shape = (2**grid.bits,) if name == LEVELS else (rows, grid.n_blocks(1, columns))
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
        if isinstance(grid, BlockGrid) and LEVELS in self._scale_dtypes:
            self._buffers[LEVELS] = grid.levels(device or "cpu")

    def use_scales_of(self, other: PackedWeight) -> None:
        """Tie this layer to `other`: transformers shares the codes between the two, this shares the scales."""
        self._scales_of = (other,)
        for name in self._scale_dtypes:
            self._buffers[name] = None

    @property
    def stored_codes(self) -> Tensor:
        """The parameter that holds the codes, without the guard."""
        codes: Any = self._parameters[self.codes_name]
        return codes

    def stored(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return codes, scales and, if the grid has them, zeros, on one device."""
        codes = self.stored_codes
        owner = self._scales_of[0] if self._scales_of else self
        found: list[Any] = [owner._buffers[name] for name in self._scale_dtypes if name != LEVELS]
        scales, zeros = [*(numbers.to(codes.device) for numbers in found), None][:2]
        return codes, scales, zeros

    def own_levels(self) -> Tensor | None:
        """Return the matrix's own levels, or None if they are the codebook's."""
        levels: Any = (self._scales_of[0] if self._scales_of else self)._buffers.get(LEVELS)
        return levels

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        return guard(value) if name == self.codes_name else value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the scales but never cast them: their dtype belongs to the stored data, not to the computation."""
        before = {name: self._buffers[name] for name in self._scale_dtypes}
        super()._apply(fn, recurse)
        for name, numbers in before.items():
            moved = self._buffers[name]
            if numbers is not None and moved is not None and moved.dtype != numbers.dtype:
                self._buffers[name] = numbers.to(moved.device)
        return self

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense [rows, columns], exactly as `PackedFormat.decode`, in the value dtype or cast to `dtype`."""
        with torch.no_grad():
            kind = dtype or self.grid.value_dtype
            return decode_rows(*self.stored(), self.grid, self.columns, kind, self.own_levels())

    def extra_repr(self) -> str:
        grid = self.grid
        kind = f"bits={grid.bits}, data_type={grid.data_type}, block_size={grid.block_size or self.columns}"
        return f"{super().extra_repr()}, {kind}"


def scale_dtypes(grid: Grid) -> dict[str, torch.dtype]:
    """Return the dtype of each buffer that is stored besides the codes, by name."""
    if isinstance(grid, TrellisGrid):
        return {"weight_absmax": grid.scale_dtype}
    if isinstance(grid, BlockGrid):
        assert grid.layout == "rows", "packed storage has blocks along rows"
        return {"weight_absmax": grid.scale_dtype, **({LEVELS: torch.float32} if grid.codebook.fitted else {})}
    assert isinstance(grid, AffineGrid) and grid.zero != "integer", "packed storage has offsets, no zero points"
    zeros = {"weight_zeros": grid.zero_dtype} if grid.zero == "float" else {}
    return {"weight_scales": grid.scale_dtype, **zeros}


class _PackedLinear(torch.autograd.Function):
    """y = x Q^T + b. Backward dequantizes again, so that no dense weight outlives the call."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
        layer: LoftqLinear,
    ) -> Tensor:
        ctx.save_for_backward(codes, scales, zeros)
        ctx.grid, ctx.columns, ctx.levels = layer.grid, layer.columns, layer.own_levels()
        return F.linear(x, decode_rows(codes, scales, zeros, layer.grid, layer.columns, x.dtype, ctx.levels), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, Tensor | None, None]:
        codes, scales, zeros = ctx.saved_tensors
        grad_x = grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        # The forward pass chose the dtype.
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                weight = decode_rows(codes, scales, zeros, ctx.grid, ctx.columns, grad.dtype, ctx.levels)
                grad_x = (rows @ weight).reshape(*grad.shape[:-1], ctx.columns)
            if ctx.needs_input_grad[4]:
                grad_bias = rows.sum(0)
        return grad_x, None, None, None, grad_bias, None


class LoftqLinear(PackedWeight, nn.Linear):
    """`nn.Linear` over packed codes: y = x Q^T + b, computed in the dtype of x (or of autocast).

    Gradients reach the input and the bias; the codes are frozen.

    Args:
        grid: a `rows` grid.
        dtype: of the bias.
        conv1d: the layer replaces a transformers `Conv1D` (GPT-2); codes are [out, in] in this case too.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        grid: Grid,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        conv1d: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.conv1d = in_features, out_features, conv1d
        self._init_storage(out_features, in_features, grid, device)
        zeros = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", zeros)

    def forward(self, x: Tensor) -> Tensor:
        """Any floating [..., in] -> the same dtype [..., out].

        Raises:
            LoftqError: x was cast to the dtype of the codes, as some models do with `x.to(layer.weight.dtype)`.
        """
        if not x.is_floating_point():
            raise LoftqError(
                f"a packed layer was given {x.dtype} activations, because this model casts them to its weight's "
                "dtype: convert it again with a `--rule` that skips this layer."
            )
        dtype, device = x.dtype, x.device.type
        if dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        bias = None if self.bias is None else self.bias.to(dtype)
        return _PackedLinear.apply(x.to(dtype), *self.stored(), bias, self)

    def dense(self, dtype: torch.dtype) -> nn.Linear | Conv1D:
        """Return the layer that this one replaces, with Q rounded to the value dtype and then cast to `dtype`."""
        weight = self.dequantized_weight(dtype)
        with torch.device("meta"):
            if self.conv1d:
                layer: nn.Linear | Conv1D = Conv1D(self.out_features, self.in_features)
            else:
                layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        layer.weight = nn.Parameter(weight.T.contiguous() if self.conv1d else weight)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=self.bias.requires_grad)
        return layer


class LoftqEmbedding(PackedWeight, nn.Embedding):
    """`nn.Embedding` over packed codes: only the requested rows are dequantized.

    Args:
        grid: a `rows` grid over the table [num_embeddings, embedding_dim].
        dtype: of the result; casting the module changes it, as for a dense table.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        grid: Grid,
        *,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        # PEFT reads these from the layer it wraps.
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.compute_dtype = dtype or torch.get_default_dtype()
        self._init_storage(num_embeddings, embedding_dim, grid, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, ids: Tensor) -> Tensor:
        """int [...] -> compute dtype [..., embedding_dim]."""
        flat = ids.reshape(-1)
        codes, scales, zeros = self.stored()
        places = None
        if isinstance(self.grid, TrellisGrid):  # a row is decoded together with the others of its tiles
            flat, places = tiles_of_rows(flat, self.num_embeddings)
        codes, scales = codes.index_select(0, flat), scales.index_select(0, flat)
        zeros = None if zeros is None else zeros.index_select(0, flat)
        rows = decode_rows(codes, scales, zeros, self.grid, self.columns, self.compute_dtype, self.own_levels())
        rows = rows if places is None else rows.index_select(0, places)
        return rows.reshape(*ids.shape, self.columns)

    def dense(self, dtype: torch.dtype) -> nn.Embedding:
        """Return an `nn.Embedding` with Q rounded to the value dtype and then cast to `dtype`."""
        shape = self.num_embeddings, self.embedding_dim
        layer = nn.Embedding(*shape, padding_idx=self.padding_idx, device="meta")
        layer.weight = nn.Parameter(self.dequantized_weight(dtype))
        return layer
