"""Tables at 80 columns: names wrap at separators, numbers are whole."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from loftq_cli.cli.tables import Name, name_table, wrapped_name

LONG = "model.language_model.layers.61.mlp.shared_experts.gate_up_proj"


def test_names_wrap_after_separators_only() -> None:
    assert wrapped_name(LONG, 22) == ["model.language_model.", "layers.61.mlp.shared_", "experts.gate_up_proj"]
    assert wrapped_name("path/to/Llama-2-13b", 9) == ["path/to/", "Llama-2-", "13b"]
    assert wrapped_name("indivisible", 4) == ["indivisible"]
    assert "".join(wrapped_name(LONG, 10)) == LONG


@pytest.mark.parametrize("width", [80, 120])
def test_numbers_are_whole_however_long_the_name(width: int) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width)
    numbers = ("count", "out × in", "bits", "block", "rank", "plain", "kept", "bytes")
    table = name_table(console, "matrix", *numbers, right=numbers)
    cells = ("2048", "11008 × 4096", "3 fitted", "256", "256", "0.5602", "0.4591", "99.9 MB")
    table.add_row(Name(LONG), *cells)
    console.print(table)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "…" not in file.getvalue()
    assert all(cell in lines[1] for cell in cells)
    assert "".join(line.split("  ")[0].split(" ")[0].strip() for line in lines[1:]) == LONG
