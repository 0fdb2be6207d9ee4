"""What this process runs on: devices, memory, precision, caches."""
