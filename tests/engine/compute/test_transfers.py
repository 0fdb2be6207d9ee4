"""Copies that overlap with computing deliver the same bytes, in the order that the streams require."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.family_checkpoints import saved
from support.interruptions import tensors

import loftq_cli
from loftq_cli.engine.compute import pipeline
from loftq_cli.engine.compute.transfers import CudaTransfers, DirectTransfers, transfers_of

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
GPU = torch.device(
    "cuda", max(0, torch.cuda.device_count() - 1)
)  # the last one: nothing may depend on the current device


def test_nothing_is_copied_on_the_cpu() -> None:
    transfers, tensor = transfers_of(torch.device("cpu")), torch.randn(3, 4)
    assert isinstance(transfers, DirectTransfers)
    assert transfers.finish_upload(transfers.start_upload(tensor)) is tensor
    assert transfers.download(transfers.prepare_download({"x": tensor}))["x"] is tensor


def turned(x: torch.Tensor) -> torch.Tensor:
    """Not contiguous if there are two dimensions."""
    return x.mT if x.dim() > 1 else x


@needs_gpu
@pytest.mark.parametrize("pins", [True, False], ids=["page-locked", "pageable"])
def test_many_overlapping_copies_bring_the_right_bytes(pins: bool) -> None:
    """Compute on every tensor for a long time and drop it as early as allowed, while others come and go."""
    transfers = CudaTransfers(GPU)
    transfers._pins = pins
    sources = [torch.randn(1500, 1500, generator=torch.Generator().manual_seed(i)) for i in range(40)]
    sources += [torch.randn(70, 50).T, torch.empty(0, 4), torch.arange(7, dtype=torch.uint8)]
    landing = []
    with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:
        ahead = reading.submit(transfers.stage, sources[0])
        for i in range(len(sources)):
            upload = ahead.result()
            if i + 1 < len(sources):
                ahead = reading.submit(transfers.stage, sources[i + 1])
            here = transfers.finish_upload(upload)
            assert here.device == GPU
            with torch.cuda.device(GPU):
                torch.cuda._sleep(2_000_000)  # copies of others continue meanwhile
            outputs = {
                "twice": here * 2,
                "turned": here.mT if here.dim() > 1 else here.flip(0),
                "host": torch.tensor(float(i)),
            }
            landing.append(writing.submit(transfers.download, transfers.prepare_download(outputs)))
            del upload, here, outputs
        for i, landed in enumerate(landing):
            found = landed.result()
            assert all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in found.values())
            assert torch.equal(found["twice"], sources[i] * 2), i
            assert torch.equal(found["turned"], turned(sources[i])), i
            assert float(found["host"]) == i


@needs_gpu
def test_where_pinning_is_refused_copies_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers, empty = CudaTransfers(GPU), torch.empty

    def refuse(*args, pin_memory: bool = False, **options):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    tensor = torch.randn(100, 100)
    upload = transfers.start_upload(tensor)
    assert upload.source is tensor
    pending = transfers.prepare_download({"x": transfers.finish_upload(upload)})
    assert torch.equal(transfers.download(pending)["x"], tensor)


@needs_gpu
def test_a_tensor_that_does_not_fit_yet_stays_on_the_host() -> None:
    transfers = CudaTransfers(GPU)
    total = torch.cuda.get_device_properties(GPU).total_memory
    tensor = torch.empty(1, dtype=torch.uint8).expand(2 * total)
    upload = transfers.start_upload(tensor)
    assert upload.tensor is tensor and upload.ready is None


@needs_gpu
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_overlapped_equals_plain(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, recipe = saved(name).folder, {"bits": 2, "rank": 4, "iters": 2, "device": str(GPU)}
    cpu = loftq_cli.quantize(source, output=tmp_path / "cpu", **{**recipe, "device": "cpu"})
    manifest = loftq_cli.quantize(source, output=tmp_path / "overlapped", **recipe)
    monkeypatch.setattr(pipeline, "transfers_of", lambda device: DirectTransfers())
    loftq_cli.quantize(source, output=tmp_path / "plain", **recipe)
    assert tensors(tmp_path / "overlapped") == tensors(tmp_path / "plain")
    assert loftq_cli.verify(tmp_path / "overlapped", source=source).ok
    for one, other in zip(manifest.matrices, cpu.matrices):
        assert one.residual == pytest.approx(other.residual, rel=1e-3) and one.seconds >= 0
