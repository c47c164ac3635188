"""One residual memory while edits are added to it: its weights, and what the edits in it rely on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memoir_retrieval.editing.train import EditRows, Lesson, Use, answered
from memoir_retrieval.model.base import BaseModel

__all__ = ["Memory", "forgotten"]


class Memory:
    """A residual memory W_m, float32 [H, D], open for more edits.

    `rows`: of each of its edits, by id. `used`: float32 [D, D], C of `train`: the sum of a a^T over their tokens, and
    over those of the edits' answers in other forms, each on its own active columns. Neither is stored, since the edits
    can give them again.
    """

    def __init__(self, weight: torch.Tensor):
        """weight: float32 [H, D], the memory itself."""
        self.weight = weight
        self.used = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
        self.rows: dict[int, EditRows] = {}

    def add(self, edit: int, rows: EditRows) -> None:
        """Count an edit among those that training must leave alone, once where it is there already.

        edit: its id.
        rows: of it.
        """
        self.forget(edit)
        for part in rows:
            self._count(part, 1)
        self.rows[edit] = rows

    def forget(self, edit: int) -> None:
        """Let later edits overwrite an edit, if it is in this memory.

        edit: its id.
        """
        for part in self.rows.pop(edit, ()):
            self._count(part, -1)

    def _count(self, rows: Sequence[Lesson | Use], sign: int) -> None:
        for row in rows:
            a = row.activations
            self.used[row.columns[:, None], row.columns] += sign * (a.T @ a)

    def nearest(self, columns: torch.Tensor, n: int) -> list[int]:
        """Ids of the edits whose masks have most ones among some columns: those that a change there can hurt.

        columns: int64 [C].
        n: how many at most.
        """
        mask = torch.zeros(self.weight.shape[1], dtype=torch.bool, device=columns.device)
        mask[columns] = True
        common = {
            edit: max(int(mask[lesson.columns].sum()) for lesson in rows.lessons) for edit, rows in self.rows.items()
        }
        return sorted(common, key=lambda edit: -common[edit])[:n]


def forgotten(base: BaseModel, edits: Sequence[tuple[Memory, int]]) -> list[tuple[Memory, int]]:
    """Which edits are no longer answered with the weights as they are now.

    base: the model.
    edits: each as its memory and its id.
    """
    questions = [(memory, edit, lesson) for memory, edit in edits for lesson in memory.rows[edit].lessons]
    right = answered(base, [(lesson, memory.weight) for memory, _, lesson in questions])
    wrong = {edit for (_, edit, _), good in zip(questions, right, strict=True) if not good}
    return [(memory, edit) for memory, edit in edits if edit in wrong]
