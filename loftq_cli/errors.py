"""The one exception for mistakes a user can mend, and the exit codes of the command line."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """What the shell sees (design contract; 130 is the shell's own number for SIGINT)."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    VERIFICATION_FAILED = 3
    INCOMPLETE = 4
    INTERRUPTED = 130


class LoftqError(Exception):
    """A mistake in the input, the flags or the environment.

    The message is one sentence: what is wrong, where, and what to do next. The command line prints it without a
    traceback and exits with `exit_code`.
    """

    def __init__(self, message: str, *, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(LoftqError):
    """A flag, a recipe field or an argument that cannot be meant."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=ExitCode.USAGE)
