"""`loftq schema`."""

from __future__ import annotations

from loftq_cli.cli import options as o
from loftq_cli.cli.terminal import guarded, print_json


def schema_command(debug: o.Debug = False) -> None:
    """Print the JSON schema of recipe files, for editors.

    Example: loftq schema > recipe.schema.json, and in a recipe: # yaml-language-server: $schema=recipe.schema.json
    """
    with guarded(debug):
        from loftq_cli.recipe.schema import recipe_schema

        print_json(recipe_schema())
