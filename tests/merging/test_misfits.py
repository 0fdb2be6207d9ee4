"""A well-typed manifest that contradicts the weight files ends a merge, and `decode`, in one sentence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import loftq_cli
from loftq_cli.artifacts.manifest import NAME, render, seal
from loftq_cli.errors import LoftqError


@pytest.fixture(scope="module")
def backbone(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("backbone") / "out"
    loftq_cli.quantize(random_llama, output=out, bits=4, rank=2, iters=1, format="packed", include=("*.layers.0.*",))
    return out


def misfit(backbone: Path, **fields: Any) -> str:
    """Merge with a false first record; return the message."""
    manifest = loftq_cli.read_manifest(backbone)
    first = dataclasses.replace(manifest.matrices[0], **fields)
    content = (backbone / NAME).read_bytes()
    try:
        (backbone / NAME).write_bytes(
            seal(render(dataclasses.replace(manifest, matrices=(first, *manifest.matrices[1:]))))
        )
        with pytest.raises(LoftqError) as caught:
            loftq_cli.merge(backbone, backbone / "loftq_init", output=backbone.parent / "merged")
        if "module" not in fields:
            with pytest.raises(LoftqError, match="does not describe"):
                loftq_cli.decode(backbone, first.module)
    finally:
        (backbone / NAME).write_bytes(content)
    assert not (backbone.parent / "merged").exists() and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"block_size": 128},
        {"bits": 2},
        {"shape": (64, 128)},
        {"shape": (2**40, 2**22)},
        {"scale_dtype": "float16"},
    ],
    ids=str,
)
def test_a_record_that_contradicts_the_files(fields: dict[str, Any], backbone: Path) -> None:
    said = misfit(backbone, **fields)
    assert f"{backbone / NAME} does not describe model.layers.0." in said or "give the adapter of this model" in said


def test_a_record_of_a_matrix_that_is_not_there(backbone: Path) -> None:
    assert "which is not a matrix of" in misfit(backbone, module="nowhere")


def test_a_kept_tensor_that_is_not_there(backbone: Path) -> None:
    manifest, content = loftq_cli.read_manifest(backbone), (backbone / NAME).read_bytes()
    kept = (dataclasses.replace(manifest.kept[0], tensor="nowhere"), *manifest.kept[1:])
    try:
        (backbone / NAME).write_bytes(seal(render(dataclasses.replace(manifest, kept=kept))))
        with pytest.raises(LoftqError, match=r"loftq\.json lists the tensor 'nowhere', which the weight files do not"):
            loftq_cli.merge(backbone, backbone / "loftq_init", output=backbone.parent / "merged")
    finally:
        (backbone / NAME).write_bytes(content)
