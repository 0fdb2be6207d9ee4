"""Push a finished directory to the Hub."""
