"""Several processes on one plan: orders, sessions, supervision, launchers."""
