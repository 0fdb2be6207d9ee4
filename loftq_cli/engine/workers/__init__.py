"""Several processes that work on one plan: orders, sessions, supervision, launchers."""
