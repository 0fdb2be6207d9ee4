"""Meta's own releases: consolidated.*.pth, params.json and tokenizer.model."""
