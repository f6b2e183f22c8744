"""What a run will need, before anything runs: memory by a dry run without memory, time from the device's limits."""
