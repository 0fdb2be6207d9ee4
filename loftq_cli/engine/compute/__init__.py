"""From a weight matrix to encoded tensors, on the CPU or a GPU."""
