"""Write the calibration text that ships with loftq: python scripts/calibration_text.py

Prose, dialogue, code, technical documentation, maths, lists and data take turns, so that the first few thousand tokens
hold something of each. The text is committed: it changes only when somebody runs this script and says so in the README
beside it, because recipes record its sha256.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "loftq_cli" / "calibration" / "default" / "text.txt"
_SIZE = 150_000  # bytes
_PIECE = 1400  # characters of one kind before the next one's turn

_CODE = (
    "numerics/methods/loftq.py",
    "numerics/lowrank/truncate.py",
    "numerics/grids/packing.py",
    "forward/text.py",
    "modules/roles.py",
)
_DOCS = ("quick-start.md", "methods.md", "formats.md", "merging.md", "resuming.md")
_PEOPLE = ("Ada", "Ben", "Chen", "Dora", "Emeka", "Farah", "Goran", "Hana", "Ines", "Jonas", "Kofi", "Lucia")
_THINGS = ("apples", "books", "bolts", "candles", "maps", "pencils", "shells", "stamps", "tiles", "tickets")
_PLACES = ("Bergen", "Cusco", "Dakar", "Galway", "Hanoi", "Izmir", "Kyoto", "Lagos", "Porto", "Quito", "Riga", "Tunis")
_TASKS = ("pack the tools", "water the beans", "call the printer", "renew the passport", "measure the window")


def pieces(text: str) -> Iterator[str]:
    """Split a text at blank lines or line ends into pieces of about `_PIECE` characters."""
    piece = ""
    for part in re.split(r"(?<=\n)", text):
        piece += part
        if len(piece) >= _PIECE:
            yield piece.strip("\n")
            piece = ""


def prose() -> Iterator[str]:
    """Yield Lewis Carroll's "Alice's Adventures in Wonderland" (1865), in the public domain."""
    yield from pieces((ROOT / "tests/data/alice/alice.txt").read_text(encoding="utf-8"))


def code() -> Iterator[str]:
    """Yield this project's own source."""
    for name in _CODE:
        yield from pieces((ROOT / "loftq_cli" / name).read_text(encoding="utf-8"))


def documentation() -> Iterator[str]:
    """Yield this project's own manual."""
    for name in _DOCS:
        yield from pieces((ROOT / "docs" / name).read_text(encoding="utf-8"))


def maths(rng: random.Random) -> Iterator[str]:
    """Yield worked problems with their steps."""
    while True:
        yield "\n\n".join(rng.choice((_purchase, _equation, _rectangle, _average))(rng) for _ in range(5))


def _purchase(rng: random.Random) -> str:
    who, what = rng.choice(_PEOPLE), rng.choice(_THINGS)
    count, price, paid = rng.randint(2, 12), rng.randint(2, 9), 200
    total = count * price
    return (
        f"Question: {who} buys {count} {what} at ${price} each and pays with ${paid}. How much change does {who} get?\n"
        f"Answer: {count} {what} cost {count} * {price} = {total} dollars. The change is {paid} - {total} = "
        f"{paid - total} dollars.\n#### {paid - total}"
    )


def _equation(rng: random.Random) -> str:
    a, x, b = rng.randint(2, 9), rng.randint(-9, 9), rng.randint(1, 20)
    right = a * x + b
    return (
        f"Solve {a}x + {b} = {right}. Subtract {b} from both sides: {a}x = {right - b}. Divide by {a}: x = {x}. Check: "
        f"{a} * ({x}) + {b} = {right}."
    )


def _rectangle(rng: random.Random) -> str:
    a, b = rng.randint(3, 40), rng.randint(3, 40)
    return (
        f"A rectangle is {a} cm wide and {b} cm long. Its perimeter is 2({a} + {b}) = {2 * (a + b)} cm, its area "
        f"{a} \\cdot {b} = {a * b} cm^2, and its diagonal $\\sqrt{{{a}^2 + {b}^2}} = \\sqrt{{{a * a + b * b}}} "
        f"\\approx {(a * a + b * b) ** 0.5:.2f}$ cm."
    )


