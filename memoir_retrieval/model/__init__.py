"""A Hugging Face decoder that is cut at the edited block, and the presets of known models."""
