"""`--calibrate`: second moments of the inputs of every linear layer, measured on a text."""
