"""tau from the store itself, set again with every change of its edits.

A store that sets its own tau keeps the masks of reference prompts, which no edit should match, and compares them with
its edits as a lookup does. Of n reference prompts m are near: they share tau of their bits with a mask. Of p the judge
of questions takes one of the nearest edits for theirs, however far it is. Then of other prompts like them at most
(m + 1) / (n + 1) are near, and at most (p + 1) / (n + 1) pass the judge. The product of both is the bound, which
presumes that near prompts pass no more often than others. tau is the least at which the bound is no more than
`MOST_MATCHED`. Without a judge the first factor alone is the bound, and tau the least that none reaches and `MARGIN`.
`docs/measurements/many-edits.md` says how many other prompts match.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from memoir_index import HammingIndex, hamming_radius
from memoir_retrieval.edits.judge import Judge, letters
from memoir_retrieval.edits.record import StoredEdit, masked_texts
from memoir_retrieval.edits.requires import Phrases, required_texts

__all__ = [
    "CANDIDATES",
    "GRID",
    "MARGIN",
    "MOST_MATCHED",
    "NO_REFERENCES",
    "References",
    "Threshold",
    "bits_needed",
    "least_tau",
    "set_tau",
    "threshold_fault",
]

GRID = tuple(step / 100 for step in range(1, 101))
MOST_MATCHED = 0.0005
"""Share of unrelated prompts that may match an edit."""
MARGIN = 0.02
"""Added, where masks alone decide, to the least tau that no prompt reaches: a sample holds less than its population's
largest overlap."""
FLOOR = 0.53
"""Least tau where a judge decides, too: from 0.52 on no more tasks about a question get its edit than at 0.55."""
CANDIDATES = 8
"""Edits, at most, that are judged for a question: in a lookup, and of each reference prompt."""


class References(NamedTuple):
    """Prompts that no edit should match.

    codes: uint8 [n, D/8], their masks.
    texts: the prompts.
    """

    codes: NDArray[np.uint8]
    texts: tuple[str, ...]


NO_REFERENCES = References(np.empty((0, 0), np.uint8), ())
"""Of a store whose tau somebody has chosen."""


class Threshold(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What tau rests on in a store that sets it itself.

    references: prompts that were compared with the edits; those with the words of a near edit are left out.
    near: how many of them share tau of their bits with a mask.
    passed: of how many the judge takes one of the nearest edits for theirs; None where masks alone decide.
    """

    references: int
    near: int
    passed: int | None = None

    @property
    def bound(self) -> float:
        """The share of prompts that match an edit, at most; see the module."""
        near = (self.near + 1) / (self.references + 1)
        return near if self.passed is None else near * (self.passed + 1) / (self.references + 1)


def threshold_fault(threshold: Threshold) -> str:
    """What of a threshold's numbers cannot be, or nothing.

    threshold: as it was read.
    """
    counts = (threshold.near, threshold.passed or 0)
    fits = min(counts) >= 0 and max(counts) <= threshold.references
    return "" if fits else f"threshold of {threshold.references} references, {counts[0]} near, {counts[1]} passed"


def set_tau(
    index: HammingIndex,
    edits: Iterable[StoredEdit],
    references: References,
    judge: Judge | None,
    contexts: int,
) -> tuple[float, Threshold]:
    """tau of a store with these edits, and what it rests on.

    index: the masks of the edits.
    edits: all of them.
    references: of the store.
    judge: what decides behind the masks; None where they decide alone.
    contexts: how many masks each edit has of its question after something else.
    """
    bits, passed = _compare(index, edits, references, judge, contexts)
    count = int(passed.sum()) if judge else None

    def at(tau: float) -> Threshold:
        return Threshold(len(bits), int(np.sum(bits >= bits_needed(tau, index.k))), count)

    tau = least_tau(bits, index.k)
    if judge:
        tau = next((t for t in GRID if t >= FLOOR and at(t).bound <= MOST_MATCHED), max(FLOOR, tau))
    return tau, at(tau)


def least_tau(bits: NDArray[np.int64], k: int) -> float:
    """The least tau on a grid of .01 that no prompt reaches, plus `MARGIN`; at most 1.

    bits: int64 [n], how many of k each has in common with the mask of an edit.
    k: ones in a mask.
    """
    most = int(bits.max(initial=0))
    least = next((tau for tau in GRID if most < bits_needed(tau, k)), 1.0)
    return min(1.0, round(least + MARGIN, 2))


def bits_needed(tau: float, k: int) -> int:
    """Bits two masks must share to match at tau: the same whole number that lookup and server compare with.

    tau: in (0, 1].
    k: ones in a mask.
    """
    return k - hamming_radius(tau, k) // 2


def _compare(
    index: HammingIndex, edits: Iterable[StoredEdit], references: References, judge: Judge | None, contexts: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Of each reference prompt the bits in common with the nearest edit, or 0: int64 [n]; and
    whether the judge takes one of the nearest for its question: bool [n].

    Those with the very words of an edit that is near are left out.
    """
    numbers, overlaps = index.nearest(references.codes, CANDIDATES)
    wanted = set(numbers[numbers >= 0].tolist())
    by_id = {edit.id: edit for edit in edits if edit.id in wanted}
    phrases = Phrases((edit.id, edit.requires) for edit in by_id.values() if edit.requires)
    masks = dict(zip(*(column.tolist() for column in np.unique(index.ids, return_counts=True)), strict=True))
    wordings = {number: masked_texts(edit, masks[number], contexts) for number, edit in by_id.items()}
    bits, passed = [], []
    for text, row, shares in zip(references.texts, numbers.tolist(), overlaps.tolist(), strict=True):
        near = [(number, share) for number, share in zip(row, shares, strict=True) if number >= 0]
        if any(letters(text) == letters(prompt) for number, _ in near for prompt in wordings[number]):
            continue
        there = phrases.found_in(text) if phrases else set()
        # tau is chosen as if nothing were required, since a name may stand in a question of something else.
        bits.append(round(near[0][1] * index.k) if near else 0)
        acting = [number for number, _ in near if not by_id[number].requires or number in there]
        passed.append(
            judge is not None
            and any(
                _is_same(judge, prompt, required_texts(by_id[number].requires), text)
                for number in acting
                for prompt in wordings[number]
            )
        )
    return np.array(bits, np.int64), np.array(passed, np.bool_)


@lru_cache(maxsize=1 << 15)
def _is_same(judge: Judge, prompt: str, required: tuple[str, ...], text: str) -> bool:
    """Whether the judge takes a text for an edit's question. Kept, since the next commit asks the same of most."""
    return judge.verdict(prompt, text, "", required).same
