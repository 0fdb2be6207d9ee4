"""The registry: light to import, and what `auto` and `load` find in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loftq_cli.errors import UsageError
from loftq_cli.formats import FORMATS, choose_container, container_in, container_of, get_container, get_format
from loftq_cli.formats.container import AutoRequest


def test_declarations_load_no_torch() -> None:
    program = (
        "import sys, loftq_cli.formats.capabilities as table; table.markdown_table();"
        "print([name for name in ('torch', 'transformers', 'numpy', 'gguf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stderr or done.stdout


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (AutoRequest({4}, "nf"), "bnb"),
        (AutoRequest({4}, "nf4-subset", {"linear", "head"}), "bnb"),
        (AutoRequest({2, 4}, "nf"), "packed"),
        (AutoRequest({4}, "int"), "packed"),
        (AutoRequest({4}, "nf", {"linear", "expert"}), "packed"),
        (AutoRequest({4}, "nf", {"embedding"}), "packed"),
        (AutoRequest({4}, "nf", (), ["bitsandbytes"]), "packed"),
    ],
)
def test_auto_takes_the_first_that_fits(request_: AutoRequest, name: str) -> None:
    assert choose_container(request_).name == name


def test_containers_are_found_by_what_is_on_disk(tmp_path: Path) -> None:
    assert container_in(tmp_path) is None
    for container in FORMATS.values():
        if container.file:
            (tmp_path / container.file).touch()
            assert container_in(tmp_path) is container
        if container.quant_method:
            found = container_of(container.quant_method)
            assert found is not None and found.loading == container.loading
    assert container_of("awq") is None and container_of("") is None


def test_an_unknown_name_is_one_sentence() -> None:
    for find in (get_container, get_format):
        with pytest.raises(UsageError, match="there is no format 'zip': choose auto, packed, bnb, "):
            find("zip")
