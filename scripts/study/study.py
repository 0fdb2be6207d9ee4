"""Shared code of the studies: methods to compare, cached conversions, texts, records, tables and plots."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import loftq_cli
from loftq_cli.artifacts.decode import decode_matrix, decode_product
from loftq_cli.artifacts.manifest import Manifest, read_manifest
from loftq_cli.errors import LoftqError

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
from machine import describe_machine

RESULTS = Path(__file__).resolve().parent / "results"
COLOURS = ("#888888", "#b07aa1", "#4878a8", "#59a14f", "#1b6b2f", "#edc948", "#f28e2b", "#a84848")


@dataclass(frozen=True)
class Method:
    """One column of a study: its name and the recipe fields that make it."""

    name: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    calibrated: str = ""  # kind of second moments

    @property
    def key(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name)


METHODS = (
    Method("QLoRA", {"method": "qlora"}),
    Method("LoftQ T1", {"iters": 1}),
    Method("LoftQ T5", {"iters": 5}),
    Method("refined", {"method": "refined"}),
    Method("refined, fitted levels", {"method": "refined", "levels": "fitted"}),
    Method("LoftQ T5, full calibration", {"iters": 5}, "full"),
    Method("fitted levels, diagonal calibration", {"method": "refined", "levels": "fitted"}, "diagonal"),
    Method("fitted levels, full calibration", {"method": "refined", "levels": "fitted"}, "full"),
)


def chosen(names: Sequence[str] | None, default: Sequence[str] | None = None) -> list[Method]:
    """Methods by name, in the order above.

    Raises:
        SystemExit: there is no such method.
    """
    wanted = names or default or [method.name for method in METHODS]
    unknown = set(wanted) - {method.name for method in METHODS}
    if unknown:
        raise SystemExit(f"no method is called {sorted(unknown)}: {', '.join(method.name for method in METHODS)}")
    return [method for method in METHODS if method.name in wanted]


def converted(
    work: Path, model: Path, method: Method, bits: int, rank: int, calibrate: Path, tokens: int, seed: int = 0
):
    """Return directory and manifest of a method's `packed` conversion, made if it does not exist."""
    calibration = {"calibrate": calibrate, "calibrate_kind": method.calibrated, "calibration_tokens": tokens}
    name = f"{method.key}-{bits}-{rank}-{seed}" + (f"-{calibrate.stem}-{tokens}" if method.calibrated else "")
    recipe = {**method.recipe, **(calibration if method.calibrated else {})}
    out = work / name
    try:
        return out, read_manifest(out)
    except LoftqError:
        manifest = loftq_cli.quantize(
            model, output=out, bits=bits, rank=rank, format="packed", seed=seed, overwrite=True, **recipe
        )
        return out, manifest


def put_weights(model: torch.nn.Module, path: Path, manifest: Manifest) -> None:
    """Write Q + BA of every matrix into a dense model, in float32."""
    for record in manifest.matrices:
        weight = decode_matrix(path, manifest, record)
        if record.rank:
            weight = weight + decode_product(path, manifest, record)
        layer = model.get_submodule(record.module)
        layer.weight.data = (weight.T if record.kind == "conv1d" else weight).contiguous()


def windows(ids: Sequence[int], length: int, tokens: int) -> Tensor:
    """[windows, length] of the first `tokens` tokens."""
    count = min(len(ids), tokens) // length
    return torch.tensor(ids[: count * length]).reshape(count, length)


def python_reference() -> str:
    """The Python language reference as this interpreter ships it: English technical documentation."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def save(name: str, record: Mapping[str, Any], table: str) -> None:
    """results/NAME.json and NAME.md, with the machine."""
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": describe_machine(), **record}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    (RESULTS / f"{name}.md").write_text(table)
    print(table)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with numbers aligned to the right."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
