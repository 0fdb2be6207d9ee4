"""Run a model with one of its blocks in memory at a time: for perplexities and for calibration."""
