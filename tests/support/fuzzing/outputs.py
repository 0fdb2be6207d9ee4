"""Sound outputs of every container, trained adapters, and outputs of runs that stopped half-way; made once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import typer.testing
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.cli import app
from loftq_cli.progress import Reporter
from support.fuzzing.case import FLAGS
from support.fuzzing.sources import Sources

_CPU = ("--rank", "2", "--iters", "1", "--device", "cpu")
FINISHED: dict[str, tuple[str, ...]] = {
    "packed": FLAGS,
    "dense": (*FLAGS, "--format", "dense"),
    "bnb": (*_CPU, "--bits", "4", "--format", "bnb"),
    "gptq": (*_CPU, "--bits", "4", "--format", "gptq", "--group-size", "32"),
    "compressed-tensors": (*_CPU, "--bits", "4", "--format", "compressed-tensors", "--group-size", "32"),
    "gguf": (*_CPU, "--bits", "4", "--format", "gguf"),
    "qalora": (*_CPU, "--bits", "4", "--method", "qa-lora", "--group-size", "32"),
}
MERGEABLE = tuple(name for name in FINISHED if name not in ("gguf", "gptq", "compressed-tensors"))
SHARDS = ("--max-shard-size", "40KB")
_SHORT = {"bits": 2, "rank": 2, "iters": 1, "block_size": 32, "device": "cpu", "max_shard_size": "40KB"}


class Stop(Exception):
    """A run stops here."""


class Outputs:
    """Below `root`: `finished/NAME`, `adapters/NAME`, `half/STAGE`; `reference` has the hashes of a whole run."""

    def __init__(self, root: Path, sources: Sources) -> None:
        self.root, self.model = root, sources.root / "tiny"
        root.mkdir()
        for name, flags in FINISHED.items():
            _run("quantize", str(self.model), "-o", str(root / "finished" / name), *flags, "-q")
        for name in MERGEABLE:
            _train(root / "finished" / name / "loftq_init", root / "adapters" / name)
        _save_whole(root / "adapters" / "packed", self.model, root / "adapters" / "whole")
        _run("quantize", str(self.model), "-o", str(root / "whole"), *FLAGS, *SHARDS, "-q")
        self.reference = weight_hashes(root / "whole")
        self._stop_half_way()
        _run("merge", *map(str, self.merge_words("packed")), "-o", str(root / "merged"), "-q")

    def merge_words(self, name: str) -> tuple[Path, Path]:
        return self.root / "finished" / name, self.root / "adapters" / name

    def _stop_half_way(self) -> None:
        """Stop a conversion after three units, after all of them, and between two moves of finished files."""
        half = self.root / "half"
        for stage, reporter in (("units", _StopAfter(3)), ("all units", _StopAtEnd())):
            with contextlib.suppress(Stop):
                loftq_cli.quantize(self.model, output=half / stage, reporter=reporter, **_SHORT)  # type: ignore[arg-type]
        with _stopping_moves(2), contextlib.suppress(Stop):
            loftq_cli.quantize(self.model, output=half / "publishing", **_SHORT)  # type: ignore[arg-type]
        with _stopping_moves(2), contextlib.suppress(Stop):
            loftq_cli.merge(*self.merge_words("packed"), output=half / "merge")
        for stage in ("units", "all units", "publishing", "merge"):
            assert (half / stage / ".loftq").is_dir() and not (half / stage / "config.json").exists(), stage


class _StopAfter(Reporter):
    def __init__(self, units: int) -> None:
        self.left = units

    def done(self, unit: Any, record: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stop


class _StopAtEnd(Reporter):
    def finishing(self, step: str) -> None:
        raise Stop


@contextlib.contextmanager
def _stopping_moves(count: int) -> Iterator[None]:
    """Let the next `count` files be moved to their final places, and no other."""
    from loftq_cli.machine.confined import ConfinedFolder

    real: Callable[..., None] = ConfinedFolder.replace
    left = [count]

    def replace(folder: Any, source: str, target: str) -> None:
        if source.startswith(".loftq/partial/"):
            left[0] -= 1
            if left[0] < 0:
                raise Stop
        real(folder, source, target)

    with mock.patch.object(ConfinedFolder, "replace", replace):
        yield


def _run(*words: str) -> None:
    result = typer.testing.CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, (words, result.output, result.exception)


def _train(start: Path, target: Path) -> None:
    """Copy an adapter with other factors B."""
    shutil.copytree(start, target)
    tensors = load_file(target / "adapter_model.safetensors")
    torch.manual_seed(1)
    changed = {name: t + 0.01 * torch.randn_like(t) if "lora_B" in name else t for name, t in tensors.items()}
    save_file(changed, target / "adapter_model.safetensors", metadata={"format": "pt"})


def _save_whole(start: Path, model: Path, target: Path) -> None:
    """Copy an adapter and let it hold a norm as a whole, and two rows of the embedding."""
    shutil.copytree(start, target)
    weights, source = load_file(target / "adapter_model.safetensors"), load_file(model / "model.safetensors")
    weights["base_model.model.model.norm.weight"] = source["model.norm.weight"] * 1.5
    rows = source["model.embed_tokens.weight"][:2] + 1
    weights["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = rows
    save_file(weights, target / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "adapter_config.json").read_text())
    config |= {"modules_to_save": ["norm"], "trainable_token_indices": [3, 5]}
    (target / "adapter_config.json").write_text(json.dumps(config))


def weight_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every weight file below a folder, by its path in it."""
    paths = [Path(place) / name for place, _, names in os.walk(folder) for name in names]
    weights = [path for path in paths if path.suffix in (".safetensors", ".gguf") and path.is_file()]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(weights)
    }
