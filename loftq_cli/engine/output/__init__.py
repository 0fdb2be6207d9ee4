"""The output directory while it is being written: journal, lock, publishing."""
