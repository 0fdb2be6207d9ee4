"""loftq: quantize Hugging Face checkpoints with LoftQ, matrix by matrix.

    import loftq_cli
    manifest = loftq_cli.quantize("path/to/model", output="out", bits=2, rank=64)
    model = loftq_cli.load("out", trainable=True)

Importing this package does not import torch or transformers; its functions import them when they are called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loftq_cli._version import __version__ as __version__
from loftq_cli.machine.system import check_system

if TYPE_CHECKING:
    from loftq_cli.api import plan as plan
    from loftq_cli.api import quantize as quantize
    from loftq_cli.artifacts.decode import decode as decode
    from loftq_cli.artifacts.manifest import Manifest as Manifest
    from loftq_cli.artifacts.manifest import read_manifest as read_manifest
    from loftq_cli.batches.run import batch as batch
    from loftq_cli.errors import LoftqError as LoftqError
    from loftq_cli.evaluation.evaluate import evaluate as evaluate
    from loftq_cli.evaluation.scores import Evaluation as Evaluation
    from loftq_cli.merging.merge import merge as merge
    from loftq_cli.planning.plan import Plan as Plan
    from loftq_cli.publishing.push import push as push
    from loftq_cli.recipe.model import Recipe as Recipe
    from loftq_cli.recipe.schema import recipe_schema as recipe_schema
    from loftq_cli.reporting.job import report as report
    from loftq_cli.runtime.load import load as load
    from loftq_cli.verification import Verification as Verification
    from loftq_cli.verification import verify as verify

_HOMES = {
    "Evaluation": "loftq_cli.evaluation.scores",
    "LoftqError": "loftq_cli.errors",
    "Manifest": "loftq_cli.artifacts.manifest",
    "Plan": "loftq_cli.planning.plan",
    "Recipe": "loftq_cli.recipe.model",
    "batch": "loftq_cli.batches.run",
    "Verification": "loftq_cli.verification",
    "decode": "loftq_cli.artifacts.decode",
    "evaluate": "loftq_cli.evaluation.evaluate",
    "load": "loftq_cli.runtime.load",
    "merge": "loftq_cli.merging.merge",
    "plan": "loftq_cli.api",
    "push": "loftq_cli.publishing.push",
    "quantize": "loftq_cli.api",
    "read_manifest": "loftq_cli.artifacts.manifest",
    "recipe_schema": "loftq_cli.recipe.schema",
    "report": "loftq_cli.reporting.job",
    "verify": "loftq_cli.verification",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "LoftqError":
        check_system()
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
