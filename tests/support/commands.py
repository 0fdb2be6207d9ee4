"""Run commands as a user does."""

from __future__ import annotations

import typer.testing

from loftq_cli.cli import app


def loftq(*words: object, code: int = 0):
    result = runner.invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result


def sentence(result) -> str:
    """Return the single line that an error prints."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("loftq: ") and "Traceback" not in result.output, result.stderr
    return lines[0]


runner = typer.testing.CliRunner()
