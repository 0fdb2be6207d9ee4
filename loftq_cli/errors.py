"""The exception for errors that a user can fix, and the exit codes of the command line."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit codes of the command line; 130 is what a shell reports for a process that SIGINT ended."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    VERIFICATION_FAILED = 3
    INCOMPLETE = 4
    INTERRUPTED = 130


class LoftqError(Exception):
    """An error in the input, the flags or the environment.

    The message is one sentence: what is wrong, where, and what to do next. The command line prints it without a
    traceback and exits with `exit_code`.
    """

    def __init__(self, message: str, *, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(LoftqError):
    """An invalid flag, recipe field or argument."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=ExitCode.USAGE)
