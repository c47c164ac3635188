"""Edits of one question with different answers: found, decided and worded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from memoir_index import HammingIndex, unpack
from memoir_retrieval.edits.files import check_duplicates
from memoir_retrieval.edits.judge import Judge
from memoir_retrieval.edits.record import Edit, StoredEdit, masked_texts, prompt_key
from memoir_retrieval.edits.requires import one_question
from memoir_retrieval.errors import EditFileError, Reason

__all__ = [
    "SAME_QUESTION",
    "Conflict",
    "Conflicting",
    "contradiction",
    "distinct",
    "plan",
    "rivals",
    "same_edit",
]

Conflict = Literal["refuse", "first", "last", "both"]
"""What happens to a question that is stored with another answer: see `Editor.add`."""

SAME_QUESTION = 0.85
"""Overlap from which on two prompts count as one question in other words (docs/measurements/choices.md)."""


@dataclass(frozen=True)
class Conflicting:
    """An edit whose question an edit of the store answers differently.

    prompt, target: of the edit that came later.
    stored: the edit of the store.
    overlap: of their masks, in [0, 1], those of rephrasings included; 1.0 where a wording of both is the same text.
    """

    prompt: str
    target: str
    stored: StoredEdit
    overlap: float

    @property
    def fact(self) -> str:
        """All of it in one line, without what to do about it."""
        there = self.stored
        return (
            f"{self.prompt!r} -> {self.target!r} with edit {there.id}, {there.prompt!r} -> {there.target!r} "
            f"(overlap {self.overlap})"
        )


def plan(
    edits: Sequence[Edit],
    stored: Sequence[StoredEdit],
    on_conflict: Conflict,
    masked: Callable[[StoredEdit], int],
    rephrase_masks: bool = False,
) -> tuple[list[Edit], dict[str, StoredEdit]]:
    """The edits to train, each prompt once, and by question (`prompt_key`) the stored edits which they replace.

    edits: what is to be added.
    stored: what the store holds.
    on_conflict: what happens to a prompt that is stored, or comes again, with another target.
    masked: how many rephrasings of a stored edit have masks.
    rephrase_masks: whether all are to have them.
    Raises EditFileError where `on_conflict` does not settle it, and for an edit that was built with masks of other
    rephrasings than it comes with, unless it gets new ones.
    """
    known = {prompt_key(edit.prompt): edit for edit in stored}
    todo: list[Edit] = []
    replaced: dict[str, StoredEdit] = {}
    for edit in check_duplicates(edits, "refuse" if on_conflict == "both" else on_conflict):
        old = known.get(prompt_key(edit.prompt))
        if old is None:
            todo.append(edit)
        elif not old.trained:
            # Built with requirements, and trained from a file that says nothing of them: they still hold.
            kept = edit if edit.requires else msgspec.structs.replace(edit, requires=old.requires)
            # So do rephrasings that were built with masks.
            built = old.rephrases[: masked(old)]
            if built and not kept.rephrases:
                kept = msgspec.structs.replace(kept, rephrases=old.rephrases)
            if kept.rephrases[: len(built)] != built and not rephrase_masks:
                raise EditFileError(
                    f"prompt {edit.prompt!r} was built with masks of other rephrasings (edit {old.id}) than it has now",
                    cure="give those of now masks with rephrase_masks, or leave its rephrasings out",
                    reason=Reason.REPHRASES,
                )
            todo.append(kept)
            replaced[prompt_key(edit.prompt)] = old
        elif same_edit(old, edit) and rephrase_masks and edit.rephrases != old.rephrases[: masked(old)]:
            todo.append(edit)
            replaced[prompt_key(edit.prompt)] = old
        elif same_edit(old, edit) or on_conflict == "first":
            continue
        elif on_conflict == "last":
            todo.append(edit)
            replaced[prompt_key(edit.prompt)] = old
        else:
            fact = contradiction(old, edit)
            raise EditFileError(
                f"{fact} (one question cannot keep both)" if on_conflict == "both" else fact,
                cure='choose with on_conflict, "first" (keep the stored one) or "last" (replace it)',
                reason=Reason.CONFLICT,
            )
    return todo, replaced


def same_edit(stored: StoredEdit, edit: Edit) -> bool:
    """Whether a stored edit is the given one: it has the same prompt, target and requirements.

    stored: an edit of the store.
    edit: one that is to be added.
    """
    same = prompt_key(stored.prompt) == prompt_key(edit.prompt)
    return same and stored.target == edit.target and stored.requires == edit.requires


def contradiction(stored: StoredEdit, edit: Edit) -> str:
    """In which way an edit of the same prompt differs from the stored one, in one line without what to do about it.

    stored: the edit of the store.
    edit: one of the same prompt with another target, or else other requirements.
    """
    name = "target" if stored.target != edit.target else "requires"

    def shown(value: object) -> str:
        return repr(value) if isinstance(value, str) else msgspec.json.encode(value).decode()

    return (
        f"prompt {edit.prompt!r} is stored with {name} {shown(getattr(stored, name))} (edit {stored.id}), not "
        f"{shown(getattr(edit, name))}"
    )


def rivals(
    edit: Edit | StoredEdit,
    codes: np.ndarray,
    index: HammingIndex,
    stored: Sequence[StoredEdit],
    judge: Judge | None,
    contexts: int,
) -> list[Conflicting]:
    """The stored edits that answer the same question differently, going by the masks and the judge; the nearest first.

    edit: the new one.
    codes: uint8 [R, D/8], the masks of its prompt and of the first R - 1 of its rephrasings.
    index: the masks of the stored edits.
    stored: these edits.
    judge: the store's, which tells questions apart by their words; None where masks alone do.
    contexts: how many masks each edit has of its question after something else.
    """
    overlaps: dict[int, float] = {}
    alike: set[int] = set()
    for text, code in zip((edit.prompt, *edit.rephrases), codes[:, None], strict=False):
        if index.search(code, SAME_QUESTION).ids[0] < 0:
            continue
        near = dict(_similar(code, index))
        masks = Counter(index.ids[np.isin(index.ids, list(near))].tolist())
        for other in stored:
            if other.id not in near or not other.trained or prompt_key(other.target) == prompt_key(edit.target):
                continue
            overlaps[other.id] = max(near[other.id], overlaps.get(other.id, 0.0))
            # Similar questions about other names are no rivals.
            if other.id not in alike and any(
                one_question(other, wording, edit, text) and (judge is None or _alike(judge, wording, text))
                for wording in masked_texts(other, masks[other.id], contexts)
            ):
                alike.add(other.id)
    against = [
        Conflicting(edit.prompt, edit.target, other, round(overlaps[other.id], 4))
        for other in stored if other.id in alike
    ]  # fmt: skip
    return sorted(against, key=lambda conflict: -conflict.overlap)


def _alike(judge: Judge, a: str, b: str) -> bool:
    """Whether one of two prompts asks the question of the other."""
    return judge.verdict(a, b).same or judge.verdict(b, a).same


def _similar(code: np.ndarray, index: HammingIndex) -> list[tuple[int, float]]:
    """Ids and overlaps of all stored edits with nearly this mask, the nearest first."""
    n = 16
    while True:
        ids, overlaps = index.nearest(code, n)
        pairs = zip(ids[0].tolist(), overlaps[0].tolist(), strict=True)
        similar = [(number, overlap) for number, overlap in pairs if overlap >= SAME_QUESTION]
        if len(similar) < n:
            return similar
        n *= 4


def distinct(codes: Sequence[np.ndarray], d: int, k: int) -> int:
    """How many edits come before the first that asks the same question as one before it; all where none does.

    codes: of each edit uint8 [R, D/8], the masks of its wordings, packed.
    d: bits of a mask, D.
    k: bits that are set in each.
    """
    bits = unpack(np.concatenate(codes), d).astype(np.float32)
    edit = np.repeat(np.arange(len(codes)), [len(rows) for rows in codes])
    alike = (bits @ bits.T >= SAME_QUESTION * k) & (edit[:, None] > edit)
    return int(edit[alike.any(axis=1)].min(initial=len(codes)))
