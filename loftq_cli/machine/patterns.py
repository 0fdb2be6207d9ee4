"""Regular expressions from users and files, with a bound on the time they take.

A backtracking search can take time that is exponential in the length of the text. Expressions whose syntax rules that
out are run by `re`. The others are run by `regex`, which accepts a time limit.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from loftq_cli.errors import LoftqError

_LONGEST = 10_000  # characters of an expression
_FEW_REPEATS = 2  # with so many, the time of a search grows at most with the third power of the text
_SHORT = 500  # characters of a text
_SECONDS = 5.0  # for all slow searches with one expression
_SECONDS_OF_ONE = 1.0  # for one search; a sound expression takes microseconds
_SLOW = 0.001  # seconds; shorter searches do not count, so that a sound expression never uses up its time
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


class BoundedPattern:
    """A regular expression whose searches take at most a few seconds in all."""

    def __init__(self, text: str) -> None:
        """Compile it.

        Raises:
            ValueError: the expression is invalid; the message says why.
        """
        if len(text) > _LONGEST:
            raise ValueError(f"longer than {_LONGEST} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._fast = re.compile(text)
                self._cheap = _is_cheap(_parse(text))
                self._timed: Any = None if self._cheap else _compile_timed(text)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        except (re.error, OverflowError, MemoryError) as error:
            raise ValueError(str(error)) from None
        self.text, self._left = text, _SECONDS

    def search(self, text: str) -> bool:
        """Return True if the expression is found in the text.

        Raises:
            LoftqError: the search takes too long.
        """
        try:
            return self._run("search", text)
        except TimeoutError:
            raise LoftqError(
                f"the regular expression '{self.text:.80}' takes too long on '{text:.80}': write it without repeats "
                "inside of repeats, such as (a+)+, and with fewer of them."
            ) from None

    def full_match(self, text: str) -> bool:
        """Return True if the expression matches the whole of the text.

        Raises:
            TimeoutError: the search takes too long.
        """
        return self._run("fullmatch", text)

    def _run(self, method: str, text: str) -> bool:
        """
        Raises:
            TimeoutError: the searches with this expression take too long in all.
        """
        if self._cheap and len(text) <= _SHORT:
            return getattr(self._fast, method)(text) is not None
        self._timed = self._timed or _compile_timed(self.text)
        if self._left <= 0:
            raise TimeoutError
        started = time.monotonic()
        try:
            return getattr(self._timed, method)(text, timeout=min(self._left, _SECONDS_OF_ONE)) is not None
        finally:
            spent = time.monotonic() - started
            self._left -= spent if spent > _SLOW else 0.0


@lru_cache(maxsize=65_536)
def bounded_pattern(text: str) -> BoundedPattern:
    """Return the compiled expression, which is shared by all callers.

    Raises:
        ValueError: the expression is invalid; the message says why.
    """
    return BoundedPattern(text)


def full_match(pattern: str, text: str, where: object) -> bool:
    """True if `pattern` matches the whole of `text`.

    Args:
        where: the file and field of the pattern, for messages.

    Raises:
        LoftqError: the pattern is invalid or too long, or the searches with it take too long.
    """
    try:
        return bounded_pattern(pattern).full_match(text)
    except ValueError as error:
        raise LoftqError(f"{where}: {pattern!r:.80} is not a valid regular expression ({error}): correct it.") from None
    except TimeoutError:
        raise LoftqError(f"{where}: matching {pattern!r:.80} takes too long: remove its nested repeats.") from None


def _compile_timed(text: str) -> Any:
    import regex

    try:
        return regex.compile(text, regex.VERSION0)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(str(error)) from None


def _parse(text: str) -> Any:
    try:
        from re import _parser as parser  # type: ignore[attr-defined]
    except ImportError:  # Python 3.10
        import sre_parse as parser  # type: ignore[no-redef]
    return parser.parse(text)


def _is_cheap(tree: Any) -> bool:
    """Return True if an expression has few repeats of variable length, none of them nested, and no references."""
    repeats = 0
    for inside, name, arguments in _nodes(tree, False):
        if name in ("GROUPREF", "GROUPREF_EXISTS") or (inside and name == "BRANCH"):
            return False
        if name in _REPEATS and arguments[0] != arguments[1]:
            repeats += 1
            if inside or repeats > _FEW_REPEATS:
                return False
    return True


def _nodes(tree: Any, inside: bool) -> Iterable[tuple[bool, str, Any]]:
    """Yield every node: True if it is inside of a repeat, its name, its arguments."""
    for operation, arguments in tree:
        name = str(operation)
        yield inside, name, arguments
        below = inside or (name in _REPEATS and arguments[1] > 1)
        for child in _children(arguments):
            yield from _nodes(child, below)


def _children(arguments: Any) -> Iterable[Any]:
    if hasattr(arguments, "getwidth"):  # a parsed expression
        yield arguments
    elif isinstance(arguments, (tuple, list)):
        for argument in arguments:
            yield from _children(argument)
