"""Models on the Hub, read by range requests."""
