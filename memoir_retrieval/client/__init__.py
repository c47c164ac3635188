"""Asking a running server: as a model, as a check of its edits, as its administration."""
