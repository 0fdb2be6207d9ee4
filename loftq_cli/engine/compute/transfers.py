"""Tensors on their way to the device and back, beside the computing.

On CUDA three threads have a stream each: the reading thread copies in on one, the caller computes on its current one,
the writing thread copies out on another. Events order them; only the writing thread waits for its copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# torch keeps page-locked memory for the next time, in sizes of powers of two; larger tensors are few and go without.
_MOST_PINNED = 1 << 30


@dataclass(frozen=True)
class Staged:
    """A source tensor where it is computed from, or on its way there.

    Attributes:
        ready: when the copy is done; None where there is none under way.
        source: what is copied from, which has to stay until then.
    """

    tensor: Tensor
    ready: torch.cuda.Event | None = None
    source: Tensor | None = None


@dataclass(frozen=True)
class Leaving:
    """Output tensors by name, contiguous, and when they are computed; None: they are."""

    tensors: Mapping[str, Tensor]
    computed: torch.cuda.Event | None = None


class Transfers(Protocol):
    """The ways between host and device; each method belongs to one thread."""

    def stage(self, tensor: Tensor) -> Staged:
        """Reading thread: send a CPU tensor on its way. Where the device has no room for it now it stays here."""

    def arrive(self, staged: Staged) -> Tensor:
        """Computing thread: the tensor, for work on the current stream."""

    def leave(self, tensors: Mapping[str, Tensor]) -> Leaving:
        """Computing thread: outputs, some of which may be on the CPU, of work on the current stream.

        Raises:
            torch.OutOfMemoryError: a tensor has to be made contiguous, and there is no room.
        """

    def land(self, leaving: Leaving) -> dict[str, Tensor]:
        """Writing thread: the outputs on the CPU, complete."""


def transfers_of(device: torch.device) -> Transfers:
    """For work on this device."""
    return CudaTransfers(device) if device.type == "cuda" else DirectTransfers()


class DirectTransfers:
    """No ways, or none that overlap. A `Transfers`."""

    def stage(self, tensor: Tensor) -> Staged:
        return Staged(tensor)

    def arrive(self, staged: Staged) -> Tensor:
        return staged.tensor

    def leave(self, tensors: Mapping[str, Tensor]) -> Leaving:
        return Leaving(tensors)

    def land(self, leaving: Leaving) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in leaving.tensors.items()}


class CudaTransfers:
    """Page-locked memory and a stream for each direction. A `Transfers`."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._inward = torch.cuda.Stream(self._device)
        self._outward = torch.cuda.Stream(self._device)
        self._pins = True  # until the system refuses

    def stage(self, tensor: Tensor) -> Staged:
        with self._current(self._inward):
            room = self._page_locked(tensor)
            source = tensor if room is None else room.copy_(tensor)
            try:
                copy = source.to(self._device, non_blocking=True)
            except torch.OutOfMemoryError:
                return Staged(tensor)  # what is computed now may need the room; then it is this one's turn
            ready = torch.cuda.Event()
            ready.record(self._inward)
        return Staged(copy, ready, source)

    def arrive(self, staged: Staged) -> Tensor:
        if staged.ready is None:
            return staged.tensor
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(staged.ready)
        # It was allocated on the other stream, where its memory would be reused as soon as Python lets go of it.
        staged.tensor.record_stream(computing)
        return staged.tensor

    def leave(self, tensors: Mapping[str, Tensor]) -> Leaving:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        computed = torch.cuda.Event()
        computed.record(torch.cuda.current_stream(self._device))
        return Leaving(whole, computed)

    def land(self, leaving: Leaving) -> dict[str, Tensor]:
        with self._current(self._outward):
            if leaving.computed is not None:
                self._outward.wait_event(leaving.computed)
            landed = {name: self._fetch(tensor) for name, tensor in leaving.tensors.items()}
            copied = torch.cuda.Event(blocking=True)  # sleeps; a spinning thread would take a core from the others
            copied.record(self._outward)
        copied.synchronize()
        return landed

    def _current(self, stream: torch.cuda.Stream) -> torch.cuda.StreamContext:
        """A context in which work of this thread, of no other, goes to `stream`.

        The device stays the thread's current one: going back to GPU 0 would take memory there in every worker.
        """
        torch.cuda.set_device(self._device)
        return torch.cuda.stream(stream)

    def _fetch(self, tensor: Tensor) -> Tensor:
        """On the CPU once `_outward` gets there."""
        if not tensor.is_cuda:
            return tensor
        tensor.record_stream(self._outward)  # should the caller give up halfway
        room = self._page_locked(tensor)
        return tensor.cpu() if room is None else room.copy_(tensor, non_blocking=True)

    def _page_locked(self, tensor: Tensor) -> Tensor | None:
        """Room for it that the device copies from and to by itself, or None where there is none.

        torch does not hand out the memory again before the copies on record for it are done.
        """
        if self._pins and 0 < tensor.nbytes <= _MOST_PINNED:
            try:
                return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            except RuntimeError:  # a limit on locked memory, or none left
                self._pins = False
        return None