def _average(rng: random.Random) -> str:
    values = [rng.randint(1, 99) for _ in range(rng.randint(3, 7))]
    total = sum(values)
    shown = ", ".join(map(str, values))
    return (
        f"The numbers {shown} add up to {total}. There are {len(values)} of them, so their mean is {total}/"
        f"{len(values)} = {total / len(values):.2f}; the smallest is {min(values)} and the largest {max(values)}."
    )


def conversations(rng: random.Random) -> Iterator[str]:
    """Yield short exchanges of a user and an assistant."""
    while True:
        yield "\n\n".join(rng.choice((_travel, _reminder, _rewrite))(rng) for _ in range(4))


def _travel(rng: random.Random) -> str:
    a, b = rng.sample(_PLACES, 2)
    hours, minutes = rng.randint(1, 14), rng.randrange(0, 60, 5)
    start = rng.randint(5, 9)
    return (
        f"User: I leave {a} at {start:02d}:00 and the journey to {b} takes {hours} hours and "
        f"{minutes} minutes. When do "
        f"I arrive?\nAssistant: You arrive at {start + hours:02d}:{minutes:02d}, if both places are in the same time "
        f"zone.\nUser: And if {b} is one hour ahead?\n"
        f"Assistant: Then local time is {start + hours + 1:02d}:{minutes:02d}. Would you like me to "
        f"look at the way back as well?"
    )


def _reminder(rng: random.Random) -> str:
    who, (first, second) = rng.choice(_PEOPLE), rng.sample(_TASKS, 2)
    return (
        f"User: Please remind {who} to {first} on Thursday.\nAssistant: Done. Shall I add anything else for {who}?\n"
        f'User: Yes, "{second}", but not before the weekend.\nAssistant: I have added "{second}" for Monday morning. '
        f"{who} now has two open tasks."
    )


def _rewrite(rng: random.Random) -> str:
    who, what, where = rng.choice(_PEOPLE), rng.choice(_THINGS), rng.choice(_PLACES)
    return (
        f'User: Make this sentence shorter: "It is the case that the {what} which {who} had ordered from {where} '
        f'have not yet been delivered at this point in time."\nAssistant: "The {what} {who} ordered '
        f"from {where} have not "
        'arrived yet."'
    )


def data(rng: random.Random) -> Iterator[str]:
    """Yield lists, tables, JSON and logs."""
    while True:
        rows = [
            {"id": rng.randint(100, 999), "name": rng.choice(_PEOPLE), "city": rng.choice(_PLACES), "items": items}
            for items in (rng.sample(_THINGS, 2) for _ in range(3))
        ]
        listed = "\n".join(f"{i}. {rng.choice(_TASKS).capitalize()} ({rng.choice(_PEOPLE)})" for i in range(1, 7))
        table = "\n".join(
            f"| {what} | {rng.randint(1, 500)} | {rng.uniform(0.5, 80):.2f} |" for what in rng.sample(_THINGS, 5)
        )
        logs = "\n".join(_log_line(rng) for _ in range(5))
        table = f"| item | count | price |\n|---|---|---|\n{table}"
        yield "\n\n".join((f"To do:\n{listed}", table, json.dumps(rows, indent=1), logs))


def _log_line(rng: random.Random) -> str:
    day = f"2024-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    minute = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    level, worker = rng.choice(("INFO", "WARN", "DEBUG")), rng.randint(0, 7)
    what, done = rng.choice(_THINGS), rng.choice(("loaded", "skipped", "retried"))
    return f"{day}T{minute}Z {level} worker-{worker}: {what} {done} in {rng.uniform(0, 3):.3f} s"


def make() -> bytes:
    """Return the text."""
    rng = random.Random(0)
    turns = (prose(), code(), prose(), maths(rng), documentation(), prose(), conversations(rng), data(rng))
    parts: list[str] = []
    size = 0
    for part in islice((next(turn, "") for turn in cycle(turns)), 10_000):
        size += len(part.encode()) + 2
        if size > _SIZE:
            break
        parts += [part] if part else []
    return ("\n\n".join(parts) + "\n").encode()


if __name__ == "__main__":
    content = make()
    TARGET.write_bytes(content)
    print(f"{TARGET}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")
