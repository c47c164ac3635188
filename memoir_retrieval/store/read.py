"""The edit store: a folder, and the only thing that passes from editing to serving.

A store is read as one immutable generation; `store.write` makes the next one.
`docs/reference/format.md` describes every byte.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from memoir_index import HammingIndex
from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.errors import StoreError, StoreMismatch
from memoir_retrieval.model.base import Identity
from memoir_retrieval.store import checks
from memoir_retrieval.store.additions import LATER_FILES, START, Addition, Tail, apply_additions, fetch_additions
from memoir_retrieval.store.edit_lines import JoinedEdits, StoredEdits
from memoir_retrieval.store.files import CHUNK, Data, read_or_map
from memoir_retrieval.store.manifest import KINDS, MANIFEST, FileEntry, Manifest, read_manifest
from memoir_retrieval.store.tensors import Tensor, read_tensors
from memoir_retrieval.store.threshold import NO_REFERENCES, References

__all__ = [
    "MAPPED_FROM",
    "NO_TASKS",
    "TRIES",
    "Content",
    "EditStore",
    "Masks",
    "assemble",
    "parse",
    "read_file",
    "sha256",
]

NO_TASKS = np.zeros((0, 0), np.float32)
"""In place of a network: words alone say what of a message is a task."""
TRIES = 10
"""Of reading a store that is replaced meanwhile."""
MAPPED_FROM = 64 << 20
"""Files of at least so many bytes are mapped, not read."""


class Masks(NamedTuple):
    """The masks of a store's file.

    codes: uint8 [N, D/8], in little bit order.
    ids: int64 [N], the edit that each belongs to.
    memory_of: int32 [N], the memory that holds it.
    """

    codes: np.ndarray
    ids: np.ndarray
    memory_of: np.ndarray


class Content(NamedTuple):
    """Everything that a generation of a store holds beside its manifest.

    memories: float32 [M, H, D], the residual memories.
    background: float32 [D], the mean activation of unrelated prompts.
    permutation: int64 [D], of the positions of a mask.
    codes: uint8 [N, D/8], the masks in little bit order.
    ids: int64 [N], the edit that each mask belongs to.
    memory_of: int32 [N], the memory that holds it.
    edits: the edits.
    tasks: float32 [K, 2 D + 2], see `question.tasks`; [0, 0] where words alone tell tasks.
    references: what tau is set by; none where somebody has chosen it.
    """

    memories: np.ndarray
    background: np.ndarray
    permutation: np.ndarray
    codes: np.ndarray
    ids: np.ndarray
    memory_of: np.ndarray
    edits: Iterable[StoredEdit]
    tasks: np.ndarray = NO_TASKS
    references: References = NO_REFERENCES


@dataclass(frozen=True)
class EditStore:
    """One generation of a store.

    What comes from a large file is a view of that file, mapped, which no writer removes as long as the view is used.

    >>> from memoir_retrieval import EditStore
    >>> store = EditStore.open("edits")
    >>> len(store.edits), store.manifest.generation, store.edit(0).prompt
    (3, 1, 'Who is the CEO of Example Corp?')

    path: its folder.
    manifest: with the numbers of this generation, where additions follow the one that names the files; its sha256 is
        then that of the last addition.
    memories: float32 [M, H, D], the residual memories.
    background: float32 [D], the mean activation of unrelated prompts.
    permutation: int64 [D], of the positions of a mask.
    masks: those of the file of masks.
    edits: all of them.
    mapped: the files that are mapped, with their content.
    additions: what came after the files.
    tail: where the next addition goes.
    tasks: float32 [K, 2 D + 2], the network by which tasks are known (`question.tasks`); [0, 0]
        where words alone tell them.
    references: prompts by which tau is set at every change of the edits; none where somebody has chosen it.
    """

    path: Path
    manifest: Manifest
    memories: np.ndarray
    background: np.ndarray
    permutation: np.ndarray
    masks: Masks
    edits: Sequence[StoredEdit]
    mapped: tuple[tuple[FileEntry, Data], ...] = ()
    additions: tuple[Addition, ...] = ()
    tail: Tail = START
    tasks: np.ndarray = field(default_factory=lambda: NO_TASKS)
    references: References = NO_REFERENCES

    @classmethod
    def open(cls, path: str | Path, *, check: bool = True) -> EditStore:
        """Read and check the current generation.

        path: the store's folder.
        check: False leaves what takes time in a large store to `check()`: the digests of mapped files and what is in
            them. Sizes, headers, shapes, ids and everything in smaller files are checked at once in any case. It is
            meant for looking at a store; nothing may be answered or written from one that was not checked.

        Raises StoreError for a folder that is no store, is half-written or damaged; StoreMismatch for a store of
        a newer format. A writer that replaces the generation meanwhile is no error: the new one is read.
        """
        folder = Path(path)
        for _ in range(TRIES):
            manifest = read_manifest(folder)
            try:
                store = _read_generation(folder, manifest)
            except FileNotFoundError as error:
                missing = error
                if read_manifest(folder) == manifest:
                    break
            else:
                if check:
                    store.check()
                return store
        else:
            raise StoreError(f"store {folder} changes faster than it can be read: try again when its writer is done")
        name = Path(str(missing.filename)).name
        hint = LATER_FILES if name.startswith("added-") else ""
        raise StoreError(
            f"store {folder} is incomplete: {name} is missing or locked by another "
            f"program; restore it from a backup or edit again into a new folder{hint}"
        )

    def check(self) -> None:
        """Check what `open` left unchecked; once. Raises StoreError, naming the file that is damaged."""
        if "checked" in vars(self):
            return
        for entry, data in self.mapped:
            # Columns that were added have been written into the mapping, which is private; the file is as it was.
            whole = self._again(entry) if self.additions else data
            if sha256(whole) != entry.sha256:
                raise _wrong_digest(self.path / entry.name)
        if isinstance(self.edits, StoredEdits | JoinedEdits):
            self.edits.check()
        if self.mapped:
            _refuse(self.path, self.faults())
        vars(self)["checked"] = True  # the fields of a frozen dataclass cannot be set

    def _again(self, entry: FileEntry) -> Data:
        try:
            return read_file(self.path, entry)
        except FileNotFoundError:
            raise StoreError(f"{self.path / entry.name} is gone since the store was opened: open it again") from None

    def faults(self) -> Iterator[str]:
        """What of the content cannot be, one line each. Raises StoreError for a line that is no edit."""
        manifest = self.manifest
        yield from checks.memory_faults(manifest, self.background, self.permutation, self.tasks)
        yield from checks.reference_faults(manifest, self.references)
        yield from checks.weight_faults(manifest, self.memories)
        yield from checks.id_faults(manifest, len(self.memories), self.ids, self.memory_of)
        yield from checks.code_faults(manifest, self.masks.codes)
        yield from checks.edit_faults(manifest, self.ids, self.memory_of, self.edits)

    @property
    def size(self) -> int:
        """Bytes of the files and of what was added to them, without the manifest."""
        return self.manifest.size + self.tail.size

    @cached_property
    def codes(self) -> np.ndarray:
        """All masks: uint8 [N, D/8]. A view of the file's where nothing was added, else a copy: see `index`."""
        return self._joined("codes")

    @cached_property
    def ids(self) -> np.ndarray:
        """The edit that each mask belongs to: int64 [N]."""
        return self._joined("ids")

    @cached_property
    def memory_of(self) -> np.ndarray:
        """The memory that holds each mask's edit: int32 [N]."""
        return self._joined("memory_of")

    def _joined(self, name: str) -> np.ndarray:
        added = [getattr(addition, name) for addition in self.additions]
        file_rows: np.ndarray = getattr(self.masks, name)
        return np.concatenate([file_rows, *added]) if added else file_rows

    @property
    def content(self) -> Content:
        """What the store holds, additions included, as a write of all files takes it."""
        return Content(
            memories=self.memories,
            background=self.background,
            permutation=self.permutation,
            codes=self.codes,
            ids=self.ids,
            memory_of=self.memory_of,
            edits=self.edits,
            tasks=self.tasks,
            references=self.references,
        )

    def index(self) -> HammingIndex:
        """The index of all masks, over the file's where they lie. The store must have been checked."""
        manifest = self.manifest
        index = HammingIndex.from_codes(
            manifest.d, manifest.k, self.masks.ids, self.masks.codes, copy=False, checked=True
        )
        for addition in self.additions:
            index.add(addition.ids, addition.codes)
        return index

    def require(self, identity: Identity, model: str) -> None:
        """Raise StoreMismatch, naming both values, unless the store belongs to this base model.

        identity: of the model.
        model: what messages call it.
        """
        parts = {"config": "config.json", "layer": self.manifest.module, "tokenizer": "tokenizer", "adapter": "adapter"}
        for key, what in parts.items():
            ours, theirs = getattr(self.manifest.base, key) or "none", getattr(identity, key) or "none"
            if ours != theirs:
                raise StoreMismatch(
                    f"store {self.path} was made on {self.manifest.model} ({what} {ours[:12]}), but {model} has "
                    f"{what} {theirs[:12]}: use the model it was made on, or edit this model into a new store"
                )

    def require_trained(self) -> None:
        """Raise StoreError for a store with edits that were never trained: they would match and change nothing."""
        if untrained := self.manifest.untrained:
            raise StoreError(
                f"{untrained} of {len(self.edits)} edits of store {self.path} are not trained, so they cannot answer: "
                f"train them with `memoir edit FILE --store {self.path}`, or remove them"
            )

    @cached_property
    def _edit_ids(self) -> np.ndarray:
        return np.fromiter((edit.id for edit in self.edits), np.int64, len(self.edits))

    def edit(self, edit_id: int) -> StoredEdit:
        """One edit.

        edit_id: its id.

        Raises StoreError where the store has no such edit.
        """
        numbers = np.flatnonzero(self._edit_ids == edit_id)
        if not len(numbers):
            raise StoreError(f"store {self.path} has no edit {edit_id}: `memoir list {self.path}` shows the ids")
        return self.edits[int(numbers[0])]


