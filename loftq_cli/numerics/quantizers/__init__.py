"""What LoftQ asks of a container's quantizer, in plain torch."""
