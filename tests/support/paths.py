"""Folders of a checkout."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
# Larger models and texts outside the project, for whoever has them.
SHARED = Path(os.environ["LOFTQ_SHARED"]) if "LOFTQ_SHARED" in os.environ else None
