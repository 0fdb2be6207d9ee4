"""Rewrite the table of containers in README.md from the code: python scripts/formats_table.py"""

from __future__ import annotations

from pathlib import Path

from loftq_cli.formats.capabilities import markdown_table

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- containers: made by scripts/formats_table.py -->", "<!-- end of containers -->"


def with_table(readme: str) -> str:
    """The README with the current table between its markers."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{markdown_table()}\n\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
