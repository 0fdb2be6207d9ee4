"""A rich console that prints every text as it is, but for what could harm: see `loftq_cli.machine.printable`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from loftq_cli.hub.secrets import users_token
from loftq_cli.machine.printable import encodable, printable
from loftq_cli.machine.secrets import without_secrets
from loftq_cli.machine.streams import discard, writing_results


class SafeConsole(Console):
    """Reads no markup, escapes characters that are not printable, and removes tokens and signatures of links.

    A string is one line: a line feed in it, which may come from a name, is escaped too. A stream that cannot be written
    to does not stop the work, unless it holds results.
    """

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)
        self._token = users_token()  # read once: a table has many cells

    def render_str(self, text: str, **options: Any) -> Text:
        options.update(markup=False, emoji=False)
        return super().render_str(self._shown(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(self._shown(segment.text, "\n"), segment.style)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as `rich.console.Console` does; see the class for errors of the stream."""
        quiet = contextlib.suppress(OSError, ValueError) if self.stderr else writing_results(self.file)
        with quiet:
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Go on without the reader; rich's own version would end the program."""
        discard(self.file)

    def _shown(self, text: str, keep: str = "") -> str:
        encoding = getattr(self.file, "encoding", None) or sys.getdefaultencoding()
        return encodable(printable(without_secrets(text, self._token), keep), encoding)
