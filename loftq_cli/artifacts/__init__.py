"""What stands beside the weights: adapter, manifest, model card."""
