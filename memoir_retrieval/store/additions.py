"""Small commits: edits that are added to a store without writing its files again.

An addition is one file, which holds the new edits, their masks and the columns of the residual memories that training
has changed. It is a generation of its own, and follows the manifest or the addition before it, whose digest it names;
`store.write` takes the additions up into the files when they have grown. `docs/reference/format.md` describes every
byte.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.errors import StoreError
from memoir_retrieval.store.checks import code_faults, id_faults
from memoir_retrieval.store.edit_lines import StoredEdits, edit_chunks
from memoir_retrieval.store.files import publish, read_small
from memoir_retrieval.store.manifest import FIRST_WITH_ADDITIONS, FORMAT, Manifest, require_range
from memoir_retrieval.store.tensors import Tensor, read_tensors, tensor_chunks, unique_keys
from memoir_retrieval.store.threshold import Threshold, threshold_fault

__all__ = [
    "LATER_FILES",
    "MOST",
    "START",
    "Addition",
    "Columns",
    "Tail",
    "append",
    "apply_additions",
    "fetch_additions",
    "find_additions",
    "fits",
    "is_taken_up",
    "numbers_of",
]

MOST = 1024
"""Additions between two writings of the files. A reader that opens the store reads and applies each of them."""
LARGEST = 1 << 28
"""Bytes of one addition; what would have more is written into the files."""
LATER_FILES = ", or files of a later generation are left here: restore it into an empty folder"
"""What errors say of additions that fit nothing: a backup may have been copied over the folder."""
_NAME = re.compile(r"added-(0|[1-9][0-9]{0,18})\.safetensors(\.tmp)?")
_DIGEST = 32


class Tail(NamedTuple):
    """Where the next addition goes.

    sha256: of what it follows.
    additions: how many there are so far.
    size: of them together, in bytes.
    """

    sha256: str
    additions: int = 0
    size: int = 0


START = Tail("")
"""Of a store that no folder holds."""


class Columns(NamedTuple):
    """Columns of one residual memory as training has left them.

    numbers: int64 [C], which.
    weights: float32 [H, C].
    """

    numbers: np.ndarray
    weights: np.ndarray


class Addition(NamedTuple):
    """What one small commit adds, but for the columns that it changes: these are in the memories.

    next_id, untrained, tau, threshold: the manifest's from then on; tau and threshold are None where somebody has
        chosen tau, which stays.
    codes: uint8 [n, D/8], masks.
    ids: int64 [n], the edit of each.
    memory_of: int32 [n], the memory of each.
    edits: the new ones.
    """

    next_id: int
    untrained: int
    tau: float | None
    threshold: Threshold | None
    codes: np.ndarray
    ids: np.ndarray
    memory_of: np.ndarray
    edits: StoredEdits


class _Change(NamedTuple):
    """The columns that an addition changes.

    columns: int64 [C], the inputs that have other weights from then on.
    memories: int32 [C], the memory of each.
    weights: float32 [C, H].
    """

    columns: np.ndarray
    memories: np.ndarray
    weights: np.ndarray


class _Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    after: str
    next_id: int
    untrained: int
    tau: float | None = None
    threshold: Threshold | None = None


def fits(manifest: Manifest, tail: Tail, masks: int, columns: int) -> bool:
    """Whether an addition may follow, before what would be in it is gathered. False where `append` would return None.

    With many edits a true may still be too much: their lines are not counted here.

    manifest, tail: as the store is now.
    masks: how many it would have.
    columns: how many it would change.
    """
    size = masks * (manifest.d // 8 + 12) + columns * (4 * manifest.h + 12)
    return manifest.format >= FORMAT and tail.additions < MOST and size <= _room(manifest, tail)


def append(
    folder: Path,
    manifest: Manifest,
    tail: Tail,
    *,
    codes: np.ndarray,
    ids: np.ndarray,
    memory_of: np.ndarray,
    edits: Sequence[StoredEdit],
    columns: Mapping[int, Columns],
) -> tuple[Manifest, Tail] | None:
    """Publish an addition; the caller holds `store_lock`. Returns the manifest and the tail after it.

    folder: the store's.
    manifest, tail: as the store is now, but for `tau` and `threshold`, which are those of the next generation.
    codes, ids, memory_of, edits: what is added; see `Addition`.
    columns: what training has changed, by number of the memory.
    Returns None, and writes nothing, where the files must be written instead: there are `MOST` additions, or with this
    one they would be larger than the files, or the store has an older format.
    Raises StoreError where the disk refuses, or the store is at the end of its numbers.
    """
    if not fits(manifest, tail, len(codes), sum(len(change.numbers) for change in columns.values())):
        return None
    generation = manifest.generation + 1
    path = folder / _name(generation)
    if path.exists():
        raise StoreError(f"store {folder} is at generation {generation} already: open it again")
    untrained = manifest.untrained + sum(not edit.trained for edit in edits)
    next_id = max(manifest.next_id, *(edit.id + 1 for edit in edits))
    after = msgspec.structs.replace(manifest, generation=generation, next_id=next_id, untrained=untrained)
    require_range(folder, after)
    tau = manifest.tau if manifest.threshold else None
    head = msgspec.json.encode(_Head(tail.sha256, next_id, untrained, tau, manifest.threshold))
    changed = [(number, change) for number, change in sorted(columns.items()) if len(change.numbers)]
    none = [np.empty((0, manifest.h), np.float32)]
    tensors = {
        "codes": codes,
        "ids": ids,
        "memory_of": memory_of,
        "columns": np.concatenate([np.empty(0, np.int64), *(change.numbers for _, change in changed)]),
        "memories": np.repeat(
            np.array([number for number, _ in changed], dtype=np.int32), [len(change.numbers) for _, change in changed]
        ),
        "weights": np.concatenate(none + [change.weights.T for _, change in changed]),
        "edits": np.frombuffer(b"".join(edit_chunks(edits)), np.uint8),
        "head": np.frombuffer(head, np.uint8),
        "sha256": np.zeros(_DIGEST, np.uint8),
    }
    unsigned = b"".join(tensor_chunks(tensors))[:-_DIGEST]
    if len(unsigned) + _DIGEST > _room(manifest, tail):
        return None
    digest = hashlib.sha256(unsigned)
    publish(path, unsigned + digest.digest(), names_files=False)
    after = msgspec.structs.replace(after, sha256=digest.hexdigest())
    return after, Tail(digest.hexdigest(), tail.additions + 1, tail.size + len(unsigned) + _DIGEST)


def find_additions(folder: Path, manifest: Manifest) -> int:
    """How many additions follow a manifest, going by their names.

    folder: the store's.
    manifest: the one that the first addition follows.
    """
    count = 0
    if manifest.format >= FIRST_WITH_ADDITIONS:
        while (folder / _name(manifest.generation + count + 1)).exists():
            count += 1
    return count


def numbers_of(folder: Path) -> list[int]:
    """The generations of all additions that lie in a folder, whatever they follow.

    folder: the store's.
    """
    return [int(match[1]) for name in os.listdir(folder) if (match := _NAME.fullmatch(name)) and not match[2]]


def fetch_additions(folder: Path, manifest: Manifest) -> list[bytes]:
    """The bytes of the additions that follow a manifest, as they are.

    folder: the store's.
    manifest: the one that the first addition follows.

    Raises FileNotFoundError where one is missing before another, being removed or locked by another program, and
    StoreError for one that cannot be read.
    """
    contents: list[bytes] = []
    size, missed = 0, 0
    while manifest.format >= FIRST_WITH_ADDITIONS:
        generation = manifest.generation + len(contents) + 1
        path = folder / _name(generation)
        try:
            contents.append(read_small(path, _room(manifest, Tail("", len(contents), size))))
            size, missed = size + len(contents[-1]), 0
        except OSError as error:
            if error.errno == errno.ENOENT:
                if not os.path.lexists(path) and max(numbers_of(folder), default=0) <= generation:
                    break
                # It may have come just now, and a list of names is not made at one moment: look again.
                missed += 1
                if missed < 3:
                    continue
            if error.errno in (errno.ENOENT, errno.ESTALE):
                raise FileNotFoundError(errno.ENOENT, "missing", str(path)) from error
            raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    return contents


def apply_additions(
    folder: Path, manifest: Manifest, fetched: list[bytes], memories: np.ndarray
) -> tuple[tuple[Addition, ...], Tail]:
    """Check what `fetch_additions` read and write its columns into the memories. Returns the rest of it, and where the
    next addition goes.

    folder: the store's.
    manifest: the one that the first addition follows.
    fetched: the bytes of each; the list is emptied on the way, so that they need not be held beside what is in them.
    memories: float32 [M, H, D], those of the files.
    Raises StoreError for an addition that is damaged or follows something else; the memories are of no use then.
    """
    additions: list[Addition] = []
    tail = Tail(manifest.sha256)
    while fetched:
        data = fetched.pop(0)
        generation = manifest.generation + len(additions)
        path = folder / _name(generation + 1)
        hint = ""
        try:
            if hashlib.sha256(memoryview(data)[:-_DIGEST]).digest() != data[-_DIGEST:]:
                raise ValueError("its sha256 is not that of its content")
            head, addition, change = _parse(path, bytearray(data), manifest)
            if head.after != tail.sha256:
                hint = LATER_FILES
                raise ValueError(f"it does not follow generation {generation}")
            next_id = additions[-1].next_id if additions else manifest.next_id
            for fault in _faults(manifest, addition, change, len(memories), next_id):
                raise ValueError(fault)
        except (ValueError, StoreError) as error:
            why = " ".join(str(error).split())
            raise StoreError(f"{path} is damaged ({why:.200}): restore the store from a backup{hint}") from error
        for number in np.unique(change.memories).tolist():
            of_it = change.memories == number
            memories[number][:, change.columns[of_it]] = change.weights[of_it].T
        additions.append(addition)
        tail = Tail(data[-_DIGEST:].hex(), len(additions), tail.size + len(data))
    return tuple(additions), tail


def _room(manifest: Manifest, tail: Tail) -> int:
    """Bytes that the next addition may have."""
    return max(0, min(LARGEST, manifest.size - tail.size))


def is_taken_up(name: str, manifest: Manifest) -> bool:
    """Whether a file is an addition, or half of one, whose content the manifest's own files hold.

    name: of the file.
    manifest: the store's.
    """
    match = _NAME.fullmatch(name)
    return match is not None and int(match[1]) <= manifest.generation


def _name(generation: int) -> str:
    return f"added-{generation}.safetensors"


def _parse(path: Path, data: bytearray, manifest: Manifest) -> tuple[_Head, Addition, _Change]:
    """What an addition holds; only its `_Change` are views of the bytes, which would keep all of them."""
    wanted = {
        "codes": Tensor(np.uint8, (None, manifest.d // 8)),
        "ids": Tensor(np.int64, (None,)),
        "memory_of": Tensor(np.int32, (None,)),
        "columns": Tensor(np.int64, (None,)),
        "memories": Tensor(np.int32, (None,)),
        "weights": Tensor(np.float32, (None, manifest.h)),
        "edits": Tensor(np.uint8, (None,)),
        "head": Tensor(np.uint8, (None,)),
        "sha256": Tensor(np.uint8, (_DIGEST,)),
    }
    held = read_tensors(data, wanted)
    del held["sha256"]
    head = msgspec.convert(unique_keys(held.pop("head").tobytes()), _Head)
    edits = StoredEdits(bytearray(held.pop("edits").tobytes()), str(path))
    edits.check()
    change = _Change(**{name: held.pop(name) for name in _Change._fields})
    copies = {name: array.copy() for name, array in held.items()}
    return head, Addition(head.next_id, head.untrained, head.tau, head.threshold, edits=edits, **copies), change


def _faults(manifest: Manifest, addition: Addition, change: _Change, memories: int, next_id: int) -> Iterator[str]:
    """What cannot be in an addition by itself; what it must have in common with the rest `EditStore.faults` tells."""
    for part, names in ((addition, ("codes", "ids", "memory_of")), (change, _Change._fields)):
        lengths = [len(getattr(part, name)) for name in names]
        if len(set(lengths)) > 1:
            yield f"{', '.join(names)} have {lengths} rows"
            return
    if not next_id <= addition.next_id < 1 << 63 or addition.untrained < 0:
        yield f"next_id {addition.next_id}, untrained {addition.untrained}"
        return
    sets = manifest.threshold is not None
    if (addition.tau is not None, addition.threshold is not None) != (sets, sets):
        yield f"it has tau {addition.tau}, the store's is {'its own' if sets else 'chosen'}"
        return
    if addition.tau is not None and not 0 < addition.tau <= 1:
        yield f"tau {addition.tau}"
    if addition.threshold is not None and (wrong := threshold_fault(addition.threshold)):
        yield wrong
    after = msgspec.structs.replace(manifest, next_id=addition.next_id)
    yield from id_faults(after, memories, addition.ids, addition.memory_of)
    yield from code_faults(after, addition.codes)
    columns, numbers = change.columns, change.memories
    if len(columns) and (columns.min() < 0 or columns.max() >= manifest.d):
        yield f"it changes a column outside 0..{manifest.d - 1}"
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= memories):
        yield f"it changes a memory outside 0..{memories - 1}"
    if not np.isfinite(change.weights).all():
        yield "it holds NaN or infinite weights"
