"""Edits as users write them: the records, the files that hold them, the words that they require."""
