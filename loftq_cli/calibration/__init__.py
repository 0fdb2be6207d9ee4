"""`--calibrate`: second moments of what every linear layer is given, from a text."""
