"""What a plan will take here: memory, schedule, time."""
