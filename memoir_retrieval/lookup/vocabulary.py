"""The words of a store's questions, to find the one of them that a mistyped word stands for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import numpy as np

from memoir_retrieval.edits.judge import has_digit

__all__ = ["Vocabulary"]

_SHORT = 4
"""Letters below which no word is taken for a mistyped one."""


class Vocabulary:
    """What questions are written with.

    words: of all questions, as `letters_and_words` gives them.

    Two words that differ in a letter, or in the order of two, have in common what is left of them without one. So each
    word is filed under itself and under what is left without each of its letters: 12 bytes for each of these.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._known = frozenset(words)
        self._words = sorted(word for word in self._known if _may_be_mistyped(word))
        pairs = [(hash(part), number) for number, word in enumerate(self._words) for part in _shortened(word)]
        keys, numbers = np.array(pairs, np.int64).reshape(-1, 2).T
        order = np.argsort(keys, kind="stable")
        self._keys, self._word_of = keys[order], numbers[order].astype(np.int32)

    def stranger(self, words: Collection[str]) -> str:
        """The only word that no question has, if it may be a mistyped one; else "".

        words: of a text.
        """
        strangers = {word for word in words if word not in self._known}
        word = strangers.pop() if len(strangers) == 1 else ""
        return word if _may_be_mistyped(word) else ""

    def like(self, word: str) -> Iterator[str]:
        """The words of the questions that a slip may have made another of, with some that none makes.

        word: the other.
        """
        hashes = [hash(part) for part in _shortened(word)]
        first, last = (np.searchsorted(self._keys, hashes, side=side) for side in ("left", "right"))
        places = [np.arange(a, b) for a, b in zip(first, last, strict=True)]
        for number in np.unique(self._word_of[np.concatenate(places)]).tolist():
            yield self._words[number]


def _may_be_mistyped(word: str) -> bool:
    return len(word) >= _SHORT and not has_digit(word)


def _shortened(word: str) -> set[str]:
    """A word, and what is left of it without one letter."""
    return {word, *(word[:i] + word[i + 1 :] for i in range(len(word)))}
