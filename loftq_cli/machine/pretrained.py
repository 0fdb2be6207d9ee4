"""The one place that calls `from_pretrained` of transformers' classes.

Left to its default, transformers asks on standard input whether to run a model's own code, and a piped "y" runs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def open_pretrained(loader: Any, source: str | Path, *, trust_remote_code: bool | None = None, **options: Any) -> Any:
    """Call `loader.from_pretrained`. The model's own code runs only if the caller of the Python API says so.

    Args:
        loader: a class of transformers, such as AutoTokenizer.
        trust_remote_code: True runs the repository's code; None means False.

    Raises:
        Exception: whatever transformers raises; ValueError if the source needs its own code.
    """
    return loader.from_pretrained(source, trust_remote_code=trust_remote_code is True, **options)
