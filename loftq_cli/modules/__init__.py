"""Which tensors are matrices, where the running model keeps them, and which must stay in full precision."""
