"""Folders of a checkout."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
SHARED = Path(os.environ.get("LOFTQ_SHARED", ROOT.parent / "shared"))
