"""MEMOIR edits for language models: train them, store them, look them up."""
