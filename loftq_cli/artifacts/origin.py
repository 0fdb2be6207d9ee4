"""Open the checkpoint that a directory was made from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli.artifacts.manifest import Manifest
from loftq_cli.checkpoint import Checkpoint, open_source
from loftq_cli.errors import LoftqError
from loftq_cli.recipe.model import Recipe

if TYPE_CHECKING:
    from loftq_cli.checkpoint import Checkpoint


def recipe_for(manifest: Manifest, source: str, revision: str | None) -> Recipe:
    """Return the conversion's recipe for `source`; a model on the Hub is read at the recorded commit by default."""
    from loftq_cli.checkpoint.remote.model import parse_model

    if revision is None and "@" not in source and not isinstance(parse_model(source, None), Path):
        revision = manifest.source_revision
    return Recipe(**{**manifest.recipe, "model": source, "revision": revision})


@contextmanager
def opened_source(manifest: Manifest, source: str | Path | None) -> Iterator[Checkpoint]:
    """Open the checkpoint that the directory was made from; `source` overrides the recorded one.

    Raises:
        LoftqError: it does not exist, or is another model.
    """
    name = manifest.source if source is None else str(source)
    if source is None and manifest.source_revision is None and not Path(name).is_dir():
        raise LoftqError(f"the source model {name} does not exist: give its new location with --source.")
    recipe = recipe_for(manifest, name, None)
    with open_source(recipe) as (checkpoint, _):
        if checkpoint.fingerprint != manifest.source_fingerprint:
            raise LoftqError(
                f"{name} is not the model this directory was made from, its config or tensors differ: give the right "
                "one with --source."
            )
        yield checkpoint
