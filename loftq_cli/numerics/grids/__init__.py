"""The grids that weights are rounded to, and the packing of their codes."""
