"""The root of every error this distribution raises on purpose."""

from __future__ import annotations

from typing import Any


class MemoirError(Exception):
    """The root of all errors of this distribution. One line: the value that is wrong, why, and what to do instead.

    >>> from memoir_retrieval import EditStore, MemoirError
    >>> try:
    ...     EditStore.open("nowhere")
    ... except MemoirError as error:
    ...     print(error)
    store nowhere does not exist: make one with `memoir edit FILE --model NAME --store nowhere`

    fact: the line without its end.
    cure: its end, what to do; a front end may say what to type instead.
    reason: the kind of error, by which a front end knows what that is; "" where `fact` says it all.
    about: what is wrong, as far as a front end needs it for that.
    """

    def __init__(self, fact: str = "", *, cure: str = "", reason: str = "", about: Any = None) -> None:
        super().__init__(f"{fact}: {cure}" if cure else fact)
        self.fact = fact
        self.cure = cure
        self.reason = reason
        self.about = about


class CodeError(MemoirError, ValueError):
    """A packed mask or an id that the index refuses."""
