"""Numba kernels, each beside its plain-torch twin in `numerics`."""
