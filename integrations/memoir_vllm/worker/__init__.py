"""What runs in a worker's process: the edited layer, its lookups and its residual."""
