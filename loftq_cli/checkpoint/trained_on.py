"""Decide from their files if a trained adapter belongs to a conversion.

PEFT writes the metadata of an adapter's weights anew when it saves them, and drops fields of the config that it does
not know. What survives training is `auto_mapping` if the adapter has a task type, so new conversions keep their
fingerprint there; the base model's name as the starting adapter had it; and ranks, alphas and targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from loftq_cli.checkpoint.local import ADAPTER_CONFIG, read_json
from loftq_cli.errors import LoftqError
from loftq_cli.formats.adapter import CONFIG, FINGERPRINT, WEIGHTS
from loftq_cli.machine.confined import real_path, user_path

_MANIFEST = "loftq.json"
_PATTERNS = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Conversion:
    """Everything that tells a conversion from others.

    Attributes:
        name: the directory or the repository, for messages.
        fingerprint: None if its files hold none.
        folder: None if it is on the Hub.
        names: by which an adapter that was trained on it may call it.
        source: the model it was made from; "" if unknown.
        start: adapter_config.json of its starting adapter; empty if it has none.
    """

    name: str
    fingerprint: str | None
    folder: Path | None
    names: frozenset[str] = frozenset()
    source: str = ""
    start: Mapping[str, Any] = field(default_factory=dict)


def conversion_in(folder: Path) -> Conversion:
    """Describe the conversion, or any other model, in a directory.

    Raises:
        LoftqError: a file of it is damaged.
    """
    start = read_json(folder / CONFIG, "") if (folder / CONFIG).is_file() else {}
    manifest = read_json(folder / _MANIFEST, "") if (folder / _MANIFEST).is_file() else {}
    names = {start.get("base_model_name_or_path"), manifest.get("output"), str(folder), str(real_path(folder))}
    source = manifest.get("source")
    return Conversion(
        name=str(folder),
        fingerprint=_text(manifest.get("fingerprint")) or _fingerprint_of(folder),
        folder=folder,
        names=frozenset(name for name in names if isinstance(name, str)),
        source=source if isinstance(source, str) else "",
        start=start,
    )


def conversion_on_hub(repository: str, start: Mapping[str, Any]) -> Conversion:
    """Describe the conversion in a repository by the config of its starting adapter."""
    return Conversion(repository, _kept_fingerprint(start), None, frozenset({repository}), "", start)


def check_trained_on(conversion: Conversion, adapter: Path, *, force: bool = False) -> str | None:
    """Return a note if nothing tells which conversion an adapter was trained on, or None if all is well.

    Args:
        adapter: a folder that PEFT's `save_pretrained` wrote.
        force: return the reason for a refusal as a note.

    Raises:
        LoftqError: it was trained on another conversion, or a config is damaged.
    """
    found = _judge(conversion, adapter, read_json(adapter / ADAPTER_CONFIG, "PEFT's save_pretrained writes it"))
    said = f"the adapter in {adapter} was not trained on {conversion.name} ({found.other})" if found.other else None
    if said is None or force:
        return said or found.note
    raise LoftqError(f"{said}: give the adapter that was, or --force (force=True in Python) to go on.")


@dataclass(frozen=True)
class _Verdict:
    """`other`: what shows that the adapter was trained on another conversion; `note`: why nothing can be told."""

    other: str | None = None
    note: str | None = None


def _judge(conversion: Conversion, adapter: Path, config: Mapping[str, Any]) -> _Verdict:
    """Compare what survives training, the surest first."""
    theirs, ours = _adapter_fingerprint(adapter, config), conversion.fingerprint
    if theirs is not None and ours is not None:
        return _Verdict(None if theirs == ours else f"its fingerprint is {theirs[:12]}…, not {ours[:12]}…")
    base = _text(config.get("base_model_name_or_path"))
    if base in conversion.names:
        return _Verdict()
    if base is not None and base == conversion.source:
        return _Verdict(f"but on its source {base:.200}")
    folder = user_path(base or "")
    if base is None or not (folder / "config.json").is_file():
        # A relative path that led here from another place still ends in one of the names.
        alike = base is not None and Path(base).name in {Path(name).name for name in conversion.names}
        other = None if alike else _difference(conversion.start, config)
        named = f"names {base:.200} as its model, which is not here" if base else "names no model"
        note = f"the adapter in {adapter} {named}, so nothing tells if it was trained on {conversion.name}"
        return _Verdict(other, note)
    if conversion.folder is not None and folder.samefile(conversion.folder):
        return _Verdict()
    same = ours is not None and _fingerprint_in(folder) == ours
    return _Verdict(None if same else f"but on {base:.200}")


def _difference(start: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """Return how an adapter's config differs from the starting adapter's, or None."""
    if not start:
        return None
    for name in ("r", "lora_alpha", *_PATTERNS, "use_rslora", "use_qalora"):
        ours, theirs = start.get(name) or None, config.get(name) or None
        if ours != theirs:
            return f"{name} is {theirs!s:.60}, not {ours!s:.60}"
    for name in ("target_modules", "target_parameters"):
        if _listed(start.get(name)) != _listed(config.get(name)):
            return f"its {name} differ"
    return None


def _listed(value: object) -> object:
    """Return names without their order, which PEFT does not keep."""
    return frozenset(map(str, value)) if isinstance(value, list) else value or frozenset()


def _adapter_fingerprint(adapter: Path, config: Mapping[str, Any]) -> str | None:
    """Return the fingerprint of the conversion that an adapter names; a starting adapter has it in its weights too."""
    return _kept_fingerprint(config) or _in_metadata([adapter / Path(WEIGHTS).name])


def _kept_fingerprint(config: Mapping[str, Any]) -> str | None:
    kept = config.get("auto_mapping")
    return _text(kept.get(FINGERPRINT)) if isinstance(kept, Mapping) else None


def _fingerprint_in(folder: Path) -> str | None:
    """Return the fingerprint of a directory that an adapter names as its base; None for another or a damaged one."""
    try:
        return conversion_in(folder).fingerprint
    except LoftqError:
        return None


def _fingerprint_of(folder: Path) -> str | None:
    """Return the fingerprint in the metadata of the weights, for a directory that has lost its manifest."""
    return _in_metadata([folder / WEIGHTS, *sorted(folder.glob("*.safetensors"))[:1]])


def _in_metadata(files: Iterable[Path]) -> str | None:
    for file in files:
        if file.is_file():
            try:
                with safe_open(file, framework="pt") as opened:
                    found = _text((opened.metadata() or {}).get(FINGERPRINT))
            except (SafetensorError, OSError):
                continue  # what reads the weights reports the damage
            if found is not None:
                return found
    return None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
