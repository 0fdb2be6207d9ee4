"""Find the matrices of a checkpoint, their place in the running model, and those that must stay in full precision."""
