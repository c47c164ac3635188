"""What runs in the engine core's process: scheduling and the prefix cache."""
