"""Batches of edits, trained, audited and taken up into an open store."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from memoir_retrieval.editing.conflicts import Conflict, Conflicting, distinct, rivals
from memoir_retrieval.editing.open_store import OpenStore
from memoir_retrieval.editing.outcome import Failed, Outcome, Progress
from memoir_retrieval.editing.places import Places
from memoir_retrieval.editing.trainer import Learnt, MemoryTrainer, Task
from memoir_retrieval.editing.wordings import Wordings, masked_key
from memoir_retrieval.edits.record import Edit, StoredEdit, edit_time, stored_as

__all__ = ["Checkpoints", "Choices", "NewEdit", "Session"]

# Edits of its memory that are asked again for each that was trained there. Those of a full memory are all asked.
TURNS = 4
# A checkpoint rewrites the store. Its cost is bounded by writing at most this often (seconds) while edits go on.
CHECKPOINT_EVERY = 30.0


class NewEdit(NamedTuple):
    """An edit to be added.

    edit: what is trained.
    id: under which it is stored.
    rephrases: how many of its rephrasings are trained too.
    old: the stored edit that it replaces.
    """

    edit: Edit | StoredEdit
    id: int
    rephrases: int
    old: StoredEdit | None = None


class Choices(NamedTuple):
    """How a batch is trained.

    side_by_side: how many memories are open.
    on_conflict, keep_failed: see `Editor.add`.
    left: edits that are still to come, if no more memories are begun than those fill.
    """

    side_by_side: int
    on_conflict: Conflict = "refuse"
    keep_failed: bool = False
    left: int | None = None


class Checkpoints:
    """Commits a store now and then while edits go on."""

    def __init__(self, store: OpenStore):
        """store: whose changes are committed."""
        self._store = store
        self._committed, self._pause = time.monotonic(), CHECKPOINT_EVERY

    def __call__(self) -> None:
        """Commit what has changed if that is due."""
        now = time.monotonic()
        if self._store.changed and now - self._committed > self._pause:
            self._store.commit()
            self._committed = time.monotonic()
            self._pause = max(CHECKPOINT_EVERY, 20 * (self._committed - now))


class Session:
    """A trainer at work on an open store. `places`: the memories, shared out among the edits."""

    def __init__(
        self,
        store: OpenStore,
        make_trainer: Callable[[Wordings], MemoryTrainer],
        wordings: Wordings | None,
    ):
        """store: what is written.
        make_trainer: what trains, from the wordings of the store's edits.
        wordings: those of an earlier session, if any, used again if they are this store's.
        """
        self._store = store
        settings = store.base, store.manifest, store.fingerprint, store.training
        self.wordings = wordings if wordings and wordings.fit(*settings) else Wordings(*settings)
        self.trainer = make_trainer(self.wordings)
        self.places = Places(store, self.trainer)
        self._trained: Counter[int] = Counter()  # edits in each memory since it was asked back
        self._met: set[int] = set()  # memories that an edit was trained in
        self._turn: dict[int, int] = {}  # the edit of each memory that was asked last
        self._lost: list[int] = []
        self._tried: set[int] = set()  # ids of edits that were trained again, or were not learnt

    def stored_again(self, edits: Sequence[StoredEdit], masks: Counter[int]) -> list[NewEdit]:
        """Stored edits as they are trained from nothing.

        edits: as they are stored.
        masks: how many each has, by its id.
        """
        return [NewEdit(edit, edit.id, self.wordings.rephrases(masks[edit.id])) for edit in edits]

    def train_all(
        self,
        total: int,
        batch: Callable[[int], Sequence[NewEdit]],
        outcome: Outcome,
        choices: Choices,
        progress: Callable[[Progress], None],
        checkpoint: Callable[[], None] = lambda: None,
    ) -> None:
        """Train batch after batch.

        total: how many edits there are.
        batch: those that are next, given how many are dealt with.
        outcome, choices: see `train`; `left` is that of the first batch.
        progress: called after every edit.
        checkpoint: called after every batch, before that.
        """
        started, done = time.monotonic(), 0
        while done < total:
            left = None if choices.left is None else choices.left - done
            stored = self.train(batch(done), outcome, choices._replace(left=left))
            seconds = time.monotonic() - started
            checkpoint()
            for edit in stored:
                done += 1
                progress(Progress(done, total, edit, seconds))
            self._renew(outcome, choices, set())  # what a memory had lost when it was left
        again, once = True, set[int]()
        while again:
            for number in list(self.trainer.memories):
                self._ask_back(number)
            again = self._renew(outcome, choices, once)
        now = {edit.id: edit for edit in self._store.edits}
        outcome.stored = [now.get(edit.id, edit) for edit in outcome.stored]  # one may be replaced by now

    def _renew(self, outcome: Outcome, choices: Choices, once: set[int]) -> bool:
        """Train again, elsewhere, what later edits have overwritten. The audit of each asks its neighbours only.

        once: ids of those that are not trained again any more; they are added to it.
        Returns whether there was anything. What is given up is among the failed of the outcome.
        """
        stored = {edit.id: edit for edit in self._store.edits} if self._lost else {}
        lost = [stored[i] for i in dict.fromkeys(self._lost) if i in stored]
        self._lost.clear()
        # One that took all steps of its second try costs as many again, and is likely to be lost again.
        given_up = {edit.id for edit in lost if edit.id in once or (edit.id in self._tried and self._took_all(edit))}
        for edit in lost:
            if edit.id in given_up:
                self._fail(outcome, Failed(edit.prompt, edit.target, "later edits have overwritten it"))
        lost = [edit for edit in lost if edit.id not in given_up]
        choices = choices._replace(on_conflict="both", keep_failed=True, left=1)
        masks = Counter(self._store.index.ids.tolist()) if lost else Counter()
        for new in self.stored_again(lost, masks):
            again = Outcome()
            self.train([new._replace(old=stored[new.id])], again, choices)
            for failed in again.failed:
                self._fail(outcome, failed)
            once.add(new.id)
            self._tried.add(new.id)
            self._lost = [i for i in self._lost if i != new.id]  # noted before it was trained again
            # One may be lost in several memories, one after the other.
            if not again.failed and new.id not in outcome.renewed:
                outcome.renewed.append(new.id)
        return bool(lost)

    def _took_all(self, edit: StoredEdit) -> bool:
        """Whether an edit took all steps of its second try: it is hardly learnt, or not at all."""
        return edit.steps >= 2 * self._store.training.max_steps

    @staticmethod
    def _fail(outcome: Outcome, failed: Failed) -> None:
        """Name an edit among the failed ones, once."""
        if (failed.prompt, failed.target) not in {(other.prompt, other.target) for other in outcome.failed}:
            outcome.failed.append(failed)

    def _unknown(self, number: int) -> int:
        """How many edits of a memory are of other runs, which may have been cut off before they asked these back."""
        masks, known = Counter(self._store.index.ids.tolist()), self.wordings.known
        return sum(
            masked_key(edit, self.wordings.rephrases(masks[edit.id])) not in known
            for edit in self._store.edits
            if edit.trained and edit.memory == number
        )

    def _ask_back(self, number: int) -> None:
        """Note which edits of a memory are lost. As many are asked as its new edits pay for, each in its turn.

        number: of an open memory.
        """
        edits = sorted(edit.id for edit in self._store.edits if edit.trained and edit.memory == number)
        count = min(TURNS * self._trained.pop(number, 0), len(edits))
        # Where nobody was asked yet, anywhere: else the first ones would be asked whenever the editor is opened.
        first = bisect_right(edits, self._turn[number]) if number in self._turn else self._store.manifest.next_id
        due = [edits[(first + i) % len(edits)] for i in range(count)]
        if due:
            self._turn[number] = due[-1]
            self._lost += self.trainer.lost(number, due)

    def train(self, edits: Sequence[NewEdit], outcome: Outcome, choices: Choices) -> list[StoredEdit | None]:
        """Train the first of the edits, as many as can be side by side, audit them and take them up.

        edits: those that are next.
        outcome: says of each what became of it.
        choices: how.
        Returns what is stored of those that were dealt with; None for one that is not.
        """
        memories = self.places.choose(len(edits), choices.side_by_side, choices.left, self._ask_back)
        tasks = [Task(new.id, new.edit, memory, new.rephrases) for new, memory in zip(edits, memories, strict=False)]
        codes = self.trainer.prepare(tasks)
        # Two of one question are trained one after the other, so that the second meets the first in the store.
        store, manifest = self._store, self._store.manifest
        contexts = len(manifest.masked_contexts)
        wordings = [np.delete(rows, range(1, 1 + contexts), axis=0) for rows in codes]
        together = range(distinct(wordings, manifest.d, manifest.k))
        here = {edit.id: edit for edit in store.edits} if any(new.old for new in edits) else {}
        replaced: dict[int, list[StoredEdit]] = {}
        contrary: dict[int, list[Conflicting]] = {}  # what each replaces that has another target
        refused: set[int] = set()
        for i in together:
            new = edits[i]
            # As it is now: another may have been trained in its place since that was planned, or it itself again.
            planned = here.get(new.old.id) if new.old else None
            olds, against = [planned] if planned else [], list[Conflicting]()
            if planned is None or planned.id != new.id:  # what is trained again was compared when it came
                against = rivals(new.edit, wordings[i], store.index, store.edits, store.judge, contexts)
                against = [conflict for conflict in against if conflict.stored != planned]
            if choices.on_conflict == "last":
                olds += [conflict.stored for conflict in against]
            if any(old in taken for taken in replaced.values() for old in olds):
                together = range(i)  # the next batch meets what has replaced it
                break
            if choices.on_conflict == "last":
                contrary[i] = against
            else:
                outcome.conflicting += against[:1]
            if against and choices.on_conflict in ("refuse", "first"):
                refused.add(i)
            elif olds:
                replaced[i] = olds
        gone = [old for olds in replaced.values() for old in olds if old.trained]
        trained = [i for i in together if i not in refused]
        stored: list[StoredEdit | None] = [None for _ in together]
        put_back: list[StoredEdit] = []
        try:
            for old in gone:
                self.trainer.forget(old.id)
            learnt = dict(zip(trained, self.trainer.learn([tasks[i] for i in trained]), strict=True)) if trained else {}
            for i in trained:
                outcome.retried += learnt[i].retried
                later = [old.id for j, olds in replaced.items() if j >= i for old in olds]
                task, result = self._elsewhere(tasks[i], learnt[i], memories, later)
                for edit in (*learnt[i].stale, *result.stale):
                    self.trainer.forget(edit)
                    self._lost.append(edit)
                if result.reason:
                    outcome.failed.append(Failed(task.edit.prompt, task.edit.target, result.reason))
                    self._tried.add(task.id)
                if result.reason and not (choices.keep_failed and result.trained.finite):
                    put_back += self._put_back(replaced.get(i, ()))
                else:
                    stored[i] = self._take_up(task, result, codes[i], replaced.get(i, ()))
                    outcome.conflicting += contrary.get(i, ())
        except BaseException:
            # Read again when they are needed, so that what was to be replaced is left alone.
            for number in {old.memory for old in gone}.intersection(self.trainer.memories):
                self.trainer.close(number)
            raise
        outcome.stored += [edit for edit in stored if edit]
        # Others were trained in their memories meanwhile, where they were not left alone.
        written = {edit.memory for edit in stored if edit}
        for old in put_back:
            if old.memory in written:
                self._lost += self.trainer.lost(old.memory, [old.id])
        return stored

    def _elsewhere(
        self, task: Task, learnt: Learnt, busy: Collection[int], replaced: Collection[int]
    ) -> tuple[Task, Learnt]:
        """A task, and what came of it, once it is in a memory where it overwrites no other edit.

        busy: the memories that others of the batch were trained in, which may not be taken up yet.
        replaced: ids of stored edits that this task and later ones of the batch replace.
        """
        if learnt.lost:
            for number in self.places.spare(busy):
                task = task._replace(memory=number)
                self.places.open(number)
                for edit in replaced:  # what was opened just now has read them from the store
                    self.trainer.forget(edit)
                (learnt,) = self.trainer.learn([task])
                if not learnt.lost:
                    break
        return task, learnt

    def _put_back(self, olds: Sequence[StoredEdit]) -> list[StoredEdit]:
        """Leave edits alone again that are not replaced. Returns those that a memory holds."""
        trained = [old for old in olds if old.trained]
        for old in trained:
            self.trainer.remember(old.memory, old, int((self._store.index.ids == old.id).sum()))
        return trained

    def _take_up(self, task: Task, learnt: Learnt, codes: np.ndarray, olds: Sequence[StoredEdit]) -> StoredEdit:
        edit, trained = task.edit, learnt.trained
        stored = stored_as(
            edit,
            id=task.id,
            created=getattr(edit, "created", "") or edit_time(),
            loss=round(trained.loss, 5),
            steps=trained.steps,
            memory=task.memory,
        )
        if task.memory not in self._met:
            self._met.add(task.memory)
            self._trained[task.memory] += self._unknown(task.memory)
        self._trained[task.memory] += 1
        memory = self._store.memories[task.memory]
        before = memory[:, trained.columns]
        try:
            self.trainer.take(task, trained)
            self._store.add(stored, codes, trained.columns, olds)
        except BaseException:
            # The edits before this one are committed now: without the columns of one that is not stored.
            if not any(edit is stored for edit in self._store.edits):
                memory[:, trained.columns] = before
                self.trainer.close(task.memory)  # read again when it is needed
            raise
        return stored
