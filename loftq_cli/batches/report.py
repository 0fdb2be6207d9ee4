"""The results of a batch, for people, programs and CI."""

from __future__ import annotations

import dataclasses
import html
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from loftq_cli.artifacts.manifest import Manifest
from loftq_cli.errors import ExitCode, UsageError
from loftq_cli.hub.secrets import redact
from loftq_cli.machine.printable import printable
from loftq_cli.machine.sizes import size_text

DONE = ("done", "finished", "planned")
STATUSES = (*DONE, "incomplete", "failed", "interrupted")
_MARKDOWN = re.compile(r"([\\`*_\[\]|~#])")


@dataclass(frozen=True)
class Outcome:
    """The result of one recipe.

    Attributes:
        status: `done` in this run; `finished` in an earlier one; `planned` in a dry run; `incomplete` if the same
            command will continue it; `failed`; `interrupted`, also if the batch was interrupted before it started.
        exit_code: of its process; negative for a signal; None if no process was started.
        error: the sentence that explains a failure.
        resumed: True if it continued an earlier, unfinished run.
        seconds: wall time in this batch.
    """

    name: str
    file: str
    output: str
    status: str
    exit_code: int | None = None
    error: str | None = None
    resumed: bool = False
    seconds: float = 0.0
    push_to: str | None = None
    format: str | None = None
    matrices: int | None = None
    source_bytes: int | None = None
    output_bytes: int | None = None
    bits_effective: float | None = None
    bits_stored: float | None = None
    plain_residual: float | None = None
    residual: float | None = None

    @property
    def ok(self) -> bool:
        return self.status in DONE


@dataclass(frozen=True)
class BatchReport:
    """All outcomes, in the order of the files."""

    outcomes: tuple[Outcome, ...]
    seconds: float
    interrupted: bool = False

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(outcome.status for outcome in self.outcomes)
        return {status: found[status] for status in STATUSES if found[status]}

    @property
    def exit_code(self) -> ExitCode:
        """Return 0 if all are done, and 4 if running the same command again is all that is needed."""
        if self.interrupted:
            return ExitCode.INTERRUPTED
        left = {outcome.status for outcome in self.outcomes if not outcome.ok}
        if not left:
            return ExitCode.DONE
        return ExitCode.INCOMPLETE if left == {"incomplete"} else ExitCode.FAILED

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for `--summary` and `--json`."""
        return {
            "ok": self.exit_code == ExitCode.DONE,
            "exit_code": int(self.exit_code),
            "seconds": self.seconds,
            "counts": self.counts,
            "recipes": [dataclasses.asdict(outcome) for outcome in self.outcomes],
        }


def measured(outcome: Outcome, manifest: Manifest) -> Outcome:
    """Return the outcome with the numbers of a finished conversion."""
    totals = manifest.totals
    return dataclasses.replace(
        outcome,
        format=manifest.format,
        matrices=totals.matrices,
        source_bytes=totals.source_bytes,
        output_bytes=totals.backbone_bytes + totals.adapter_bytes,
        bits_effective=totals.bits_effective,
        bits_stored=totals.bits_stored,
        plain_residual=totals.plain_residual,
        residual=totals.residual,
    )


def junit(report: BatchReport) -> bytes:
    """Return JUnit XML with one test case for each recipe, so that CI shows every model."""
    counts = report.counts
    suite = ElementTree.Element(
        "testsuite",
        name="loftq batch",
        tests=str(len(report.outcomes)),
        failures=str(counts.get("failed", 0)),
        errors=str(counts.get("incomplete", 0)),
        skipped=str(counts.get("interrupted", 0)),
        time=f"{report.seconds:.3f}",
    )
    tags = {"failed": "failure", "incomplete": "error", "interrupted": "skipped"}
    for outcome in report.outcomes:
        case = ElementTree.SubElement(
            suite, "testcase", name=_clean(outcome.name), classname=_clean(outcome.file), time=f"{outcome.seconds:.3f}"
        )
        text = _clean(outcome.error or outcome.status)
        if outcome.status in tags:
            ElementTree.SubElement(case, tags[outcome.status], message=text).text = text
        else:
            ElementTree.SubElement(case, "system-out").text = _clean(f"{outcome.status}: {outcome.output}")
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True) + b"\n"


def markdown(report: BatchReport) -> str:
    """Return a Markdown table for a GitHub step summary."""
    lines = [
        f"### loftq batch: {', '.join(f'{count} {status}' for status, count in report.counts.items())}",
        "",
        "| | recipe | bits | size | residual plain → kept | time | |",
        "|---|---|---|---|---|---|---|",
    ]
    for outcome in report.outcomes:
        mark = "✅" if outcome.ok else "❌"
        bits = "" if outcome.bits_effective is None else f"{outcome.bits_effective:.2f}"
        size = "" if outcome.output_bytes is None else size_text(outcome.output_bytes)
        gain = "" if outcome.residual is None else f"{outcome.plain_residual:.4f} → {outcome.residual:.4f}"
        text = _markdown_text(outcome.error or outcome.status)
        lines.append(
            f"| {mark} | {_markdown_code(outcome.name)} | {bits} | {size} | {gain} | {outcome.seconds:.0f} s | {text} |"
        )
    return "\n".join(lines) + "\n"


def _clean(text: str) -> str:
    """Return text that XML and Markdown can hold, and a terminal may show."""
    return printable(redact(text))


def _markdown_text(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", html.escape(_clean(text), quote=False))


def _markdown_code(text: str) -> str:
    """Return a code span for the cell of a table; a name with characters that would end it is escaped text."""
    return _markdown_text(text) if set(text) & set("`|\\") else f"`{_clean(text)}`"


def check_writable(path: Path) -> None:
    """Make the directory of a report before the work begins.

    Raises:
        UsageError: the report could not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the report {path} cannot be written ({error.strerror}): give another path.") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"the report {path} cannot be written: give the path of a file in a directory that can.")


def write_report(path: Path, content: bytes) -> None:
    """Write a report atomically."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
