"""What a prompt looks like: its token ids, the span that is its question, the fingerprint of that."""
