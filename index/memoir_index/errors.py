"""The root of every error this distribution raises on purpose."""


class MemoirError(Exception):
    """One line: the value that is wrong, why, and what to type instead."""


class CodeError(MemoirError, ValueError):
    """A packed mask or an id that the index refuses."""
