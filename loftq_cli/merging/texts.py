"""Write the small files of a merged model: config, manifest or record, and card."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.artifacts.manifest import UNSEALED, Manifest, render, seal
from loftq_cli.artifacts.plain_model import MERGE_RECORD
from loftq_cli.formats import get_container
from loftq_cli.machine.printable import json_text, markdown_cell
from loftq_cli.tensorfile.hashing import FileRecord

RECORD = MERGE_RECORD
CARD = "README.md"
FILES = "files"  # field of the record: the hashes of all other files


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge.

    Attributes:
        way: `dense`, `zeros`, `gguf` or `requantize`.
        dtype: of the model.
        fingerprint: of backbone, adapter and way together.
        errors: ‖merged - (Q + ΔW)‖_F / ‖Q + ΔW‖_F of every changed matrix, from rounding or requantizing.
        backbone_bytes: of all tensors of the result.
    """

    output: str
    way: str
    format: str
    dtype: str
    fingerprint: str
    source_fingerprint: str
    adapter_sha256: str
    errors: Mapping[str, float]
    backbone_bytes: int

    @property
    def mean_error(self) -> float:
        return sum(self.errors.values()) / len(self.errors) if self.errors else 0.0

    @property
    def worst_error(self) -> float:
        return max(self.errors.values(), default=0.0)


def fingerprint(manifest: Manifest, adapter_sha256: str, way: str, dtype: str) -> str:
    """Hash everything that a merge depends on."""
    return hashlib.sha256(json.dumps([manifest.fingerprint, adapter_sha256, way, dtype]).encode()).hexdigest()


def record_of(report: MergeReport, files: Mapping[str, FileRecord]) -> bytes:
    """Render `loftq_merge.json` with the hashes of the other files: `loftq verify` checks them, and a later
    merge knows them as ours."""
    hashes = {name: dataclasses.asdict(record) for name, record in files.items()}
    values = {**dataclasses.asdict(report), FILES: hashes, "digest": UNSEALED}
    return seal((json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())


def config_of(config: Mapping[str, Any], report: MergeReport) -> bytes:
    """Render config.json, without its quantization if the result is dense."""
    config = dict(config)
    if report.way in ("dense", "gguf"):
        config.pop("quantization_config", None)
        config["dtype"] = report.dtype
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def manifest_of(manifest: Manifest, report: MergeReport, files: Mapping[str, FileRecord]) -> bytes:
    """Render `loftq.json` of a merged model that is still quantized: no adapter, and residuals against Q + ΔW."""
    matrices = tuple(
        dataclasses.replace(
            record,
            rank=0,
            plain_residual=report.errors.get(record.module, 0.0),
            residual=report.errors.get(record.module, 0.0),
            residuals=(),
            best=0,
            adapter_bytes=0,
        )
        for record in manifest.matrices
    )
    mean = sum(record.residual for record in matrices) / len(matrices)
    totals = dataclasses.replace(manifest.totals, adapter_bytes=0, plain_residual=mean, residual=mean)
    merged = dataclasses.replace(
        manifest,
        fingerprint=report.fingerprint,
        output=report.output,
        totals=totals,
        notes=(*manifest.notes, f"an adapter was merged ({report.way}); residuals are against backbone + adapter."),
        files=files,
        matrices=matrices,
        kept=tuple(dataclasses.replace(record, rank=0) for record in manifest.kept),
    )
    return seal(render(merged))


def card_of(manifest: Manifest, report: MergeReport, architecture: str | None) -> bytes:
    """Render README.md; `architecture` is the class of the merged model."""
    how = {
        "dense": f"The adapter was added to the dequantized backbone; weights are {report.dtype}.",
        "zeros": "The QA-LoRA adapter was added to the groups' zeros; codes, scales and bits are the backbone's.",
        "gguf": "The QA-LoRA adapter was added to the groups' zeros, and both are float16 in this Q4_1 file.",
        "requantize": "The adapter was added to the dequantized backbone, and the sum quantized again on its grid.",
    }[report.way]
    runtime = "".join(f"{line}\n" for line in get_container(report.format).loading.before)
    option = ', gguf_file="model.gguf"' if report.way == "gguf" else ""
    name = architecture or ""
    auto_class = name if name.isidentifier() else "AutoModel"  # it becomes Python that readers run
    causal = name == manifest.architecture and manifest.task_type == "CAUSAL_LM"
    loader = "AutoModelForCausalLM" if causal else auto_class
    return f"""---
library_name: transformers
tags:
- loftq
---
# {markdown_cell(Path(report.output).name)}

{name if name.isidentifier() else "A model"} with its adapter merged by loftq (`{report.format}`). {how}

Relative error against backbone + adapter, {len(report.errors)} matrices: mean {report.mean_error:.2e}, worst
{report.worst_error:.2e} (`{RECORD}`).

```python
{runtime}from transformers import {loader}

model = {loader}.from_pretrained({json_text(report.output)}{option})
```
""".encode()
