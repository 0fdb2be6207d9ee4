"""Match regular expressions that come from files, in bounded time."""

from __future__ import annotations

from loftq_cli.errors import LoftqError

_SECONDS = 1.0  # for one match; a sound pattern takes microseconds
_LONGEST = 2000  # characters of a pattern


def full_match(pattern: str, text: str, where: object) -> bool:
    """True if `pattern` matches the whole of `text`.

    Args:
        where: the file and field of the pattern, for messages.

    Raises:
        LoftqError: the pattern is invalid or too long, or matching takes too long.
    """
    import regex  # unlike `re` it can stop: nested repeats backtrack for years

    if len(pattern) > _LONGEST:
        raise LoftqError(f"{where} has a pattern of {len(pattern)} characters: shorten it to at most {_LONGEST}.")
    try:
        return regex.fullmatch(pattern, text, timeout=_SECONDS) is not None
    except TimeoutError:
        raise LoftqError(f"{where}: matching {pattern!r:.80} takes too long: remove its nested repeats.") from None
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise LoftqError(f"{where}: {pattern!r:.80} is not a valid regular expression ({error}): correct it.") from None
