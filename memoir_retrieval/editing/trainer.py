"""Edits trained in open memories and audited, side by side where each has a memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import torch

from memoir_retrieval.editing.memory import Memory, forgotten
from memoir_retrieval.editing.outcome import TrainingStep
from memoir_retrieval.editing.train import EditRows, Frozen, Trained, answered, train_edits
from memoir_retrieval.editing.wordings import Wordings, masked_key
from memoir_retrieval.edits.record import Edit, StoredEdit
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.model.bfloat16 import HalfProducts, half_is_faster
from memoir_retrieval.store.settings import Training

__all__ = ["Learnt", "MemoryTrainer", "Task", "Trainer"]

# Earlier edits that are asked again after each new one: those whose masks overlap most with its own.
NEIGHBOURS = 4
# Edits that are asked in one batch where a whole memory is.
AT_A_TIME = 64
# Nats by which the last step of training must put every right token ahead to count as the exact model's first choice.
# A margin by choice: how far rounded products move logits was not measured.
SURE = 2.0


class Task(NamedTuple):
    """An edit to train.

    id: under which it will be stored.
    edit: what is trained.
    memory: the number of the memory that takes it up.
    rephrases: how many of its rephrasings are trained too and get masks.
    """

    id: int
    edit: Edit | StoredEdit
    memory: int
    rephrases: int = 0


class Learnt(NamedTuple):
    """What came of a task.

    trained: the columns of its memory.
    reason: why the audit refuses it, or "".
    lost: whether it would cost another edit of its memory its answer.
    retried: whether it took a second try.
    stale: ids of its neighbours that had lost their answers before it came.
    """

    trained: Trained
    reason: str
    lost: bool
    retried: bool
    stale: tuple[int, ...] = ()


class MemoryTrainer(Protocol):
    """What trains edits in the memories of one store, here or on other machines.

    Edits of different memories do not touch each other, so the tasks of one call have a memory each.
    """

    @property
    def memories(self) -> Mapping[int, object]:
        """The open memories, by number."""

    def open(self, number: int, weight: torch.Tensor, edits: Sequence[tuple[StoredEdit, int]]) -> None:
        """Train in a memory from now on.

        number: of the memory.
        weight: float32 [H, D], read and, by `take`, written.
        edits: those in it, each with the number of its masks; they are run again.
        """

    def close(self, number: int) -> None:
        """Leave a memory as it is.

        number: of the memory.
        """

    def prepare(self, tasks: Sequence[Task]) -> list[np.ndarray]:
        """Run what is frozen of the tasks that are next, and let go of others that are not taken up. Returns the masks
        of each, uint8 [R, D/8].

        tasks: those that are next.
        """

    def learn(self, tasks: Sequence[Task]) -> list[Learnt]:
        """Train prepared tasks and audit them and their neighbours; nothing is taken up.

        tasks: each of another memory.
        """

    def take(self, task: Task, trained: Trained) -> None:
        """Write a prepared task's columns into its memory and count it among those to be left alone.

        task: as it was prepared.
        trained: its columns.
        """

    def lost(self, number: int, edits: Sequence[int]) -> list[int]:
        """Which edits are no longer answered.

        number: of an open memory.
        edits: ids of some that are in it.
        """

    def forget(self, edit: int) -> None:
        """Let later tasks overwrite an edit, if its memory is open.

        edit: its id.
        """

    def remember(self, number: int, edit: StoredEdit, masks: int) -> None:
        """Count an edit among those that a memory, if it is open, must leave alone.

        number: of the memory.
        edit: as it is stored.
        masks: how many it has.
        """

    def stop(self) -> None:
        """Let go of what is held elsewhere."""


class Trainer:
    """See `MemoryTrainer`. Holds the open memories of a store, by number, and what their edits need."""

    def __init__(
        self,
        base: BaseModel,
        wordings: Wordings,
        training: Training,
        watch: Callable[[TrainingStep], None] = lambda _: None,
        alive: Callable[[], None] = lambda: None,
    ):
        """base: the model.
        wordings: of the store's edits.
        training: how.
        watch: called at every gradient step.
        alive: called between earlier edits, as they are run again or asked.
        """
        self.base = base
        self.watch = watch
        self._alive = alive
        self.training = training
        self.memories: dict[int, Memory] = {}
        self._wordings = wordings
        self._products = HalfProducts(base) if half_is_faster(base) else None
        self._prepared: dict[int, tuple[Frozen, EditRows]] = {}
        self._keys: dict[int, bytes] = {}  # the `masked_key` of each edit, by its id

    def open(self, number: int, weight: torch.Tensor, edits: Sequence[tuple[StoredEdit, int]]) -> None:
        """See `MemoryTrainer`."""
        self.memories[number] = Memory(weight)
        try:
            for edit, masks in edits:
                self.remember(number, edit, masks)
        except BaseException:
            del self.memories[number]  # edits that were not run would not be left alone
            raise

    def close(self, number: int) -> None:
        """See `MemoryTrainer`."""
        del self.memories[number]

    def prepare(self, tasks: Sequence[Task], more: bool = False) -> list[np.ndarray]:
        """See `MemoryTrainer`. more: whether those that were prepared before are kept."""
        if not more:
            self._prepared.clear()
        masks: list[np.ndarray] = []
        for task in tasks:
            frozen, codes = self._wordings.freeze_for_training(task.edit, task.id, task.rephrases, self._quick())
            self._prepared[task.id] = frozen, frozen.rows
            masks.append(codes)
        return masks

    def learn(self, tasks: Sequence[Task]) -> list[Learnt]:
        """See `MemoryTrainer`. Tasks that are not answered are tried once more, with more steps."""
        done = self._try(tasks, self.training)
        again = [task for task, learnt in zip(tasks, done, strict=True) if learnt.reason and not learnt.lost]
        patient = msgspec.structs.replace(
            self.training, stop_loss=self.training.stop_loss / 4, max_steps=2 * self.training.max_steps
        )
        second = self._try(again, patient) if again else []
        better = {task.id: learnt for task, learnt in zip(again, second, strict=True)}
        return [
            better.get(task.id, learnt)._replace(retried=bool(learnt.reason))
            for task, learnt in zip(tasks, done, strict=True)
        ]

    def take(self, task: Task, trained: Trained) -> None:
        """See `MemoryTrainer`."""
        memory = self.memories[task.memory]
        memory.weight[:, trained.columns] = trained.weights
        memory.add(task.id, self._prepared.pop(task.id)[1])
        self._keys[task.id] = masked_key(task.edit, task.rephrases)

    def lost(self, number: int, edits: Sequence[int]) -> list[int]:
        """See `MemoryTrainer`."""
        lost: list[int] = []
        for first in range(0, len(edits), AT_A_TIME):
            self._alive()
            memory, part = self.memories[number], edits[first : first + AT_A_TIME]
            lost += [edit for _, edit in self._forgotten([(memory, edit) for edit in part if edit in memory.rows])]
        return lost

    def forget(self, edit: int) -> None:
        """See `MemoryTrainer`."""
        for memory in self.memories.values():
            memory.forget(edit)

    def remember(self, number: int, edit: StoredEdit, masks: int) -> None:
        """See `MemoryTrainer`."""
        if number in self.memories:
            self._alive()
            rephrases = self._wordings.rephrases(masks)
            self.memories[number].add(edit.id, self._wordings.rows(edit, rephrases, self._quick()))
            self._keys[edit.id] = masked_key(edit, rephrases)

    def stop(self) -> None:
        """See `MemoryTrainer`. The next trainer need not run again what is in the open memories."""
        memories = self.memories.values()
        self._wordings.keep({self._keys[edit]: rows for memory in memories for edit, rows in memory.rows.items()})
        self.memories.clear()

    def _quick(self) -> AbstractContextManager[None]:
        """Within the context the model may round its products, where that is faster."""
        return self._products.used() if self._products else nullcontext()

    def _forgotten(self, edits: Sequence[tuple[Memory, int]]) -> list[tuple[Memory, int]]:
        """As `forgotten`: what seems lost is asked again without rounding."""
        with self._quick():
            edits = forgotten(self.base, edits)
        return forgotten(self.base, edits)

    def _try(self, tasks: Sequence[Task], training: Training) -> list[Learnt]:
        """Train, ask back with the trained weights, and put the memories back."""
        memories = [self.memories[task.memory] for task in tasks]
        prepared = [self._prepared[task.id] for task in tasks]
        with self._quick():
            rows = [(frozen, m.weight, m.used) for m, (frozen, _) in zip(memories, prepared, strict=True)]
            trained = train_edits(self.base, rows, training, self.watch)
        before = [memory.weight[:, change.columns] for memory, change in zip(memories, trained, strict=True)]
        try:
            for memory, change in zip(memories, trained, strict=True):
                memory.weight[:, change.columns] = change.weights
            broken = {i for i, change in enumerate(trained) if not change.finite}
            wrong = broken | self._not_learnt(memories, [rows for _, rows in prepared], trained)
            near = [
                (memory, edit)
                for i, (memory, change) in enumerate(zip(memories, trained, strict=True)) if i not in wrong
                for edit in memory.nearest(change.columns, NEIGHBOURS)
            ]  # fmt: skip
            lost = self._forgotten(near)
        finally:
            for memory, change, weights in zip(memories, trained, before, strict=True):
                memory.weight[:, change.columns] = weights
        # What was lost before is not this edit's doing: it would keep every other one out of the memory.
        stale = {edit for _, edit in forgotten(self.base, lost)}
        done: list[Learnt] = []
        for i, (memory, change) in enumerate(zip(memories, trained, strict=True)):
            reason, mine = "", [edit for of, edit in lost if of is memory]
            overwritten = [edit for edit in mine if edit not in stale]
            if i in broken:
                ranges = f"dtype {self.base.dtype}, ridge {training.ridge:g}"
                reason = f"training gave NaN or infinite numbers after {change.steps} steps ({ranges})"
            elif i in wrong:
                reason = f"the target is not the first choice after {change.steps} steps (loss {change.loss:.3f})"
            elif overwritten:
                reason = f"it would overwrite edit {overwritten[0]}"
            done.append(Learnt(change, reason, bool(overwritten), False, tuple(stale.intersection(mine))))
        return done

    def _not_learnt(self, memories: Sequence[Memory], rows: Sequence[EditRows], trained: Sequence[Trained]) -> set[int]:
        """Places of the tasks that are not answered. Those are asked that training has not seen to be sure."""
        unsure = [
            (i, lesson)
            for i, (own, change) in enumerate(zip(rows, trained, strict=True)) if not change.lead >= SURE
            for lesson in own.lessons
        ]  # fmt: skip
        right = answered(self.base, [(lesson, memories[i].weight) for i, lesson in unsure])
        return {i for (i, _), good in zip(unsure, right, strict=True) if not good}
