"""Render the model card: a description, the numbers, the exact command, and a loading snippet that a test runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from loftq_cli._version import REQUIREMENT
from loftq_cli.artifacts.manifest import Manifest
from loftq_cli.checkpoint.local import check_file
from loftq_cli.errors import LoftqError
from loftq_cli.formats import get_container
from loftq_cli.formats.loading import SnippetRequest
from loftq_cli.machine.printable import json_text, markdown_cell, printable
from loftq_cli.machine.sizes import size_text
from loftq_cli.modules.reasons import Why
from loftq_cli.planning.plan import Plan
from loftq_cli.recipe.model import Recipe, recipe_fields, recipe_specs

_WORST = 5
_LONGEST_CARD = 10_000_000
_LONGEST_FRONT = 50_000
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_METHODS = {"loftq": "LoftQ", "qlora": "QLoRA", "qa-lora": "QA-LoRA", "refined": "LoftQ (refined)", "ldlq": "LDLQ"}
_LICENCE = ("license", "license_name", "license_link")


def render_card(manifest: Manifest, plan: Plan) -> bytes:
    """Render README.md of an output directory. No measured number is longer than the one that its length is planned
    with."""
    totals = manifest.totals
    mix = f", {plan.recipe.mix} mix" if plan.recipe.mix else ""
    rows = [
        ("weights on disk", f"{size_text(totals.source_bytes)} → {size_text(totals.backbone_bytes)}"),
        ("adapter on disk", size_text(totals.adapter_bytes)),
        ("bits per quantized weight", f"{totals.bits_effective:.2f} effective, {totals.bits_stored:.2f} stored{mix}"),
        ("mean residual, plain quantization", _number(totals.plain_residual)),
        (f"mean residual, {manifest.recipe['method']}", _number(totals.residual)),
        *_calibration(manifest),
        ("matrices", f"{totals.matrices} quantized, {len(manifest.kept)} tensors in full precision"),
        ("time", f"{totals.seconds:.1f} s on {manifest.device}"),
        ("peak memory", size_text(totals.peak_memory_bytes)),
    ]
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    return f"""{_front_matter(manifest, plan)}
# {card_title(manifest)}

{_description(manifest)}

{_loading(manifest, plan)}

## Numbers

| | |
|---|---|
{table}

The residual is ‖W − Q − BA‖ / ‖W‖ in the Frobenius norm. The matrices with the largest residuals:

{_worst(manifest)}

{_nonfinite(plan)}Every matrix is listed in `loftq.json`.

## How it was made

```bash
{_command(plan)}
```

or, byte for byte, `loftq quantize --config loftq.yaml`, with {_versions(manifest)}.
""".encode()


def snippet(manifest: Manifest, plan: Plan) -> str:
    """Return Python that loads backbone and adapter with transformers and PEFT, ready to train."""
    path = json_text(str(plan.output))
    if _pooled_by_us(manifest):
        return f"import loftq_cli\n\npath = {path}\nmodel = loftq_cli.load(path, trainable=True)"
    auto_class, adapted = _auto_class(manifest), manifest.totals.adapter_bytes > 0
    request = SnippetRequest(auto_class, manifest.matrices[0].bits, manifest.dtype)
    loading = get_container(manifest.format).loading
    backbone = loading.snippet(request)
    wrapped = 'PeftModel.from_pretrained(backbone, path, subfolder="loftq_init", is_trainable=True)'
    lines = (
        *loading.before,
        *(["from peft import PeftModel"] if adapted else []),
        f"from transformers import {', '.join([auto_class, *backbone.names])}",
        "",
        f"path = {path}",
        *backbone.lines,
        f"model = {wrapped if adapted else 'backbone'}",
    )
    return "\n".join(lines)


def _calibration(manifest: Manifest) -> list[tuple[str, str]]:
    """Return the rows that describe the calibration and the weighted residuals."""
    recipe = manifest.recipe
    if recipe.get("calibrate") is None:
        return []
    weights = "variances" if recipe["calibrate_kind"] == "diagonal" else "covariances"
    pairs = [
        (record.weighted_plain_residual, record.weighted_residual)
        for record in manifest.matrices
        if record.weighted_plain_residual is not None and record.weighted_residual is not None
    ]
    plain, kept = (sum(values) / len(values) for values in zip(*pairs)) if pairs else (0.0, 0.0)
    return [
        (
            "calibrated on",
            f"input {weights} of {_text(recipe['calibrate'])}, sha256 {recipe['calibration_hash']}",
        ),
        ("mean weighted residual, plain quantization", _number(plain)),
        ("mean weighted residual, kept", _number(kept)),
    ]


def _text(calibrate: str) -> str:
    return "the text that ships with loftq" if calibrate == "default" else f"`{Path(calibrate).name}`"


def _pooled_by_us(manifest: Manifest) -> bool:
    """True if the adapter is QA-LoRA's and PEFT has no layer for it over this container."""
    own = not get_container(manifest.format).pooled_by_peft
    return manifest.pooling > 1 and own and manifest.totals.adapter_bytes > 0


