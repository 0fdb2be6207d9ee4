"""Many conversions: recipes from files, one process each, and what became of them."""
