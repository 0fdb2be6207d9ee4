"""The interfaces of quantizers, and their plain-torch implementations."""
