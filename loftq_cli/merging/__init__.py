"""Fold a trained adapter into its backbone."""
