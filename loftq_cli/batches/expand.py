"""Expand recipe files into jobs: one for each recipe and each combination of its `matrix:`, with a readable name."""

from __future__ import annotations

import itertools
import math
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.machine.confined import real_path, user_path
from loftq_cli.recipe.field import FieldError, shown_value
from loftq_cli.recipe.model import MATRIX, PLACES, located, make_recipe, read_yaml, recipe_fields
from loftq_cli.recipe.yaml_file import check_text

_IN_DEFAULT_NAME = ("model", "revision", "method", "bits", "rank")
_MOST_COMBINATIONS = 10_000
_LONGEST_PLACE = 4_096  # characters
_FORMAT = re.compile(r"[<>^=]?[ +-]?0?\d{0,2}(\.\d{1,2})?[a-zA-Z%]?")  # a width of two digits at most


@dataclass(frozen=True)
class Job:
    """One conversion of a batch.

    Attributes:
        name: short and unique, the last part of `output`.
        file: the recipe file.
        recipe: fields for `make_recipe`.
        problem: why the recipe is invalid; such a job is reported but not run.
    """

    name: str
    file: Path
    recipe: Mapping[str, Any]
    output: Path
    push_to: str | None = None
    problem: str | None = None


def read_jobs(files: Sequence[str | Path], output: str | Path | None = None) -> tuple[Job, ...]:
    """Return every job of these files, in order. A broken file or recipe becomes a job that has a `problem`.

    Args:
        output: directory for recipes that do not name an output; the working directory by default.

    Raises:
        UsageError: there are no files, or two jobs would write to the same directory.
    """
    if not files:
        raise UsageError("no recipe file was given: name one or more, such as configs/*.yaml.")
    parent = user_path(output) if output else Path()
    jobs = tuple(job for file in files for job in _jobs_of(user_path(file), parent))
    for path, count in Counter(real_path(job.output) for job in jobs if job.problem is None).items():
        if count > 1:
            clashing = [job for job in jobs if real_path(job.output) == path]
            raise UsageError(
                f"{clashing[0].file} and {clashing[1].file} would both write to {clashing[0].output}: give one of them "
                "its own output:, with fields in braces if it has a matrix, such as 'out/{model}-{bits}bit-{seed}'."
            )
    return jobs


def _jobs_of(file: Path, parent: Path) -> list[Job]:
    try:
        values = read_yaml(file)
        return [_job(file, fields, varied, parent) for fields, varied in _combinations(file, values)]
    except LoftqError as error:
        return [Job(file.stem, file, {}, parent / file.stem, problem=str(error))]


def _combinations(file: Path, values: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """Yield the fields of every combination and the names of those that vary."""
    matrix = values.get(MATRIX, {})
    rest = {name: value for name, value in values.items() if name != MATRIX}
    if not isinstance(matrix, dict) or (MATRIX in values and not matrix):
        raise UsageError(f"matrix in {file} must be a mapping: write lists of values under it, such as 'bits: [4, 2]'.")
    matrix = {str(name).replace("-", "_"): choices for name, choices in matrix.items()}
    for name, choices in matrix.items():
        if name not in recipe_fields():
            raise UsageError(f"matrix in {file} names '{name}', which is not a field of a recipe.")
        if name in rest:
            raise UsageError(f"{file} sets {name} twice, inside and outside the matrix: remove one.")
        if not isinstance(choices, list) or not choices:
            raise UsageError(f"{name} in the matrix of {file} must be a list of values: write them as [a, b].")
    count = math.prod(len(choices) for choices in matrix.values())
    if count > _MOST_COMBINATIONS:
        raise UsageError(f"the matrix in {file} has {count:.3g} combinations: leave at most {_MOST_COMBINATIONS}.")
    for combination in itertools.product(*matrix.values()):
        yield rest | dict(zip(matrix, combination)), tuple(matrix)


def _job(file: Path, fields: Mapping[str, Any], varied: tuple[str, ...], parent: Path) -> Job:
    """Return the job, with its `problem` if it is invalid; the other jobs of the file are not affected."""
    recipe = {name: value for name, value in fields.items() if name not in PLACES}
    fallback = "-".join([file.stem, *(_word(name, fields[name]) for name in varied)])
    try:
        name = _default_name(recipe, varied)
        words = {**recipe_fields(), **recipe, "model": Path(str(recipe["model"])).name, "name": name}
        output = _filled(fields.get("output"), words, varied)
        if output is None or (varied and "{" not in str(fields["output"])):
            output = str(Path(output or parent) / name)
        target = user_path(output)
        if str(target).startswith("~"):  # a shell would not have left it
            raise UsageError(f"{output:.200} names the home directory of a user who does not exist: give another path.")
        real_path(target)
        return Job(target.name, file, recipe, target, _filled(fields.get("push_to"), words, varied))
    except FieldError as error:
        return Job(fallback, file, recipe, parent / fallback, problem=str(located(error, file)))
    except (LoftqError, OSError, RuntimeError, ValueError) as error:  # of a home or a link that cannot be resolved
        return Job(fallback, file, recipe, parent / fallback, problem=" ".join(str(error).split()))


def _default_name(recipe: Mapping[str, Any], varied: Sequence[str]) -> str:
    """Return `quantize`'s own name plus the other fields that vary: `Llama-2-7b-loftq-2bit-r64-uniform-seed1`."""
    from loftq_cli.api import default_output

    made = make_recipe(recipe)
    name_of_quantize = default_output(made).name
    return "-".join([name_of_quantize, *(_word(name, recipe[name]) for name in varied if name not in _IN_DEFAULT_NAME)])


def _word(name: str, value: Any) -> str:
    """Return a field's value as part of a name: `seed1`, `uniform`, `keep_last`."""
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    text = str(value) if isinstance(value, str) else f"{name}{value}"
    return re.sub(r"[^\w.-]+", "-", text.rpartition("/")[2]).strip("-") or name


def _filled(template: Any, words: Mapping[str, Any], varied: tuple[str, ...]) -> str | None:
    """Return `output` or `push_to`; in a recipe with a matrix, fields in braces are replaced by their values."""
    if template is None:
        return None
    if not isinstance(template, str) or not template:
        raise UsageError(f"{shown_value(template)} is not a valid output or push_to: give a non-empty string.")
    place = check_text(_format(template, words, varied) if varied else template, "output or push_to")
    if len(place) > _LONGEST_PLACE:
        raise UsageError(
            f"'{place[:60]}...' is too long for an output or push_to: give at most {_LONGEST_PLACE} letters."
        )
    return place


def _format(template: str, words: Mapping[str, Any], varied: Sequence[str]) -> str:
    """Replace the fields in braces; `str.format` alone would accept attributes, and widths of gigabytes."""
    try:
        for _, name, layout, conversion in string.Formatter().parse(template):
            if name is not None and (name not in words or conversion or not _FORMAT.fullmatch(layout or "")):
                raise ValueError(name)
        return template.format_map(words)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError):
        known = ", ".join(f"{{{name}}}" for name in ("name", *varied))
        raise UsageError(
            f"'{template:.200}' has braces around something that is not a field: use fields of the recipe, such as "
            f"{known}, each with a width of two digits at most."
        ) from None