def card_title(manifest: Manifest) -> str:
    """Return `Llama-2-13b, 2-bit LoftQ`: the model that was converted, the bits and the method."""
    source = Path(manifest.source)
    model = markdown_cell(Path(hub_id(source) or source).name)
    method = _METHODS.get(str(manifest.recipe.get("method")), "LoftQ")
    return f"{model}, {_widths(manifest)}-bit {method}"


def _widths(manifest: Manifest) -> str:
    return "/".join(str(bits) for bits in sorted({record.bits for record in manifest.matrices}))


def _description(manifest: Manifest) -> str:
    widths = _widths(manifest)
    ranks = sorted({record.rank for record in manifest.matrices if record.rank})
    shown = "/".join(str(rank) for rank in ranks) if len(ranks) < 4 else f"{ranks[0]} to {ranks[-1]}"
    kind = "QA-LoRA" if manifest.pooling > 1 else "LoRA"
    adapter = f" and a rank-{shown} {kind} adapter in `loftq_init/`" if ranks else ""
    start = (
        "The adapter starts at zero, as in QLoRA (arXiv 2305.14314)."
        if not any(record.best for record in manifest.matrices)
        else "Backbone plus adapter start close to the full-precision model (LoftQ, arXiv 2310.08659). LoRA scaling "
        f"is {manifest.scaling:g}; do not change `lora_alpha`."
    )
    if manifest.pooling > 1:
        start += (
            f" The adapter sees inputs pooled in groups of {manifest.pooling} (QA-LoRA, arXiv 2309.14717), so that "
            "`loftq merge` can add it to the groups' zeros."
        )
    text = f"A {widths}-bit backbone (`{manifest.format}`) of {_source(manifest)}{adapter}, made by loftq. {start}"
    loaded_experts = get_container(manifest.format).loaded_experts
    if loaded_experts and any(record.expert for record in manifest.matrices):
        text += f" The experts are {loaded_experts}"
    return text


def _source(manifest: Manifest) -> str:
    model = markdown_cell(manifest.architecture or "a checkpoint")
    if manifest.source_revision is None:
        return model
    return f"{markdown_cell(manifest.source)} ({model}, commit `{manifest.source_revision}`)"


def _loading(manifest: Manifest, plan: Plan) -> str:
    needs = (REQUIREMENT,) if _pooled_by_us(manifest) else get_container(manifest.format).needs
    return f"""## Load it

```bash
pip install {shlex.join(["transformers", *needs])}
```

```python
{snippet(manifest, plan)}
```

Or in one call, for any format: `loftq_cli.load({json_text(str(plan.output))}, trainable=True)`."""


def _auto_class(manifest: Manifest) -> str:
    """Return the Auto class of a common task, or else the checkpoint's own class."""
    if manifest.task_type == "CAUSAL_LM":
        return "AutoModelForCausalLM"
    if manifest.task_type == "SEQ_2_SEQ_LM":
        return "AutoModelForSeq2SeqLM"
    name = manifest.architecture or ""
    return name if name.isidentifier() else "AutoModel"  # it becomes Python that readers run


