"""The texts that lie beside the weights: manifest, model card, and where a directory came from."""
