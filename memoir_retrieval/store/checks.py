"""What the content of a store must fulfil beyond its digests. Each function yields one line a fault."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from memoir_index import popcount
from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.store.files import CHUNK
from memoir_retrieval.store.manifest import Manifest
from memoir_retrieval.store.threshold import References

__all__ = ["code_faults", "edit_faults", "id_faults", "memory_faults", "reference_faults", "weight_faults"]


def memory_faults(
    manifest: Manifest, background: np.ndarray, permutation: np.ndarray, tasks: np.ndarray
) -> Iterator[str]:
    """Of what is as small as a row of the residual memory.

    manifest: the store's.
    background: float32 [D].
    permutation: int64 [D].
    tasks: float32 [K, 2 D + 2] or [0, 0].
    """
    name = manifest.memory.name
    for key, numbers in (("background", background), ("task_units", tasks)):
        if not np.isfinite(numbers).all():
            yield f"{name} holds NaN or infinite numbers in `{key}`"
    if not np.array_equal(np.sort(permutation), np.arange(manifest.d)):
        yield f"{name} holds no permutation of {manifest.d} positions"


def reference_faults(manifest: Manifest, references: References) -> Iterator[str]:
    """Of the prompts by which tau is set.

    manifest: the store's.
    references: its own.
    """
    name, threshold, count = manifest.memory.name, manifest.threshold, len(references.texts)
    if (threshold is not None) != bool(count) or (threshold and threshold.references > count):
        claimed = f"{threshold.references} of them set tau" if threshold else "somebody has chosen tau"
        yield f"{name} holds {count} reference prompts, the manifest says that {claimed}"
    wrong = np.flatnonzero(popcount(references.codes) != manifest.k)
    if len(wrong):
        yield f"{name}: the mask of reference prompt {wrong[0]} has not k={manifest.k} ones"


def weight_faults(manifest: Manifest, memories: np.ndarray) -> Iterator[str]:
    """Of the residual memories themselves.

    manifest: the store's.
    memories: float32 [M, H, D].
    """
    flat = memories.reshape(-1)
    step = CHUNK // 4
    if not all(np.isfinite(flat[start : start + step]).all() for start in range(0, len(flat), step)):
        yield f"{manifest.memory.name} holds NaN or infinite numbers"


def id_faults(manifest: Manifest, memories: int, ids: np.ndarray, memory_of: np.ndarray) -> Iterator[str]:
    """Of the numbers beside the masks.

    manifest: the store's.
    memories: how many residual memories there are.
    ids: int64 [N], the edit of each mask.
    memory_of: int32 [N], the memory of each mask.
    """
    name = manifest.codes.name
    if not len(ids):
        return
    if memory_of.min() < 0 or memory_of.max() >= memories:
        yield f"{name} names a memory that {manifest.memory.name} does not hold"
    if ids.min() < 0 or ids.max() >= manifest.next_id:
        yield f"{name} holds an edit id outside 0..{manifest.next_id - 1}"


def code_faults(manifest: Manifest, codes: np.ndarray) -> Iterator[str]:
    """Of the masks.

    manifest: the store's.
    codes: uint8 [N, D/8].
    """
    step = max(1, CHUNK // codes.shape[1])
    wrong, first = 0, ""
    for start in range(0, len(codes), step):
        ones = popcount(codes[start : start + step])
        rows = np.flatnonzero(ones != manifest.k)
        if len(rows) and not wrong:
            first = f"row {start + rows[0]} has {ones[rows[0]]} ones, not k={manifest.k}"
        wrong += len(rows)
    if wrong:
        yield f"{manifest.codes.name}: {first}" + (f", and so have {wrong - 1} other rows" if wrong > 1 else "")


def edit_faults(
    manifest: Manifest, ids: np.ndarray, memory_of: np.ndarray, edits: Sequence[StoredEdit]
) -> Iterator[str]:
    """Of the edits against the numbers beside the masks.

    manifest: the store's.
    ids: int64 [N], the edit of each mask.
    memory_of: int32 [N], the memory of each mask.
    edits: all of them.

    Raises StoreError for a line that is no edit.
    """
    name = manifest.edits.name
    each = ((edit.id, edit.memory, edit.trained) for edit in edits)
    pairs = np.fromiter(each, np.dtype("i8,i8,?"), len(edits))
    if (untrained := int((~pairs["f2"]).sum())) != manifest.untrained:
        yield f"{untrained} edits of {name} are not trained, the manifest says {manifest.untrained}"
    known, memories = pairs["f0"], pairs["f1"]
    if len(known) and (known.min() < 0 or known.max() >= manifest.next_id):
        yield f"{name} holds an edit id outside 0..{manifest.next_id - 1}"
    order = np.argsort(known, kind="stable")
    unique = known[order]
    if (unique[1:] == unique[:-1]).any() or not np.array_equal(unique, np.unique(ids)):
        yield f"the edit ids of {manifest.codes.name} and {name} differ"
    elif not np.array_equal(memories[order][np.searchsorted(unique, ids)], memory_of):
        yield f"{name} and {manifest.codes.name} name different memories for an edit"
