"""The cost of a plan on this machine: memory, schedule, time."""
