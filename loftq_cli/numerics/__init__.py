"""The pure numeric core: tensors in, frozen dataclasses out. No I/O, no device choice, no logging."""
