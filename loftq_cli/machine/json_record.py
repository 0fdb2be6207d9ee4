"""Read the JSON files that loftq writes for itself into typed values, strictly, with errors a person can act on.

A record is a standard dataclass with the `json_record` decorator. Types are exact: no string becomes a number and no
float an integer, although an integer is accepted as a float; lists become tuples; an unknown field, NaN and Infinity
are errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from pydantic_core.core_schema import CoreSchema, literal_schema

T = TypeVar("T")

_LARGEST = 2**63 - 1  # no size, count or process id exceeds a signed 64-bit integer
_LONGEST_VALUE = 80  # characters of a bad value that an error shows
_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

json_record = with_config(_CONFIG)
"""Class decorator: `read_json` reads this dataclass strictly, also if it is nested in another."""

Count = Annotated[int, Field(ge=0, le=_LARGEST)]
"""A number of things or bytes, possibly zero."""
Size = Annotated[int, Field(ge=1, le=_LARGEST)]
"""A number of things that is never zero."""
Amount = Annotated[float, Field(ge=0)]
"""A measured number that is never negative."""


class InvalidRecord(ValueError):
    """A JSON text is invalid; the message names the field and fits into "is damaged (...)".

    Attributes:
        is_json: the text is valid JSON, so it was not merely cut off.
    """

    def __init__(self, message: str, *, is_json: bool) -> None:
        super().__init__(message)
        self.is_json = is_json


def read_json(kind: type[T], text: bytes | str) -> T:
    """Return the value of type `kind` that a JSON text holds.

    Args:
        kind: a dataclass decorated with `json_record`, or a generic type such as `dict[str, float]`.

    Raises:
        InvalidRecord: the text is not JSON, or a field is missing, unknown, of another type or out of bounds.
    """
    try:
        return cast("T", _adapter(cast("Hashable", kind)).validate_json(text))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidRecord(_describe(first), is_json=first["type"] != "json_invalid") from None


class _Choice:
    """Annotation for a value that must be one of several; the check needs no call into Python."""

    def __init__(self, choices: tuple[str | int, ...]) -> None:
        self._choices = list(choices)

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> CoreSchema:
        return literal_schema(self._choices)


def one_of(*choices: str | int) -> object:
    """Return an annotation for a string or an integer that must be one of `choices`."""
    return _Choice(choices)


def matches(pattern: str, description: str) -> AfterValidator:
    """Return an annotation for a string that must match a regular expression as a whole."""
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if compiled.fullmatch(value) is None:
            raise ValueError(f"must be {description}")
        return value

    return AfterValidator(check)


Sha256 = Annotated[str, matches("[0-9a-f]{64}", "64 hexadecimal digits")]
"""A sha256 as `hexdigest` writes it."""


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    # pydantic refuses an external configuration for classes that have one of their own.
    return TypeAdapter(kind, config=None if hasattr(kind, "__pydantic_config__") else _CONFIG)


_EXPECTED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "int_type": lambda _: "an integer",
    "int_from_float": lambda _: "an integer",
    "int_parsing_size": lambda _: "an integer of ordinary size",
    "float_type": lambda _: "a number",
    "finite_number": lambda _: "a finite number",
    "string_type": lambda _: "a string",
    "bool_type": lambda _: "true or false",
    "tuple_type": lambda _: "a list",
    "list_type": lambda _: "a list",
    "dict_type": lambda _: "an object",
    "mapping_type": lambda _: "an object",
    "dataclass_type": lambda _: "an object",
    "enum": lambda context: f"one of {context['expected']}",
    "literal_error": lambda context: f"one of {context['expected']}",
    "greater_than_equal": lambda context: f"at least {context['ge']:g}",
    "less_than_equal": lambda context: f"at most {context['le']}",
}


def _describe(error: Mapping[str, Any]) -> str:
    """Return `matrices[3].bits must be an integer, not 'x'` for one error of pydantic."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "json_invalid":
        return f"it is not valid JSON: {context['error']}"
    where = _path(error["loc"])
    if kind == "missing":
        return f"{where} is missing"
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{where} is not a known field"
    if kind in ("too_long", "too_short"):
        limit = f"at most {context['max_length']}" if kind == "too_long" else f"at least {context['min_length']}"
        return f"{where} has {context['actual_length']} items but must have {limit}"
    if kind == "value_error":
        text = str(context["error"])
        return f"{where} {text}, not {_shown(error['input'])}" if text.startswith("must ") else f"{where} {text}"
    if kind in _EXPECTED:
        return f"{where} must be {_EXPECTED[kind](context)}, not {_shown(error['input'])}"
    return f"{where}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _path(location: Sequence[str | int]) -> str:
    """Return `files['config.json'].nbytes` for ("files", "config.json", "nbytes")."""
    parts = [part for part in location if part != "[key]"]  # which pydantic adds if the key itself is invalid
    text = "".join(f".{part}" if str(part).isidentifier() else f"[{_shown(part)}]" for part in parts)
    return text.removeprefix(".") or "the file's content"


def _shown(value: object) -> str:
    """Return a value as written in the file, shortened and without control characters."""
    text = repr(value) if value is not None and not isinstance(value, bool) else json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
