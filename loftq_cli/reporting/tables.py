"""The tables of the page: recipe, origin, versions, hashes and notes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from loftq_cli.artifacts.manifest import Manifest
from loftq_cli.machine.sizes import size_text
from loftq_cli.recipe.model import recipe_fields
from loftq_cli.reporting.data import Conversion
from loftq_cli.reporting.sections import Section
from loftq_cli.reporting.text import breakable, shown, table

_ITEMS = 12  # of a list such as the rules of an allocation, which has one for every matrix
_SHOWN_BELOW = ("model", "revision")
_OPEN_FILES = 12
_MOST_FILES = 500


def tables(conversions: Sequence[Conversion]) -> tuple[Section, ...]:
    """Return the sections of text, with one column for each conversion."""
    found = [
        Section("Recipe", "Fields that differ from their defaults or from each other.", whole=_recipes(conversions)),
        Section("Origin and versions", "", whole=_origins(conversions)),
        Section("Files and hashes", "", cards=tuple(_files(item.manifest) for item in conversions)),
    ]
    if any(item.manifest.notes for item in conversions):
        found.append(Section("Notes", "", cards=tuple(_notes(item.manifest) for item in conversions)))
    return tuple(found)


def _recipes(conversions: Sequence[Conversion]) -> str:
    defaults = recipe_fields()
    recipes = [item.manifest.recipe for item in conversions]
    fields = [
        name
        for name in defaults
        if name not in _SHOWN_BELOW
        and any(recipe.get(name, defaults[name]) not in (defaults[name], _listed(defaults[name])) for recipe in recipes)
    ]
    return _joint(
        conversions, [(name, [_value(recipe.get(name, defaults[name])) for recipe in recipes]) for name in fields]
    )


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        more = f", and {len(value) - _ITEMS} more" if len(value) > _ITEMS else ""
        return (", ".join(map(str, value[:_ITEMS])) + more) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else str(value)


def _origins(conversions: Sequence[Conversion]) -> str:
    facts: Mapping[str, Callable[[Manifest], str]] = {
        "model": lambda manifest: manifest.source,
        "revision": lambda manifest: manifest.source_revision or "",
        "architecture": lambda manifest: manifest.architecture or "",
        "format": lambda manifest: f"{manifest.format}, {manifest.dtype}",
        "fingerprint": lambda manifest: manifest.fingerprint,
        "source fingerprint": lambda manifest: manifest.source_fingerprint,
        "digest of loftq.json": lambda manifest: manifest.digest,
    }
    manifests = [item.manifest for item in conversions]
    rows = [(name, [fact(manifest) for manifest in manifests]) for name, fact in facts.items()]
    packages = dict.fromkeys(name for manifest in manifests for name in manifest.versions)
    rows += [(name, [manifest.versions.get(name, "") for manifest in manifests]) for name in packages]
    return _joint(conversions, [(name, values) for name, values in rows if any(values)])


def _joint(conversions: Sequence[Conversion], rows: Sequence[tuple[str, list[str]]]) -> str:
    """Return one table for all conversions; names of rows that differ have a mark."""
    header = ["", *(shown(item.name) for item in conversions)] if len(conversions) > 1 else []
    cells = [
        [shown(name) + (" ≠" if len(set(values)) > 1 else ""), *(_cell(value) for value in values)]
        for name, values in rows
    ]
    return f'<div class="card">{table(header, cells, "values")}</div>'


def _cell(value: str) -> str:
    return f"<code>{shown(value)}</code>" if value else "-"


def _files(manifest: Manifest) -> str:
    listed = list(manifest.files.items())
    rows = [
        [breakable(name), size_text(record.nbytes), f"<code>{shown(record.sha256)}</code>"]
        for name, record in listed[:_MOST_FILES]
    ]
    if len(listed) > _MOST_FILES:
        rows.append([f"and {len(listed) - _MOST_FILES} more, listed in loftq.json", "", ""])
    is_open = " open" if len(listed) <= _OPEN_FILES else ""
    content = table(["file", "size", "sha256"], rows)
    return f"<details{is_open}><summary>{len(listed)} files</summary>{content}</details>"


def _notes(manifest: Manifest) -> str:
    items = "".join(f"<li>{shown(note)}</li>" for note in manifest.notes)
    return f"<ul>{items}</ul>" if items else "<p>None.</p>"
