"""Taking edits out of a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from memoir_retrieval.files import store_lock
from memoir_retrieval.store import EditStore, Manifest, write_generation

__all__ = ["remove_edits"]

# What `write_generation` fills in itself.
_WRITTEN = {"format", "library", "memory", "codes", "edits"}


def remove_edits(folder: Path, ids: Sequence[int]) -> Manifest:
    """Write a generation without these edits; returns its manifest.

    Their masks and records go, so nothing can switch their slices on. The residual memory keeps its numbers: edits
    that were trained later share columns with them. Raises StoreError where the store has no such edit, or is locked.
    """
    with store_lock(folder):
        store = EditStore.open(folder)
        for edit_id in ids:
            store.edit(edit_id)
        gone = set(ids)
        keep = ~np.isin(store.ids, list(gone))
        fields = {name: getattr(store.manifest, name) for name in Manifest.__struct_fields__ if name not in _WRITTEN}
        return write_generation(
            folder,
            fields | {"generation": store.manifest.generation + 1},
            memories=store.memories,
            background=store.background,
            permutation=store.permutation,
            codes=store.codes[keep],
            ids=store.ids[keep],
            memory_of=store.memory_of[keep],
            edits=[edit for edit in store.edits if edit.id not in gone],
        )
