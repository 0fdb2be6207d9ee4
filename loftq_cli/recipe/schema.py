"""The JSON schema of recipe files for editors and CI, generated from the declarations of the fields."""

from __future__ import annotations

from typing import Any

from loftq_cli.recipe.field import Spec
from loftq_cli.recipe.model import recipe_specs
from loftq_cli.recipe.yaml_file import MATRIX, PLACES

_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
_PLACE_TEXTS = {
    "output": "Directory to write to. With a matrix: a template with fields in braces, or the parent of all outputs.",
    "push_to": "Repository on the Hub to push the conversion to. With a matrix: fields in braces are replaced.",
}


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of the files that `quantize --config` and `batch` read."""
    fields = {name: _described(spec) for name, spec in recipe_specs().items()}
    lists = {name: {"type": "array", "minItems": 1, "items": _bare(schema)} for name, schema in fields.items()}
    matrix = {
        "type": "object",
        "description": "Lists of values for `loftq batch`: one conversion for each combination.",
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


def _described(spec: Spec) -> dict[str, Any]:
    schema = {**_typed(spec), "description": spec.help.text}
    if not spec.required:
        schema["default"] = list(spec.default) if isinstance(spec.default, tuple) else spec.default
    return schema


def _typed(spec: Spec) -> dict[str, Any]:
    if spec.choices:
        return {"enum": [value for choice in spec.choices for value in _spellings(choice)]}
    if spec.repeatable:
        # A string or a list of strings, as `Recipe` accepts.
        text = {"type": "string", "minLength": 1}
        return {"anyOf": [text, {"type": "array", "items": text}]}
    names = [_JSON_TYPES[part] for part in spec.types] + ["null"] * spec.optional
    bounds = {"minimum": spec.least, "maximum": spec.most}
    schema: dict[str, Any] = {"type": names[0] if len(names) == 1 else names}
    return schema | {name: bound for name, bound in bounds.items() if bound is not None}


def _spellings(choice: Any) -> list[Any]:
    """Return the JSON values of a choice; a numeric string may lack its quotes, so that YAML reads it as a number."""
    if not isinstance(choice, str) or not choice.replace(".", "", 1).isdigit():
        return [choice]
    return [choice, float(choice) if "." in choice else int(choice)]


def _bare(schema: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name not in ("description", "default")}
