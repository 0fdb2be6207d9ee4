"""Several recipes in a row: expand a file, convert each in a process of its own, report the results."""
