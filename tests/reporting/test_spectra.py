"""Singular values are those of the written error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import loftq_cli
from loftq_cli.artifacts.decode import decode_matrix, decode_product
from loftq_cli.artifacts.manifest import read_manifest
from loftq_cli.artifacts.origin import opened_source
from loftq_cli.reporting.spectra import choose_records, measure_spectra, singular_values, spread


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (8, 8)])
def test_they_agree_with_an_svd(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(singular_values(matrix), torch.linalg.svdvals(matrix.double()), rtol=1e-6)


def test_they_are_those_of_the_files(random_llama: Path, tmp_path: Path) -> None:
    loftq_cli.quantize(random_llama, output=tmp_path / "out", bits=2, rank=4, iters=1)
    manifest = read_manifest(tmp_path / "out")
    with opened_source(manifest, None) as checkpoint:
        found = measure_spectra(tmp_path / "out", manifest, checkpoint, 2, lambda module: None)
        records = choose_records(manifest.matrices, 2)
        weights = [checkpoint.read(record.tensor).float() for record in records]
    assert [one.module for one in found] == [record.module for record in records]
    assert records[0].residual == max(record.residual for record in manifest.matrices)
    for one, record, weight in zip(found, records, weights):
        largest = torch.linalg.svdvals(weight)[0]
        error = weight - decode_matrix(tmp_path / "out", manifest, record)
        for values, matrix in (
            (one.backbone, error),
            (one.error, error - decode_product(tmp_path / "out", manifest, record)),
        ):
            expected = torch.linalg.svdvals(matrix)[[index - 1 for index in one.indices]] / largest
            assert torch.allclose(torch.tensor(values), expected, rtol=1e-2, atol=1e-5)


def test_few_points_of_long_spectra() -> None:
    assert spread(5) == (1, 2, 3, 4, 5)
    points = spread(4096)
    assert points[:4] == (1, 2, 3, 4) and points[-1] == 4096 and len(points) <= 80
