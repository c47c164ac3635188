"""The edit store on disk: read, written, verified, added to, shared."""
