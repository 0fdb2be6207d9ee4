"""Make the copy of a conversion that is pushed to the Hub.

Four small files name the conversion's location: the adapter's config, the card, the recipe and the manifest. They are
rewritten next to links to all other files, so that the directory itself does not change and the hashes in the pushed
manifest match the pushed files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.artifacts.card import hub_id
from loftq_cli.artifacts.manifest import NAME as MANIFEST
from loftq_cli.artifacts.manifest import Manifest, render, seal
from loftq_cli.tensorfile.hashing import FileRecord

ADAPTER_CONFIG = "loftq_init/adapter_config.json"
CARD = "README.md"
RECIPE = "loftq.yaml"
_TAG = "loftq"
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@dataclass(frozen=True)
class Destination:
    """Where readers will find a conversion.

    Attributes:
        revision: a branch, or None for the default one.
        base_model: the model on the Hub that was converted; None for the card's.
    """

    repo: str
    revision: str | None = None
    base_model: str | None = None

    @property
    def name(self) -> str:
        return self.repo.rpartition("/")[2]


def stage(directory: Path, manifest: Manifest, destination: Destination, folder: Path) -> dict[str, int]:
    """Fill the empty `folder` with the files to push, and return the size in bytes of each.

    Weights are symbolic links into `directory`, which is not changed.
    """
    texts = published_texts(directory, manifest, destination)
    for name in [*manifest.files, MANIFEST]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in texts:
            path.write_bytes(texts[name])
        else:
            path.symlink_to((directory / name).resolve())
    return {name: (folder / name).stat().st_size for name in [*manifest.files, MANIFEST]}


def published_texts(directory: Path, manifest: Manifest, destination: Destination) -> dict[str, bytes]:
    """Return the files whose content differs on the Hub, including the manifest with their hashes."""
    card = (directory / CARD).read_text(encoding="utf-8")
    base = destination.base_model or _front_matter(card).get("base_model")
    source = _published_source(manifest, base if isinstance(base, str) else None)
    texts = {
        CARD: _card(card, manifest, destination, source).encode(),
        RECIPE: _recipe((directory / RECIPE).read_text(encoding="utf-8"), source).encode(),
    }
    if ADAPTER_CONFIG in manifest.files:
        texts[ADAPTER_CONFIG] = _adapter_config(json.loads((directory / ADAPTER_CONFIG).read_bytes()), destination)
    hashes = {name: FileRecord(len(text), hashlib.sha256(text).hexdigest()) for name, text in texts.items()}
    published = dataclasses.replace(
        manifest,
        output=destination.repo,
        source=source,
        recipe={**manifest.recipe, "model": source},
        files={**manifest.files, **hashes},
    )
    return {**texts, MANIFEST: seal(render(published))}


def _published_source(manifest: Manifest, base_model: str | None) -> str:
    """Return MODEL without directories of the machine it was converted on."""
    if manifest.source_revision is not None:
        return manifest.source
    source = Path(manifest.source)
    return base_model or hub_id(source) or source.name


def _adapter_config(config: dict[str, Any], destination: Destination) -> bytes:
    config["base_model_name_or_path"] = destination.repo
    if destination.revision is not None:
        config["revision"] = destination.revision
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _recipe(text: str, source: str) -> str:
    import yaml

    values = {**yaml.safe_load(text), "model": source}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _card(text: str, manifest: Manifest, destination: Destination, source: str) -> str:
    """Replace the directory by the repository's id in the card's snippets, title, command and tags."""
    old, new = json.dumps(manifest.output, ensure_ascii=False), json.dumps(destination.repo)
    body = text[match.end() :] if (match := _FRONT_MATTER.match(text)) else text
    body = body.replace(old, new)
    if destination.revision is not None:
        body = _with_revision(body, json.dumps(destination.revision, ensure_ascii=False))
    body = body.replace(f"# {Path(manifest.output).name}\n", f"# {destination.name}\n", 1)
    body = body.replace(f" -o {shlex.quote(manifest.output)}", f" -o {shlex.quote(destination.name)}")
    body = body.replace(f"loftq quantize {shlex.quote(manifest.source)} ", f"loftq quantize {shlex.quote(source)} ")
    return f"---\n{_tags(_front_matter(text), destination)}---\n{body}"


def _with_revision(body: str, revision: str) -> str:
    """Add the branch to every loading call of the card."""
    body = re.sub(r"(\.from_pretrained\((?:backbone, )?path)", rf"\1, revision={revision}", body)
    return re.sub(r'(loftq_cli\.load\("[^"]*")', rf"\1, revision={revision}", body)


def _front_matter(card: str) -> dict[str, Any]:
    import yaml

    match = _FRONT_MATTER.match(card)
    values = yaml.safe_load(match[1]) if match else {}
    return values if isinstance(values, dict) else {}


def _tags(values: Mapping[str, Any], destination: Destination) -> str:
    import yaml

    values = dict(values)
    tags = values.get("tags") or []
    values["tags"] = tags if _TAG in tags else [*tags, _TAG]
    if destination.base_model is not None:
        values["base_model"] = destination.base_model
    if "base_model" in values:
        values["base_model_relation"] = "quantized"
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
