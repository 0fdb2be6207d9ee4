"""The JSON schema of recipe files, generated from `Recipe`'s own fields and tables, for editors and CI."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from loftq_cli.recipe.model import BITS, CHOICES, LEAST, MATRIX, PLACES, Recipe

_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
_PLACE_TEXTS = {
    "output": "Directory to write. With a matrix: a template with fields in braces, or the directory they all go to.",
    "push_to": "Repository on the Hub to push the finished conversion to; with a matrix, fields in braces are filled.",
}


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of what `quantize --config` and `batch` read."""
    helps = _helps()
    fields = {field.name: _described(field, helps) for field in dataclasses.fields(Recipe) if field.init}
    lists = {name: {"type": "array", "minItems": 1, "items": _bare(schema)} for name, schema in fields.items()}
    matrix = {
        "type": "object",
        "description": "Lists of values for `loftq batch`, multiplied out: one conversion for each combination.",
        "properties": lists,
        "minProperties": 1,
        "additionalProperties": False,
    }
    places = {name: {"type": "string", "minLength": 1, "description": _PLACE_TEXTS[name]} for name in PLACES}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "loftq recipe",
        "description": "What `loftq quantize --config FILE` and `loftq batch FILE` read.",
        "type": "object",
        "properties": {**fields, **places, MATRIX: matrix},
        "anyOf": [
            {"required": ["model"]},
            {"required": [MATRIX], "properties": {MATRIX: {"required": ["model"]}}},
        ],
        "additionalProperties": False,
    }


def _helps() -> dict[str, str]:
    """What the command line says of each field; the one place where those texts stand."""
    from loftq_cli.cli.options import FIELD_HELPS

    return {"model": "Directory of a checkpoint, or org/name[@revision] on the Hub.", **FIELD_HELPS}


def _described(field: dataclasses.Field[Any], helps: dict[str, str]) -> dict[str, Any]:
    schema = _typed(field.name, typing.get_type_hints(Recipe)[field.name])
    schema["description"] = helps[field.name]
    if field.default is not dataclasses.MISSING:
        schema["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
    return schema


def _typed(name: str, hint: Any) -> dict[str, Any]:
    if name in CHOICES:
        return {"enum": [value for choice in CHOICES[name] for value in _spellings(choice)]}
    if name == "bits":
        return {"type": "number", "minimum": min(BITS), "maximum": max(BITS)}
    if typing.get_origin(hint) is tuple:
        # One text or a list of them, as `Recipe` takes it.
        text = {"type": "string", "minLength": 1}
        return {"anyOf": [text, {"type": "array", "items": text}]}
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    names = ["null" if part is type(None) else _JSON_TYPES[part] for part in parts]
    schema: dict[str, Any] = {"type": names[0] if len(names) == 1 else names}
    return schema | ({"minimum": LEAST[name]} if name in LEAST else {})


def _spellings(choice: Any) -> list[Any]:
    """A number in quotes may stand without them: YAML reads 3.1 as a number."""
    if not isinstance(choice, str) or not choice.replace(".", "", 1).isdigit():
        return [choice]
    return [choice, float(choice) if "." in choice else int(choice)]


def _bare(schema: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name not in ("description", "default")}
