"""Checkpoints in Meta's own format: consolidated.*.pth, params.json and tokenizer.model."""
