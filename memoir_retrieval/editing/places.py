"""Which memory takes which edit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator

from memoir_retrieval.editing.open_store import OpenStore
from memoir_retrieval.editing.trainer import MemoryTrainer
from memoir_retrieval.question.span import ActingToken

__all__ = ["Places"]

# A residual memory takes at most D over this many edits: as many as were measured to leave each other alone (docs).
# Tokens behind a question are alike in all of them: the more of these an edit acts on, the sooner others are lost.
EDITS_PER_MEMORY: dict[ActingToken, int] = {
    "first token of the question": 5,
    "last token of the question": 15,
    "last token before the answer": 7,
}
# Memories that are trained side by side, at most, by default: what more of them gain is little (docs).
SIDE_BY_SIDE = 4


class Places:
    """The memories of an open store, as edits are shared out among them; some are open in the trainer."""

    def __init__(self, store: OpenStore, trainer: MemoryTrainer):
        """store: which holds the memories.
        trainer: which trains in them.
        """
        self._store, self._trainer = store, trainer

    @property
    def _room(self) -> int:
        """Edits that a memory takes."""
        share = EDITS_PER_MEMORY[self._store.manifest.span.acting_token]
        return self._store.training.edits_per_memory or max(1, self._store.base.d // share)

    def side_by_side(self, edits: int) -> int:
        """How many memories are filled at once, at most 4.

        edits: how many edits there are to train.
        """
        return max(1, min(SIDE_BY_SIDE, -(-edits // self._room)))

    def choose(
        self,
        n: int,
        side_by_side: int,
        left: int | None = None,
        leave: Callable[[int], None] = lambda number: None,
    ) -> list[int]:
        """Numbers of memories, the emptiest first, opened. Of those that have room the first few are open.

        Missing ones are added. So a run that goes on chooses as if it had never stopped.

        n: how many, at most.
        side_by_side: how many are open.
        left: edits that are still to come, for which fewer are open if they fit into fewer; None: it is not known.
        leave: called with the number of each memory that is closed, before it is.
        """
        counts = self._counts()
        with_room = [number for number in range(len(self._store.memories)) if counts[number] < self._room]
        room = sum(self._room - counts[number] for number in with_room)
        while len(with_room) < side_by_side and (left is None or room < left):
            with_room.append(self._store.new_memory())
            room += self._room
        chosen = sorted(with_room[:side_by_side], key=lambda number: counts[number])
        for number in sorted(set(self._trainer.memories) - set(chosen)):
            leave(number)
            self._trainer.close(number)
        for number in chosen[:n]:
            self.open(number)
        return chosen[:n]

    def spare(self, busy: Collection[int]) -> Iterator[int]:
        """Where an edit is tried that would overwrite others: in the newest memory, unless it is busy or full, which
        takes all of them in this way; then in one of its own.

        busy: numbers of the memories that train other edits.
        """
        newest = len(self._store.memories) - 1
        if newest not in busy and self._counts()[newest] < self._room:
            yield newest
        yield self._store.new_memory()

    def open(self, number: int) -> None:
        """Have the trainer train in a memory, unless it does.

        number: of the memory.
        """
        if number not in self._trainer.memories:
            masks = Counter(self._store.index.ids.tolist())
            inside = [(edit, masks[edit.id]) for edit in self._store.edits if edit.trained and edit.memory == number]
            self._trainer.open(number, self._store.memories[number], inside)

    def _counts(self) -> Counter[int]:
        """How many edits each memory holds."""
        return Counter(edit.memory for edit in self._store.edits if edit.trained)
