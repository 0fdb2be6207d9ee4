"""The annotations that declare a recipe field, and the `Spec` that is derived from them.

A declaration is an annotation in `loftq_cli.recipe.fields`: a type, pydantic's own constraints, and `Help`.
The command line, the JSON schema, the typed keywords and the documentation are made from the `Spec`s of `specs_of`.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

from annotated_types import Ge, Le
from pydantic import GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic.functional_validators import BeforeValidator
from pydantic_core import PydanticUndefined, core_schema

from loftq_cli.errors import UsageError
from loftq_cli.recipe.suggestions import suggestion

__all__ = ["Choices", "FieldError", "Help", "Spec", "refusal", "refusal_of", "specs_of"]


class FieldError(UsageError):
    """An invalid value of one field.

    Attributes:
        name: the field.
        flag: its flag, or its name if it has none.
        predicate: the rest of the sentence, such as `cannot be 5: choose one of 2, 3, 4, 8.`
    """

    def __init__(self, name: str, flag: str, predicate: str) -> None:
        super().__init__(f"{flag} {predicate}")
        self.name, self.flag, self.predicate = name, flag, predicate


@dataclass(frozen=True)
class Help:
    """How a field is shown.

    Attributes:
        text: one or two sentences, for the help page, the schema and the documentation.
        panel: panel of the help page; "" for a field without a flag.
        flag: the flag, if it is not the field's name with dashes.
        metavar: placeholder of the value in the help page.
        default: text shown instead of the field's default, if that depends on other fields.
        choices: values to list in the help page, if others are valid too.
        expects: how to correct an invalid value, if type and bounds do not tell.
    """

    text: str
    panel: str = ""
    flag: str = ""
    metavar: str = ""
    default: str | None = None
    choices: tuple[object, ...] = ()
    expects: str = ""


@dataclass(frozen=True)
class Choices:
    """The valid values of a field; unlike `Literal`, they can come from a table or a registry."""

    values: tuple[Any, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: Any) -> Any:
        if value is not None and value not in self.values:
            raise ValueError("unknown")
        return value


@dataclass(frozen=True)
class Spec:
    """The properties of one field.

    Attributes:
        types: the types of its values, without None; `int | float` is `(float,)`.
        optional: True if None is a valid value.
        default: None if it depends on other fields or the field is required.
        choices: all valid values, or () if types and bounds define them.
        least, most: inclusive bounds of a number, or None.
        keyword: type of the Python keyword argument, as source text.
    """

    name: str
    types: tuple[Any, ...]
    optional: bool
    required: bool
    default: Any
    help: Help
    choices: tuple[Any, ...]
    least: Any
    most: Any
    keyword: str

    @property
    def repeatable(self) -> bool:
        return tuple in self.types

    @property
    def flag(self) -> str:
        """The flag or pair of flags; "" if there is none."""
        return (self.help.flag or f"--{self.name.replace('_', '-')}") if self.help.panel else ""

    @property
    def listed(self) -> tuple[str, ...]:
        """The choices that the help page lists."""
        return tuple(str(choice) for choice in self.help.choices or self.choices)

    @property
    def shown_default(self) -> str:
        """The default as shown to users; "" if none is shown."""
        if self.help.default is not None:
            return self.help.default
        return "" if self.default in (None, ()) else str(self.default)


def specs_of(model: Any) -> dict[str, Spec]:
    """Return the fields of a pydantic dataclass in order."""
    return {name: _spec(name, info) for name, info in model.__pydantic_fields__.items()}


def _spec(name: str, info: FieldInfo) -> Spec:
    found = {type(item): item for item in info.metadata}
    names = _type_names(info.annotation)
    before = found.get(BeforeValidator)
    # A caller may pass any type that the field converts from.
    accepted = info.annotation if before is None else before.json_schema_input_type
    return Spec(
        name=name,
        types=tuple(part for part in names if part is not type(None)),
        optional=type(None) in names,
        required=info.is_required(),
        default=None if info.default is PydanticUndefined else info.default,
        help=found[Help],
        choices=found[Choices].values if Choices in found else (),
        least=found[Ge].ge if Ge in found else None,
        most=found[Le].le if Le in found else None,
        keyword=_source_text(accepted),
    )


def _type_names(annotation: Any) -> tuple[Any, ...]:
    """`Text | None` → `(str, NoneType)`, `tuple[Text, ...]` → `(tuple,)`, `int | float` → `(float,)`."""
    if hasattr(annotation, "__metadata__"):
        return _type_names(annotation.__origin__)
    if get_origin(annotation) in (Union, types.UnionType):
        parts = tuple(part for item in get_args(annotation) for part in _type_names(item))
        return tuple(part for part in parts if part is not int or float not in parts)
    return (get_origin(annotation) or annotation,)


def _source_text(annotation: Any) -> str:
    """Return a type as source text. None is always accepted and stands for the default."""
    if hasattr(annotation, "__metadata__"):
        return _source_text(annotation.__origin__)
    if get_origin(annotation) in (Union, types.UnionType):
        texts = [_source_text(item) for item in get_args(annotation)]
        return " | ".join(text for text in dict.fromkeys(texts) if text != "int" or "float" not in texts)
    if get_args(annotation):
        return f"{get_origin(annotation).__name__}[{', '.join(_source_text(item) for item in get_args(annotation))}]"
    return "None" if annotation is type(None) else annotation.__name__


def refusal_of(model: Any, error: ValidationError) -> UsageError:
    """Return the first of pydantic's errors as a sentence about a flag."""
    first = error.errors(include_url=False, include_context=False)[0]
    name, specs = str(first["loc"][0]), specs_of(model)
    if name not in specs:
        return UsageError(f"a recipe has no field '{name}': the fields are {', '.join(specs)}.")
    if first["type"] == "missing":
        return UsageError(f"{name} is missing from the recipe: add it.")
    return refusal(specs[name], first["input"])


def refusal(spec: Spec, value: object) -> FieldError:
    """Return the error for an invalid value of a field."""
    if spec.repeatable:
        return FieldError(spec.name, spec.name, "must be a list of strings.")
    subject = spec.flag.partition("/")[0] or spec.name
    meant = suggestion(spec.name, spec.types, spec.choices, value)
    hint = f"did you mean {meant}?" if meant else f"{_expected(spec)}."
    return FieldError(spec.name, subject, f"cannot be {shown_value(value)}: {hint}")


def _expected(spec: Spec) -> str:
    if spec.help.expects:
        return spec.help.expects
    if spec.choices:
        return f"choose one of {', '.join(str(choice) for choice in spec.choices)}"
    if spec.least is not None:
        return f"give a whole number of at least {spec.least}"
    if bool in spec.types:
        return "give true or false" + (", or leave it out" if spec.optional else "")
    return "give a string"


def shown_value(value: object) -> str:
    """Return a value as shown in a sentence; a YAML file can hold any value."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # for example an int of thousands of digits
        return f"this {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
