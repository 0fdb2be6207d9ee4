"""Values and names that a hostile file may hold."""

from __future__ import annotations

from typing import Any

TOKEN = "hf_FuzzedSecretToken12345678"
SIGNATURE = "feedfaceSignature0123"
SIGNED_LINK = f"https://cdn.example.com/blob?X-Amz-Signature={SIGNATURE}&Expires=1"
SECRETS = (TOKEN, SIGNATURE, "Signature=secret-")

# Names with escapes of terminals, bidirectional and other control characters, markup, and ways out of a folder.
NAMES: tuple[str, ...] = (
    "x", "../y", "a/../../outside.txt", "/etc/passwd", "\x00", "__metadata__", "a.b", "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07", "\u202egnp.exe", "a\u2066b\u2069", "a\nb", "a\r\nloftq: done", "[bold red]x[/]", "<b>&amp;",
    "%s%n", "{0.__class__}", "é", " ", "x" * 300, "\ud800", "\u200b", "~/x", "$HOME", TOKEN, SIGNED_LINK,
)  # fmt: skip

WEIRD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, -(2**63), 10**12, 10**30, 1.5, 1e308, float("nan"), float("inf"),
    "", "abc", "12", "../..", "/etc/passwd", "\x00", "\ud800", "💥", "a" * 5000, "{0.__class__}", "[bold]x[/]", "%s%n",
    [], [1], [None], [[]], {}, {"a": 1}, [1] * 400, ["a", 1, None], {"__float__": "Infinity"}, "__import__('os')",
    "\x1b[2J\x1b[31m", "\u202eabc", "a\nloftq: done", TOKEN, SIGNED_LINK, f"Bearer {TOKEN}", "https://me:pw@example.com",
)  # fmt: skip

RAW_NUMBERS = (b"1" * 5000, b"-" + b"9" * 400, b"1e999", b"0.1e-9999", b"NaN", b"-Infinity")
COUNTS: tuple[Any, ...] = (0, -1, 1, 3, 10**4, 2**31 - 1, 2**31, 2**63, 10**30, 1.5, True, None, "8", float("nan"))
AMOUNTS: tuple[Any, ...] = (0, -1, 1e-300, 1e6, 1e7, 1e308, -1e308, float("nan"), float("inf"), 10**400, "16", None)

# Expressions that backtrack, do not compile, or match everything.
PATTERNS: tuple[str, ...] = (
    "(a+)+$", "(.*)*x", "(.+.+)+y", ".*.*.*.*.*.*.*q", "(([a-z.]+)+)+!", "(?=(.+))\\1+z", "(x?){500}y", "[", "(?P<n",
    "(" * 400, "a{1,99999999}", "\\", "(?i)", ".*", "", "^$", "(?s:.)*", "q_proj|v_proj", "(?<=a*)b", "\x00", "\u202e",
)  # fmt: skip
