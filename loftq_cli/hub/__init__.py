"""Requests to the Hub: retries, error messages, datasets."""
