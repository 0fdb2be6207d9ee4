"""Run a model block by block, with weights streamed from a checkpoint."""
