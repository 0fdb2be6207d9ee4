"""Seeded fuzzing of everything a user can point loftq at; `tests/fuzz.py` is the command."""
