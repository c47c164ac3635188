"""Whether a message wants something done with a question: read off the words around it.

"Translate this:" and "I have a question:" differ in words that no list holds all of, in any language. So every run of
two to six characters of what stands around a question, and of one to three words, counts for a task or against one; the
question's place is one of the characters. What each counts is learnt once, from messages written for this library
(`evaluation.train_task_words`), for questions of any model. It comes with the judge as a table in which a hash gives
each run its row (Weinberger et al., *Feature Hashing for Large Scale Multitask Learning*, arXiv 0902.2206).

Sums are of whole numbers, so they are the same wherever they are made.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
import regex
from numpy.typing import NDArray

from memoir_retrieval.question.text import normalize

__all__ = ["PLACE", "ROWS", "TaskWords", "rows_of"]

PLACE = "\x01"
"""Stands for the question in what is read."""
ROWS = 1 << 18
"""Of a table."""
_CHARACTERS = range(2, 7)  # of a run
_WORDS = range(1, 4)
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}_]+|\n|[^\s]")
_SPACE = regex.compile(r"[^\S\n]+")
_DIGITS = regex.compile(r"\d+")
_FNV = np.uint32(0x01000193)


class TaskWords:
    """What runs of characters and of words count."""

    def __init__(self, table: NDArray[np.int8], step: float, bias: float) -> None:
        """table: int8 [ROWS].
        step: nats that a 1 of the table counts.
        bias: nats that count always.
        """
        self._table, self._step, self._bias = table, step, bias

    def nats(self, text: str) -> float:
        """How much a text speaks for a task: from about 0 on a task is likelier than none.

        text: of a message, with `PLACE` for the question.
        """
        rows = rows_of(text)
        if not len(rows):
            return self._bias
        return self._bias + self._step * int(self._table[rows].sum(dtype=np.int64)) / float(np.sqrt(len(rows)))


@lru_cache(maxsize=256)  # several edits may be near to one message
def rows_of(text: str) -> NDArray[np.int64]:
    """The rows of a table that count for a text, each once: int64 [N].

    text: see `TaskWords.nats`; case, figures and the width of spaces do not count.
    """
    plain = _DIGITS.sub("0", _SPACE.sub(" ", normalize(text, "NFKC").casefold()))
    words = [zlib.crc32(word.encode(errors="surrogatepass")) for word in _WORD.findall(plain)]
    if not words:
        return np.zeros(0, np.int64)
    characters = np.frombuffer(f" {plain} ".encode("utf-32-le", errors="surrogatepass"), np.uint32)
    hashes = [_hashed(characters, length, 0) for length in _CHARACTERS]
    hashes += [_hashed(np.array(words, np.uint32), length, 1) for length in _WORDS]
    rows = np.unique(np.concatenate(hashes) % np.uint32(ROWS)).astype(np.int64)
    rows.flags.writeable = False
    return rows


def _hashed(codes: NDArray[np.uint32], length: int, kind: int) -> NDArray[np.uint32]:
    """A hash of each run of so many codes (FNV-1a over whole codes, its bits mixed): uint32 [N]. kind: of the codes."""
    runs = max(0, len(codes) - length + 1)
    hashes = np.full(runs, 2 * length + kind, np.uint32)
    for place in range(length):
        hashes = (hashes ^ codes[place : place + runs]) * _FNV
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        hashes = (hashes ^ (hashes >> np.uint32(shift))) * np.uint32(factor)
    return hashes ^ (hashes >> np.uint32(16))