def _front_matter(manifest: Manifest, plan: Plan) -> str:
    lines = ["library_name: transformers", "tags:", "- loftq", "- quantized"]
    lines += ["- lora"] if manifest.totals.adapter_bytes else []
    if tag := get_container(manifest.format).tag:
        lines.append(f"- {tag}")
    base = plan.recipe.model if plan.recipe.revision else hub_id(plan.source)
    if base and _HUB_ID.fullmatch(base):  # a directory may have any name
        lines += [f"base_model: {base}", "base_model_relation: quantized"]
    lines += _licence(plan.source)
    return "---\n" + "\n".join(lines) + "\n---"


def source_name(plan: Plan) -> str:
    """Return MODEL as the user gave it: the id on the Hub, or the directory."""
    return plan.recipe.model if plan.recipe.revision else str(plan.source)


def hub_id(source: Path) -> str | None:
    """Return `org/name` if the source is in the Hub's cache (models--ORG--NAME/snapshots/REVISION), else None."""
    if source.parent.name != "snapshots" or not source.parent.parent.name.startswith("models--"):
        return None
    return source.parent.parent.name.removeprefix("models--").replace("--", "/")


def _licence(source: Path) -> list[str]:
    """Return the licence lines of the source's own card: the identifier, and the name and link that go with `other`."""
    import yaml

    try:
        path = source / "README.md"
        check_file(path)
        with open(path, "rb") as file:
            text = file.read(_LONGEST_CARD).decode(errors="ignore")
        front = yaml.safe_load(text.split("---")[1][:_LONGEST_FRONT]) if text.startswith("---") else {}
        found = {name: printable(front[name]) for name in _LICENCE if isinstance(front.get(name), str)}
        return yaml.safe_dump(found, sort_keys=False, allow_unicode=True).splitlines() if found else []
    except (OSError, ValueError, LoftqError, yaml.YAMLError, AttributeError, IndexError, TypeError, RecursionError):
        return []  # the licence is a courtesy: an odd card must not end a conversion


def _worst(manifest: Manifest) -> str:
    names = {record.module: markdown_cell(record.module) for record in manifest.matrices}
    # In the plan all residuals are equal, and the longest names must be the ones that are listed.
    ordered = sorted(manifest.matrices, key=lambda record: (-record.residual, -len(names[record.module].encode())))
    rows = [
        f"| {names[record.module]} | {_number(record.plain_residual)} | {_number(record.residual)} |"
        for record in ordered[:_WORST]
    ]
    return "\n".join(["| matrix | plain | kept |", "|---|---|---|", *rows])


def _nonfinite(plan: Plan) -> str:
    """Return a list of the matrices kept because they contain NaN or infinity (--allow-nonfinite)."""
    kept = [unit for unit in plan.kept if unit.reason and unit.reason.why is Why.NONFINITE]
    rows = "\n".join(f"- `{markdown_cell(unit.module or unit.tensor)}` {unit.reason}" for unit in kept)
    return f"Kept in full precision, because they contain NaN or infinity:\n\n{rows}\n\n" if kept else ""


def _command(plan: Plan) -> str:
    """Return the command with every flag that differs from its default."""
    words = ["loftq", "quantize", source_name(plan), "-o", str(plan.output)]
    others = Recipe("", method=plan.recipe.method, calibrate=plan.recipe.calibrate).as_dict()
    defaults = {**others, "method": recipe_fields()["method"], "calibrate": None}
    for name, value in plan.recipe.as_dict().items():
        if name in ("model", "calibration_hash") or value == defaults[name] or value in ([], None):
            continue
        if name == "rule" and plan.recipe.allocates:
            value = [text for text, rule in zip(value, plan.recipe.rules) if not rule.exact]  # not the allocation's
        flag, *opposite = recipe_specs()[name].flag.split("/")
        if isinstance(value, bool):
            words.append(flag if value else opposite[0])
        else:
            for item in value if isinstance(value, list) else [value]:
                words += [flag, str(item)]
    return printable(shlex.join(words))  # on one line, so that it cannot end its block


def _versions(manifest: Manifest) -> str:
    return ", ".join(f"{name} {version}" for name, version in manifest.versions.items())


def _number(value: float) -> str:
    """Return a residual with four decimals, or with fewer where it would take more than six characters."""
    text = f"{value:.4f}"
    return text if len(text) <= 6 else f"{value:.5g}" if value < 1e5 else f"{value:.0e}"
