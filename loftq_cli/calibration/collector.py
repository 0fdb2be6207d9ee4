"""Collect second moments of the inputs of linear layers while a model runs block by block."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from loftq_cli.calibration.moments import _FORMAT
from loftq_cli.errors import LoftqError
from loftq_cli.forward.streamed import StreamedModel
from loftq_cli.tensorfile.layout import lay_out
from loftq_cli.tensorfile.tensors import OutputTensor
from loftq_cli.tensorfile.writer import ShardWriter


class MomentCollector:
    """Sums x² or x xᵀ over the inputs of some modules; the sums of a block are written to disk when it is done.

    Modules that receive the same tensor, such as the projections of one attention layer, share one sum.

    Args:
        folder: holds the sums of finished blocks.
    """

    def __init__(self, model: StreamedModel, modules: Sequence[str], kind: str, folder: Path) -> None:
        self._kind, self._folder = kind, folder
        self._sums: dict[str, Tensor] = {}
        self._seen: list[tuple[str, Tensor]] = []
        self._stored: set[str] = set()
        self.counts: dict[str, int] = {}
        self.shared: dict[str, str] = {}
        for path in modules:
            layer = model.model.get_submodule(path)
            layer.register_forward_pre_hook(lambda _layer, args, path=path: self._add(path, args[0]))
        model.on_block_done = self._store

    def collect(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the second moments, float32 on the CPU, with the module that represents all that share them.

        Raises:
            LoftqError: a layer received NaN or infinity.
        """
        for path in sorted(self.counts):
            total = self._take(path)
            if not bool(total.isfinite().all()):
                raise LoftqError(
                    f"running the model on the text gives NaN or infinity before {path}, so errors cannot be weighted: "
                    "repair the checkpoint, or leave --calibrate out."
                )
            yield path, (total / self.counts[path]).float()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that `collect` yields."""
        files = {path: safe_open(self._file(path), "pt") for path in self._stored}
        shapes = {path: tuple(file.get_slice("sum").get_shape()) for path, file in files.items()}
        return shapes | {path: tuple(total.shape) for path, total in self._sums.items()}

    def _add(self, path: str, inputs: Tensor) -> None:
        if not inputs.numel():
            return  # an expert that received no token
        if any(path == other for other, _ in self._seen):
            self._seen.clear()  # the block's next piece has begun
        same = next((other for other, tensor in self._seen if tensor is inputs), path)
        self._seen.append((path, inputs))
        owner = self.shared.setdefault(path, self.shared.get(same, same))
        if owner != path:
            return
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        product = rows.T @ rows if self._kind == "full" else rows.square().sum(dim=0, dtype=torch.float64)
        if path in self._sums:
            self._sums[path] += product
        else:
            self._sums[path] = product
        self.counts[path] = self.counts.get(path, 0) + len(rows)

    def _store(self, block: str) -> None:
        """Add the sums of a finished block to those of earlier groups of windows."""
        self._seen.clear()
        for path in [path for path in self._sums if path.startswith(f"{block}.")]:
            total = self._take(path)
            save_file({"sum": total.contiguous()}, self._file(path))
            self._stored.add(path)

    def _take(self, path: str) -> Tensor:
        """Return the sum for a module and stop holding it."""
        total = self._sums.pop(path).cpu() if path in self._sums else None
        if path in self._stored:
            before = load_file(self._file(path))["sum"]
            total = before if total is None else total + before
        assert total is not None
        return total

    def _file(self, path: str) -> Path:
        return self._folder / f"{path}.safetensors"


def write_moments(file: Path, collector: MomentCollector, about: Mapping[str, str]) -> None:
    """Write one safetensors file, tensor by tensor under a temporary name, and rename it when it is complete.

    Args:
        about: further metadata.
    """
    shapes = collector.shapes()
    metadata = {"format": _FORMAT, "shared": json.dumps(collector.shared), **about}
    tensors = [OutputTensor(path, torch.float32, shape) for path, shape in shapes.items()]
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    layout = lay_out(temporary.name, tensors, metadata)
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(lambda name: file.with_name(name), (layout,))
    try:
        writer.prepare()
        for path, moment in collector.collect():
            writer.write({path: moment})
        writer.flush()
        os.replace(temporary, file)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
