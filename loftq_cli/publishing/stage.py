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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.artifacts.card import card_title, hub_id
from loftq_cli.artifacts.manifest import NAME as MANIFEST
from loftq_cli.artifacts.manifest import Manifest, render, seal
from loftq_cli.checkpoint.local import check_file
from loftq_cli.errors import LoftqError
from loftq_cli.machine.confined import ConfinedFolder, real_path
from loftq_cli.tensorfile.hashing import FileRecord

ADAPTER_CONFIG = "loftq_init/adapter_config.json"
CARD = "README.md"
RECIPE = "loftq.yaml"
_TAG = "loftq"
_LONGEST_TEXT = 50_000_000
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
    staged, sizes = ConfinedFolder(folder), {}
    for name in [*manifest.files, MANIFEST]:
        if name in texts:
            with staged.write(name) as file:
                file.write(texts[name])
            sizes[name] = len(texts[name])
        else:
            source = _own_file(directory, name)
            staged.make_parents(name)
            staged.path(name).symlink_to(source)
            sizes[name] = source.stat().st_size
    return sizes


def _own_file(directory: Path, name: str) -> Path:
    """Return the real path of a file of the conversion.

    Raises:
        LoftqError: it is missing, or a link leads out of the directory, so that a foreign file would be published.
            Links of the Hub's cache are followed.
    """
    parent, _, leaf = name.rpartition("/")
    try:
        path = (ConfinedFolder(directory).path(parent) if parent else directory) / leaf
        check_file(path)
        return real_path(path)
    except OSError as error:
        raise LoftqError(f"{directory / name} is missing ({error.strerror}): convert the model again.") from error


def _read_text(directory: Path, name: str) -> str:
    """Read one of the small text files.

    Raises:
        LoftqError: it is missing, too long or not text.
    """
    path = _own_file(directory, name)
    with open(path, "rb") as file:
        content = file.read(_LONGEST_TEXT + 1)
    try:
        if len(content) > _LONGEST_TEXT:
            raise ValueError(f"it is longer than {_LONGEST_TEXT} bytes")
        return content.decode()
    except ValueError as error:
        raise LoftqError(f"{directory / name} cannot be published ({error}): convert the model again.") from error


def _parse(directory: Path, name: str, text: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Return the object that a JSON or YAML text holds.

    Raises:
        LoftqError: it is damaged or not an object.
    """
    import yaml

    try:
        values = parse(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LoftqError(f"{directory / name} is damaged ({reason}): convert the model again.") from error
    if not isinstance(values, dict):
        raise LoftqError(f"{directory / name} is damaged (it is not an object): convert the model again.")
    return values


def published_texts(directory: Path, manifest: Manifest, destination: Destination) -> dict[str, bytes]:
    """Return the files whose content differs on the Hub, including the manifest with their hashes."""
    import yaml

    found = {name: _read_text(directory, name) for name in (CARD, RECIPE, ADAPTER_CONFIG) if name in manifest.files}
    front = _parse(directory, CARD, _front_matter(found.get(CARD, "")), lambda text: yaml.safe_load(text) or {})
    base = destination.base_model or front.get("base_model")
    source = _published_source(manifest, base if isinstance(base, str) else None)
    texts = {}
    if CARD in found:
        texts[CARD] = _card(found[CARD], front, manifest, destination, source).encode()
    if RECIPE in found:  # a merged model has none
        texts[RECIPE] = _recipe(_parse(directory, RECIPE, found[RECIPE], yaml.safe_load), source).encode()
    if ADAPTER_CONFIG in found:
        config = _parse(directory, ADAPTER_CONFIG, found[ADAPTER_CONFIG], json.loads)
        texts[ADAPTER_CONFIG] = _adapter_config(config, destination)
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


def _recipe(values: Mapping[str, Any], source: str) -> str:
    import yaml

    return yaml.safe_dump({**values, "model": source}, sort_keys=False, allow_unicode=True)


def _card(text: str, front: Mapping[str, Any], manifest: Manifest, destination: Destination, source: str) -> str:
    """Replace the directory by the repository's id in the card's snippets, title, command and tags."""
    old, new = json.dumps(manifest.output, ensure_ascii=False), json.dumps(destination.repo)
    body = text[match.end() :] if (match := _FRONT_MATTER.match(text)) else text
    body = body.replace(old, new)
    if destination.revision is not None:
        body = _with_revision(body, json.dumps(destination.revision, ensure_ascii=False))
    for title in (card_title(manifest), Path(manifest.output).name):  # the second in a merged model, and in loftq 0.1
        body = body.replace(f"# {title}\n", f"# {destination.name}\n", 1)
    body = body.replace(f" -o {shlex.quote(manifest.output)}", f" -o {shlex.quote(destination.name)}")
    body = body.replace(f"loftq quantize {shlex.quote(manifest.source)} ", f"loftq quantize {shlex.quote(source)} ")
    return f"---\n{_tags(front, destination)}---\n{body}"


def _with_revision(body: str, revision: str) -> str:
    """Add the branch to every loading call of the card."""
    body = re.sub(r"(\.from_pretrained\((?:backbone, )?path)", rf"\1, revision={revision}", body)
    return re.sub(r'(loftq_cli\.load\("[^"]*")', rf"\1, revision={revision}", body)


def _front_matter(card: str) -> str:
    match = _FRONT_MATTER.match(card)
    return match[1] if match else ""


def _tags(values: Mapping[str, Any], destination: Destination) -> str:
    import yaml

    values = dict(values)
    tags = values.get("tags")
    tags = tags if isinstance(tags, list) else []
    values["tags"] = tags if _TAG in tags else [*tags, _TAG]
    if destination.base_model is not None:
        values["base_model"] = destination.base_model
    if "base_model" in values:
        values["base_model_relation"] = "quantized"
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
