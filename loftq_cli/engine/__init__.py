"""Run a plan: read, convert, write in place, record, finish."""
