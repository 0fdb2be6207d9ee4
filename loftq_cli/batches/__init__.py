"""Batches of recipes: expand files into jobs, convert each in its own process, report the results."""
