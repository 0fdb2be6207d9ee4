"""LoftQ and its quantizers: tensors in, frozen dataclasses out."""
