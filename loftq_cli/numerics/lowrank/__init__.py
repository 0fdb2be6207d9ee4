"""Truncated SVDs: exact, fast and batched."""
