"""The values of the trellis's states, from the tables that scripts/make_trellis_tables.py has trained."""

from __future__ import annotations

import base64
from functools import cache

from loftq_cli.numerics.grids.trellis_table_data import TABLES

TABLE_SCALE = 4096  # tables contain multiples of 1 / TABLE_SCALE
TABLE_NUMBER = 1  # of these tables, in config.json of a packed checkpoint


def has_table(bits: int, state_bits: int) -> bool:
    """True if there is a table."""
    return (bits, state_bits) in TABLES


@cache
def table_values(bits: int, state_bits: int) -> tuple[int, ...]:
    """Return the value of each state, as a multiple of 1 / TABLE_SCALE.

    Raises:
        KeyError: there is no such table.
    """
    content = base64.b64decode(TABLES[bits, state_bits])
    pairs = zip(content[::2], content[1::2])
    return tuple((low | high << 8) - ((high & 0x80) << 9) for low, high in pairs)
