"""The package and the help pages do not import torch or transformers; listing commands does not import pydantic."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "numba", "numpy")

STATEMENTS = {
    "package": "import loftq_cli",
    "help": "import runpy, sys; sys.argv = ['loftq', '--help']; runpy.run_module('loftq_cli', run_name='__main__')",
    "quantize help": "import runpy, sys; sys.argv = ['loftq', 'quantize', '--help']; "
    "runpy.run_module('loftq_cli', run_name='__main__')",
    "batch help": "import runpy, sys; sys.argv = ['loftq', 'batch', '--help']; "
    "runpy.run_module('loftq_cli', run_name='__main__')",
    "push help": "import runpy, sys; sys.argv = ['loftq', 'push', '--help']; "
    "runpy.run_module('loftq_cli', run_name='__main__')",
    "schema": "import runpy, sys; sys.argv = ['loftq', 'schema']; runpy.run_module('loftq_cli', run_name='__main__')",
    "version": "import runpy, sys; sys.argv = ['loftq', '--version']; "
    "runpy.run_module('loftq_cli', run_name='__main__')",
}


# Commands parse their options with pydantic; these statements run no command.
LIGHTEST = ("package", "help", "version")


@pytest.mark.parametrize("name", STATEMENTS)
def test_nothing_heavy_is_imported(name: str) -> None:
    heavy = (*HEAVY, "pydantic", "pydantic_core") if name in LIGHTEST else HEAVY
    program = f"""
import atexit, sys
def report():
    print("HEAVY", [name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
atexit.register(report)
{STATEMENTS[name]}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith("HEAVY []"), done.stderr


def test_public_names_resolve() -> None:
    import loftq_cli

    for name in loftq_cli.__all__:
        assert getattr(loftq_cli, name) is not None
    assert callable(loftq_cli.quantize) and callable(loftq_cli.plan)
    import loftq_cli.api
    import loftq_cli.planning.plan

    assert callable(loftq_cli.quantize) and callable(loftq_cli.plan)
