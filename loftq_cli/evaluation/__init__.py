"""`loftq eval`: the loss of a model on a text, and what quantization costs it."""
