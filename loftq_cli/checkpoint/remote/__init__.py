"""A model on the Hub, read by range requests."""
