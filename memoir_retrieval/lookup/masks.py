"""From the masks of questions to the edits that act on them: the nearest of those that may.

Masks may be alike for questions that differ in a name, or ask something else about the same one. An edit that
`requires` texts acts only on questions in which they stand (`edits.requires`). Of the edits that may act on a question
the nearest one matches, so another edit in its way, however near, does not hide it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from memoir_index import Hits, hamming_radius, popcount
from memoir_retrieval.edits.requires import Phrases
from memoir_retrieval.store.read import EditStore

__all__ = ["Decode", "EditLookup"]

Decode = Callable[[Sequence[int]], str]
"""The text of token ids, as the tokenizer of the store's model decodes them."""

_MOST = 1 << 14  # rows that are compared at a time


class EditLookup:
    """The masks of a store and what its edits require.

    index: all masks, in the order of the store's rows. read: called for the text of a question where the store has
    edits that require some. Safe to use from several threads.
    """

    def __init__(self, store: EditStore, decode: Decode) -> None:
        self.index = store.index()
        self._decode = decode
        bound = [edit for edit in store.edits if edit.requires]
        self._phrases = Phrases((edit.id, edit.requires) for edit in bound)
        self._free = self.index
        if not bound:
            return
        decode(())  # whatever it has to load is loaded now, not in the first lookup
        numbers = np.unique(np.array([edit.id for edit in bound], dtype=np.int64))
        tied = np.isin(store.ids, numbers)
        self._free = store.index()
        self._free.remove(numbers)
        self._free_rows = np.flatnonzero(~tied)
        rows = np.flatnonzero(tied)
        self._rows = rows[np.argsort(store.ids[rows], kind="stable")]
        self._ids = store.ids[self._rows]

    def prepare(self, tau: float) -> None:
        """See `HammingIndex.prepare`."""
        self._free.prepare(tau)

    def search(
        self, codes: NDArray[np.uint8], tau: float, questions: Sequence[Sequence[int]], *, exact: bool = False
    ) -> Hits:
        """The edit that acts on each question, as `HammingIndex.search` returns it, among those that may.

        codes: uint8 [Q, D/8]. questions: of each the token ids of its span. Overlaps of questions that match nothing
        are those of the nearest edit that may act. exact, and errors: as `HammingIndex.search`.
        """
        hits = self._free.search(codes, tau, exact=exact)
        if not self._phrases:
            return hits
        ids, overlaps, rows = hits.ids, hits.overlaps, hits.rows
        matches = rows >= 0
        rows[matches] = self._free_rows[rows[matches]]
        k, radius = self.index.k, hamming_radius(tau, self.index.k)
        for q, question in enumerate(questions):
            row, bits = self._nearest_tied(codes[q], self._phrases.found_in(self._decode(question)))
            overlap = bits / k
            if row < 0 or overlap < overlaps[q] or (overlap == overlaps[q] and 0 <= rows[q] < row):
                continue
            overlaps[q] = overlap
            if 2 * (k - bits) <= radius:
                ids[q], rows[q] = self.index.ids[row], row
        return Hits(ids, overlaps, rows)

    def _nearest_tied(self, code: NDArray[np.uint8], edits: set[int]) -> tuple[int, int]:
        """Row and common bits of the nearest mask of these edits, the earliest among equals; (-1, 0) without edits."""
        if not edits:
            return -1, 0
        numbers = np.sort(np.fromiter(edits, np.int64, len(edits)))
        first = np.searchsorted(self._ids, numbers)
        counts = np.searchsorted(self._ids, numbers, side="right") - first
        behind = np.repeat(first - np.cumsum(counts) + counts, counts)  # what to add to a position in what follows
        rows = np.sort(self._rows[behind + np.arange(len(behind))])
        best, most = -1, 0
        for start in range(0, len(rows), _MOST):
            part = rows[start : start + _MOST]
            bits = popcount(self.index.take(part) & code)
            nearest = int(bits.argmax())
            if best < 0 or bits[nearest] > most:
                best, most = int(part[nearest]), int(bits[nearest])
        return best, most
