"""What an editor has changed since it last wrote, and the write: an addition where that is enough, else all files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch

from memoir_index import HammingIndex
from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.store.additions import Columns, Tail, append, fits
from memoir_retrieval.store.manifest import Manifest
from memoir_retrieval.store.read import Content, EditStore
from memoir_retrieval.store.threshold import References
from memoir_retrieval.store.write import write_generation

__all__ = ["Commits"]


class Commits:
    """The unwritten changes of one store; its writer's lock is held as long as they are collected."""

    def __init__(self, folder: Path, store: EditStore | None = None):
        """Begin with nothing unwritten.

        folder: the store's.
        store: what it holds, if anything.
        """
        self._folder = folder
        self._now = (store.manifest, store.tail, len(store.memories)) if store else None
        self._forget()

    def _forget(self) -> None:
        self.changed = False
        self._only_added = True
        self._added: list[tuple[StoredEdit, np.ndarray]] = []
        self._columns: dict[int, set[int]] = {}

    def add(self, edit: StoredEdit, codes: np.ndarray, columns: torch.Tensor) -> None:
        """An edit was stored.

        edit: as it is stored.
        codes: uint8 [R, D/8], its masks.
        columns: int64 [C], those of its memory that changed.
        """
        self.changed = True
        self._added.append((edit, codes))
        self._columns.setdefault(edit.memory, set()).update(columns.tolist())

    def rewrite(self) -> None:
        """Something was changed that no addition can say, such as a removal."""
        self.changed = True
        self._only_added = False

    def write(
        self,
        manifest: Manifest,
        memories: Sequence[torch.Tensor],
        index: HammingIndex,
        edits: Sequence[StoredEdit],
        background: np.ndarray,
        permutation: np.ndarray,
        tasks: np.ndarray,
        references: References,
    ) -> Manifest:
        """Publish the changes as the next generation. Returns its manifest.

        manifest: as `write_generation` takes it; the rest is everything that the store holds then, of which an addition
        writes what is new.
        memories: float32 [H, D] each.
        index: of all masks.
        edits: all of them.
        background: float32 [D].
        permutation: int64 [D].
        tasks: float32 [K, 2 D + 2] or [0, 0].
        references: by which tau is set, or none.
        Raises StoreError where the disk refuses; what was changed is still to be written then.
        """
        added = None
        if self._now and self._only_added and len(memories) == self._now[2]:
            before, tail, _ = self._now
            now = msgspec.structs.replace(before, tau=manifest.tau, threshold=manifest.threshold)
            added = self._append(now, tail, memories)
        if added:
            published, tail = added
        else:
            memory_of = {edit.id: edit.memory for edit in edits}
            content = Content(
                # Put together where there is room: beside them a GPU need not have as much again.
                memories=torch.stack([memory.cpu() for memory in memories]).numpy(),
                background=background,
                permutation=permutation,
                codes=index.codes,
                ids=index.ids,
                memory_of=np.array([memory_of[edit] for edit in index.ids.tolist()], dtype=np.int32),
                edits=edits,
                tasks=tasks,
                references=references,
            )
            published = write_generation(self._folder, manifest, content)
            tail = Tail(published.sha256)
        self._now = published, tail, len(memories)
        self._forget()
        return published

    def _append(self, manifest: Manifest, tail: Tail, memories: Sequence[torch.Tensor]) -> tuple[Manifest, Tail] | None:
        masks = sum(len(codes) for _, codes in self._added)
        if not fits(manifest, tail, masks, sum(map(len, self._columns.values()))):
            return None  # before all of it is copied, from a GPU perhaps
        columns = {}
        for number, changed in self._columns.items():
            numbers = torch.tensor(sorted(changed), dtype=torch.int64)
            weights = memories[number][:, numbers.to(memories[number].device)]
            columns[number] = Columns(numbers.numpy(), weights.cpu().numpy())
        rows = [(edit.id, edit.memory) for edit, codes in self._added for _ in codes]
        return append(
            self._folder,
            manifest,
            tail,
            codes=np.concatenate([codes for _, codes in self._added]),
            ids=np.array([number for number, _ in rows], dtype=np.int64),
            memory_of=np.array([memory for _, memory in rows], dtype=np.int32),
            edits=[edit for edit, _ in self._added],
            columns=columns,
        )
