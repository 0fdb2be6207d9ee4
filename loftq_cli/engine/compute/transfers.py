"""Copies of tensors to the device and back, overlapped with computing.

On CUDA three threads use a stream each: the reading thread uploads on one, the caller computes on its current one, the
writing thread downloads on another. Events order them; only the writing thread waits for its copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# torch caches page-locked memory in sizes of powers of two; larger tensors are few and are copied without it.
_MOST_PINNED = 1 << 30


@dataclass(frozen=True)
class Upload:
    """A source tensor that is on the device, or being copied there.

    Attributes:
        ready: recorded when the copy is done; None if nothing is being copied.
        source: the memory that is being copied, kept alive until then.
    """

    tensor: Tensor
    ready: torch.cuda.Event | None = None
    source: Tensor | None = None


@dataclass(frozen=True)
class PendingDownload:
    """Contiguous output tensors by name.

    Attributes:
        computed: recorded when they have been computed; None if they are complete already.
    """

    tensors: Mapping[str, Tensor]
    computed: torch.cuda.Event | None = None


class Transfers(Protocol):
    """Copies between host and device; each method is called by one thread only."""

    def start_upload(self, tensor: Tensor) -> Upload:
        """Reading thread: start copying a CPU tensor to the device; it stays on the CPU if the device is full."""

    def finish_upload(self, upload: Upload) -> Tensor:
        """Computing thread: return the tensor for work on the current stream."""

    def prepare_download(self, tensors: Mapping[str, Tensor]) -> PendingDownload:
        """Computing thread: prepare outputs of the current stream for download; some may be on the CPU.

        Raises:
            torch.OutOfMemoryError: a tensor must be made contiguous, and there is too little memory.
        """

    def download(self, pending: PendingDownload) -> dict[str, Tensor]:
        """Writing thread: return the outputs on the CPU, complete."""


def transfers_of(device: torch.device) -> Transfers:
    """Return the transfers for a device."""
    return CudaTransfers(device) if device.type == "cuda" else DirectTransfers()


class DirectTransfers:
    """Implements `Transfers` for the CPU, and for devices whose copies are not overlapped."""

    def start_upload(self, tensor: Tensor) -> Upload:
        return Upload(tensor)

    def finish_upload(self, upload: Upload) -> Tensor:
        return upload.tensor

    def prepare_download(self, tensors: Mapping[str, Tensor]) -> PendingDownload:
        return PendingDownload(tensors)

    def download(self, pending: PendingDownload) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in pending.tensors.items()}


class CudaTransfers:
    """Implements `Transfers` with page-locked memory and a stream for each direction."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._inward = torch.cuda.Stream(self._device)
        self._outward = torch.cuda.Stream(self._device)
        self._pins = True  # until page-locking fails

    def start_upload(self, tensor: Tensor) -> Upload:
        with self._current(self._inward):
            pinned = self._page_locked(tensor)
            source = tensor if pinned is None else pinned.copy_(tensor)
            try:
                copy = source.to(self._device, non_blocking=True)
            except torch.OutOfMemoryError:
                return Upload(tensor)  # retried by the caller when the current work has freed its memory
            ready = torch.cuda.Event()
            ready.record(self._inward)
        return Upload(copy, ready, source)

    def finish_upload(self, upload: Upload) -> Tensor:
        if upload.ready is None:
            return upload.tensor
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(upload.ready)
        # It was allocated on the upload stream, which would reuse its memory as soon as Python frees it.
        upload.tensor.record_stream(computing)
        return upload.tensor

    def prepare_download(self, tensors: Mapping[str, Tensor]) -> PendingDownload:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        computed = torch.cuda.Event()
        computed.record(torch.cuda.current_stream(self._device))
        return PendingDownload(whole, computed)

    def download(self, pending: PendingDownload) -> dict[str, Tensor]:
        with self._current(self._outward):
            if pending.computed is not None:
                self._outward.wait_event(pending.computed)
            outputs = {name: self._fetch(tensor) for name, tensor in pending.tensors.items()}
            copied = torch.cuda.Event(blocking=True)  # sleeps; a spinning thread would take a core from the others
            copied.record(self._outward)
        copied.synchronize()
        return outputs

    def _current(self, stream: torch.cuda.Stream) -> torch.cuda.StreamContext:
        """Return a context in which this thread's work goes to `stream`.

        The device stays current for the thread: switching back to GPU 0 would allocate memory there in every worker.
        """
        torch.cuda.set_device(self._device)
        return torch.cuda.stream(stream)

    def _fetch(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the CPU; complete when `_outward` has reached this point."""
        if not tensor.is_cuda:
            return tensor
        tensor.record_stream(self._outward)  # in case the caller stops before the copy is done
        pinned = self._page_locked(tensor)
        return tensor.cpu() if pinned is None else pinned.copy_(tensor, non_blocking=True)

    def _page_locked(self, tensor: Tensor) -> Tensor | None:
        """Return page-locked memory of the tensor's size, or None if there is none.

        torch does not reuse the memory before the copies recorded for it are done.
        """
        if self._pins and 0 < tensor.nbytes <= _MOST_PINNED:
            try:
                return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            except RuntimeError:  # the limit on locked memory is reached, or none is left
                self._pins = False
        return None
