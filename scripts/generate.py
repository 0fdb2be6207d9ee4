"""Rewrite the files that are generated from the declarations of the recipe fields: python scripts/generate.py"""

from __future__ import annotations

import json
from pathlib import Path

from loftq_cli.recipe.model import recipe_specs
from loftq_cli.recipe.schema import recipe_schema

ROOT = Path(__file__).resolve().parents[1]
_KEYWORDS = '''"""The fields of a recipe as typed keywords: made by scripts/generate.py from recipe/fields.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from typing_extensions import TypedDict


class RecipeKeywords(TypedDict, total=False):
    """Keywords of `loftq_cli.quantize` and `loftq_cli.plan` beside their own arguments; None means not given."""

'''


def generated() -> dict[Path, str]:
    """Return the content of every generated file."""
    return {
        ROOT / "configs/recipe.schema.json": json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n",
        ROOT / "loftq_cli/recipe/keywords.py": _KEYWORDS + "".join(_keywords()),
    }


def _keywords() -> list[str]:
    """Return a line for every field except `model`, which is a separate argument."""
    kinds = {name: spec.keyword.split(" | ") for name, spec in recipe_specs().items() if name != "model"}
    return [f"    {name}: {' | '.join(dict.fromkeys([*parts, 'None']))}\n" for name, parts in kinds.items()]


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
