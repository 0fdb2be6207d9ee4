"""Bits and ranks matrix by matrix under one budget: measure the choices, then allocate."""
