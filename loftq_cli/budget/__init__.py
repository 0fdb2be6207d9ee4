"""Choose bits and ranks per matrix under one budget: measure the options, then allocate."""