def sha256(data: Data) -> str:
    """The digest of a file's content, in hexadecimal.

    data: the content.
    """
    digest, view = hashlib.sha256(), memoryview(data)
    for start in range(0, len(view), CHUNK):
        digest.update(view[start : start + CHUNK])
    return digest.hexdigest()


class Parts(NamedTuple):
    """The tensors and edits of a generation; see `EditStore`."""

    memories: np.ndarray
    background: np.ndarray
    permutation: np.ndarray
    masks: Masks
    edits: StoredEdits
    tasks: np.ndarray
    references: References


def parse(folder: Path, manifest: Manifest, data: dict[str, Data]) -> Parts:
    """Views of the three files' content.

    folder: the store's.
    manifest: of the files.
    data: the content of each by its kind.

    Raises StoreError for a file whose layout is not what the manifest says.
    """
    d, h = manifest.d, manifest.h
    memory = _tensors(
        folder,
        manifest.memory,
        data["memory"],
        {
            "memory": Tensor(np.float32, (None, h, d)),
            "background": Tensor(np.float32, (d,)),
            "permutation": Tensor(np.int64, (d,)),
            "task_units": Tensor(np.float32, (None, 2 * d + 2), required=False),
            "tasks": Tensor(np.float32, (None,), required=False),  # of an earlier judge, not read
            "references": Tensor(np.uint8, (None, d // 8), required=False),
            "reference_texts": Tensor(np.uint8, (None,), required=False),
        },
    )
    coded = _tensors(
        folder,
        manifest.codes,
        data["codes"],
        {
            "codes": Tensor(np.uint8, (None, d // 8)),
            "ids": Tensor(np.int64, (None,)),
            "memory_of": Tensor(np.int32, (None,)),
        },
    )
    rows = [len(coded[name]) for name in ("codes", "ids", "memory_of")]
    if len(set(rows)) != 1:
        raise StoreError(
            f"{folder / manifest.codes.name} is damaged (masks, ids and memories have {rows} rows): restore it from a "
            "backup"
        )
    edits = StoredEdits(data["edits"], str(folder / manifest.edits.name))
    return Parts(
        memory["memory"],
        memory["background"],
        memory["permutation"],
        Masks(coded["codes"], coded["ids"], coded["memory_of"]),
        edits,
        memory.get("task_units", NO_TASKS),
        _references(folder / manifest.memory.name, memory),
    )


def _references(path: Path, memory: dict[str, np.ndarray]) -> References:
    """What a file holds of them. Raises StoreError for texts that are none, or not as many as there are masks."""
    if "references" not in memory and "reference_texts" not in memory:
        return NO_REFERENCES
    codes, texts = (memory.get(name, np.empty(0, np.uint8)) for name in ("references", "reference_texts"))
    try:
        lines = texts.tobytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise StoreError(f"{path} is damaged (reference_texts: {error.reason}): restore it from a backup") from error
    if len(lines) != len(codes):
        raise StoreError(
            f"{path} is damaged ({len(codes)} masks of {len(lines)} reference prompts): restore it from a backup"
        )
    return References(codes, tuple(lines))


def _read_generation(folder: Path, manifest: Manifest) -> EditStore:
    data: dict[str, Data] = {kind: read_file(folder, getattr(manifest, kind)) for kind in KINDS}
    fetched = fetch_additions(folder, manifest)
    now = read_manifest(folder)
    if now.sha256 != manifest.sha256 and now.generation != manifest.generation + len(fetched) + 1:
        # More than the next generation has come: additions may have been taken up and removed before they were read.
        raise FileNotFoundError(errno.ENOENT, "replaced", str(folder / MANIFEST))
    mapped: list[tuple[FileEntry, Data]] = []
    for kind, content in data.items():
        entry: FileEntry = getattr(manifest, kind)
        if isinstance(content, mmap.mmap):
            mapped.append((entry, content))
        elif sha256(content) != entry.sha256:
            raise _wrong_digest(folder / entry.name)
    parts = parse(folder, manifest, data)
    if not isinstance(data["edits"], mmap.mmap):
        parts.edits.check()
    store = assemble(folder, manifest, parts, fetched, tuple(mapped))
    if not mapped:
        _refuse(folder, store.faults())
    else:
        _refuse(folder, checks.memory_faults(store.manifest, store.background, store.permutation, store.tasks))
        _refuse(folder, checks.reference_faults(store.manifest, store.references))
        _refuse(folder, checks.id_faults(store.manifest, len(store.memories), store.ids, store.memory_of))
    return store


def assemble(
    folder: Path, manifest: Manifest, parts: Parts, fetched: list[bytes], mapped: tuple[tuple[FileEntry, Data], ...]
) -> EditStore:
    """The store that the files and the additions make. Where a file is mapped, edits are decoded when they are asked
    for.

    folder: the store's.
    manifest: of the files.
    parts: what they hold.
    fetched: the bytes of each addition, in order; the list is emptied.
    mapped: the files that are mapped.

    Raises StoreError for an addition that is damaged.
    """
    additions, tail = apply_additions(folder, manifest, fetched, parts.memories)
    edits: Sequence[StoredEdit] = parts.edits
    if additions:
        edits = JoinedEdits(parts.edits, *(addition.edits for addition in additions))
        last = additions[-1]
        generation = manifest.generation + len(additions)
        manifest = msgspec.structs.replace(
            manifest,
            generation=generation,
            next_id=last.next_id,
            untrained=last.untrained,
            tau=manifest.tau if last.tau is None else last.tau,
            threshold=last.threshold,
            sha256=tail.sha256,
        )
    return EditStore(
        folder,
        manifest,
        parts.memories,
        parts.background,
        parts.permutation,
        parts.masks,
        edits if mapped else tuple(edits),
        mapped,
        additions,
        tail,
        parts.tasks,
        parts.references,
    )


def read_file(folder: Path, entry: FileEntry) -> Data:
    """The content of one file of a generation.

    folder: the store's.
    entry: of the file, in the manifest.

    Raises FileNotFoundError, and StoreError as `read_or_map`.
    """
    path = folder / entry.name
    try:
        return read_or_map(path, entry.size, MAPPED_FROM)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ESTALE:  # how a network file system says that the file was removed
            raise FileNotFoundError(errno.ENOENT, "removed", str(path)) from error
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error


def _refuse(folder: Path, faults: Iterator[str]) -> None:
    for fault in faults:
        raise StoreError(f"store {folder} is damaged: {fault}; restore it from a backup")


def _wrong_digest(path: Path) -> StoreError:
    return StoreError(f"{path} is damaged: its sha256 is not the manifest's; restore it from a backup")


def _tensors(folder: Path, entry: FileEntry, data: Data, wanted: dict[str, Tensor]) -> dict[str, np.ndarray]:
    try:
        return read_tensors(data, wanted)
    except ValueError as error:
        raise StoreError(f"{folder / entry.name} is damaged ({error}): restore it from a backup") from error
