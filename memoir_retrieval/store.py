"""The edit store: a folder, and the only thing that passes from editing to serving.

A store is read as one immutable generation. Writing makes new files beside the old ones and then replaces the
manifest, so a reader sees the old generation or the new one. `docs/format.md` describes every byte.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from memoir_retrieval import checks
from memoir_retrieval.edit import StoredEdit
from memoir_retrieval.errors import StoreError, StoreMismatch
from memoir_retrieval.files import CHUNK, Data, Written, read_or_map, remove_unused, write_new
from memoir_retrieval.manifest import (
    FORMAT,
    KINDS,
    MANIFEST,
    FileEntry,
    Manifest,
    library_version,
    read_manifest,
    write_manifest,
)
from memoir_retrieval.model import Identity
from memoir_retrieval.stored_edits import StoredEdits, edit_chunks
from memoir_retrieval.tensors import Tensor, read_tensors, tensor_chunks

__all__ = [
    "FORMAT",
    "MANIFEST",
    "MAPPED_FROM",
    "EditStore",
    "FileEntry",
    "Manifest",
    "fields_of",
    "leftovers",
    "library_version",
    "sweep",
    "write_again",
    "write_generation",
]

MAPPED_FROM = 64 << 20
"""Files of at least so many bytes are mapped, not read."""


@dataclass(frozen=True)
class EditStore:
    """One generation of a store.

    memories: float32 [M, H, D]. background: float32 [D]. permutation: int64 [D]. codes: uint8 [N, D/8] masks in
    little bit order; ids: int64 [N] the edit each mask belongs to; memory_of: int32 [N] the memory that holds it.
    What comes from a large file is a view of that file, mapped, which no writer removes as long as the view is used.
    """

    path: Path
    manifest: Manifest
    memories: np.ndarray
    background: np.ndarray
    permutation: np.ndarray
    codes: np.ndarray
    ids: np.ndarray
    memory_of: np.ndarray
    edits: Sequence[StoredEdit]
    mapped: tuple[tuple[FileEntry, Data], ...] = ()

    @classmethod
    def open(cls, path: str | Path, *, check: bool = True) -> EditStore:
        """Read and check the current generation.

        check=False leaves what takes time in a large store to `check()`: the digests of mapped files and what is in
        them. Sizes, headers, shapes, ids and everything in smaller files are checked at once in any case. It is meant
        for looking at a store; nothing may be answered or written from one that was not checked.

        Raises StoreError for a folder that is no store, is half-written or damaged; StoreMismatch for a store of
        a newer format. A writer that replaces the generation meanwhile is no error: the new one is read.
        """
        folder = Path(path)
        for _ in range(3):
            manifest = read_manifest(folder)
            try:
                store = _read_generation(folder, manifest)
            except FileNotFoundError as error:
                missing = error
                if read_manifest(folder).generation == manifest.generation:
                    break
            else:
                if check:
                    store.check()
                return store
        raise StoreError(
            f"store {folder} is incomplete: {Path(str(missing.filename)).name} is missing or locked by another "
            "program; restore it from a backup or edit again into a new folder"
        )

    def check(self) -> None:
        """Check what `open` was told to leave; once. Raises StoreError, naming the file that is damaged."""
        assert self._checked

    @cached_property
    def _checked(self) -> bool:
        for entry, data in self.mapped:
            if sha256(data) != entry.sha256:
                raise _wrong_digest(self.path / entry.name)
        if isinstance(self.edits, StoredEdits):
            self.edits.check()
        if self.mapped:
            _refuse(self.path, self.faults())
        return True

    def faults(self) -> Iterator[str]:
        """What of the content cannot be, one line each. Raises StoreError for a line that is no edit."""
        made = self.manifest
        yield from checks.memory_faults(made, self.background, self.permutation)
        yield from checks.weight_faults(made, self.memories)
        yield from checks.id_faults(made, len(self.memories), self.ids, self.memory_of)
        yield from checks.code_faults(made, self.codes)
        yield from checks.edit_faults(made, self.ids, self.memory_of, self.edits)

    def require(self, identity: Identity, model: str) -> None:
        """Raise StoreMismatch, naming both values, unless the store belongs to this base model."""
        for field, what in (("config", "config.json"), ("layer", self.manifest.module), ("tokenizer", "tokenizer")):
            ours, theirs = getattr(self.manifest.base, field), getattr(identity, field)
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
        """The edit of that id. Raises StoreError where there is none."""
        at = np.flatnonzero(self._edit_ids == edit_id)
        if not len(at):
            raise StoreError(f"store {self.path} has no edit {edit_id}: `memoir list {self.path}` shows the ids")
        return self.edits[int(at[0])]


def write_generation(
    folder: Path,
    manifest: dict[str, Any],
    *,
    memories: np.ndarray,
    background: np.ndarray,
    permutation: np.ndarray,
    codes: np.ndarray,
    ids: np.ndarray,
    memory_of: np.ndarray,
    edits: Iterable[StoredEdit],
    rows: np.ndarray | None = None,
    unchanged: dict[str, FileEntry] | None = None,
) -> Manifest:
    """Publish a new generation; the caller holds `store_lock`. Returns its manifest.

    manifest: the fields of `Manifest` except `format`, `library`, `sha256` and the three files, with `generation` being
    the one to write. rows: int64, which rows of codes, ids and memory_of are written; by default all. unchanged: the
    files, by kind, that an earlier generation has already written and that stay as they are.
    Raises StoreError where the disk refuses; the store is then what it was before. The files of other generations are
    removed unless a reader holds them: see `leftovers`.
    """
    generation = manifest["generation"]
    if (folder / MANIFEST).exists() and (now := read_manifest(folder).generation) >= generation:
        raise StoreError(f"store {folder} is at generation {now} already, {generation} is old: open it again")
    contents = {
        "memory": tensor_chunks({"memory": memories, "background": background, "permutation": permutation}),
        "codes": tensor_chunks({"codes": codes, "ids": ids, "memory_of": memory_of}, rows),
        "edits": edit_chunks(edits),
    }
    written = {kind: (entry.name, Written(entry.size, entry.sha256)) for kind, entry in (unchanged or {}).items()}
    try:
        for kind, chunks in contents.items():
            if kind not in written:
                name = f"{kind}-{generation}.{KINDS[kind]}"
                written[kind] = (name, write_new(folder / name, chunks))
        made = write_manifest(folder, manifest, written)
    except StoreError:
        published = (folder / MANIFEST).exists()
        ours = [folder / name for kind, (name, _) in written.items() if kind not in (unchanged or {})]
        remove_unused(leftovers(folder, read_manifest(folder)) if published else ours)
        raise
    remove_unused(leftovers(folder, made))
    return made


def write_again(
    folder: Path,
    store: EditStore,
    *,
    edits: Iterable[StoredEdit] | None = None,
    rows: np.ndarray | None = None,
    **changes: Any,
) -> Manifest:
    """Publish the content of `store` in `folder` as it is, but for some fields of its manifest.

    edits, rows: given together, only these edits and these rows of `codes` are kept. changes: fields of `Manifest`,
    `generation` among them. The caller holds `store_lock`. Raises as `write_generation`.
    """
    kept = KINDS if edits is None else ("memory",)
    here = Path(folder).resolve() == store.path.resolve()
    return write_generation(
        folder,
        fields_of(store.manifest) | changes,
        memories=store.memories,
        background=store.background,
        permutation=store.permutation,
        codes=store.codes,
        ids=store.ids,
        memory_of=store.memory_of,
        edits=store.edits if edits is None else edits,
        rows=rows,
        unchanged={kind: getattr(store.manifest, kind) for kind in kept} if here else None,
    )


def fields_of(manifest: Manifest) -> dict[str, Any]:
    """What `write_generation` takes as `manifest`."""
    written = ("format", "library", "sha256", *KINDS)
    return {name: getattr(manifest, name) for name in manifest.__struct_fields__ if name not in written}


def leftovers(folder: Path, manifest: Manifest) -> list[Path]:
    """Files of other generations: a reader holds them, or a crash left them. The next write removes them."""
    ours = {getattr(manifest, kind).name for kind in KINDS}
    shape = {f"{kind}-": f".{extension}" for kind, extension in KINDS.items()}
    return sorted(
        path
        for path in folder.iterdir()
        for start, end in shape.items()
        if path.name.startswith(start) and path.name.endswith(end) and path.name not in ours
        and path.name[len(start) : -len(end)].isdigit()
    )  # fmt: skip


def sweep(folder: Path) -> list[str]:
    """Remove the files of other generations that no reader holds; the caller holds `store_lock`. Names what stays.

    Writers do so themselves, but cannot let go of a mapped file that they are still writing from.
    """
    return [path.name for path in remove_unused(leftovers(folder, read_manifest(folder)))]


def sha256(data: Data) -> str:
    """The digest of a file's content, in hexadecimal."""
    digest, view = hashlib.sha256(), memoryview(data)
    for at in range(0, len(view), CHUNK):
        digest.update(view[at : at + CHUNK])
    return digest.hexdigest()


class Parts(NamedTuple):
    """The tensors and edits of a generation; see `EditStore`."""

    memories: np.ndarray
    background: np.ndarray
    permutation: np.ndarray
    codes: np.ndarray
    ids: np.ndarray
    memory_of: np.ndarray
    edits: StoredEdits


def parse(folder: Path, manifest: Manifest, data: dict[str, Data]) -> Parts:
    """Views of the three files' content. Raises StoreError for a file whose layout is not what the manifest says."""
    d, h = manifest.d, manifest.h
    memory = _tensors(
        folder,
        manifest.memory,
        data["memory"],
        {
            "memory": Tensor(np.float32, (None, h, d)),
            "background": Tensor(np.float32, (d,)),
            "permutation": Tensor(np.int64, (d,)),
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
        memory["memory"], memory["background"], memory["permutation"],
        coded["codes"], coded["ids"], coded["memory_of"], edits,
    )  # fmt: skip


def _read_generation(folder: Path, manifest: Manifest) -> EditStore:
    data: dict[str, Data] = {}
    mapped: list[tuple[FileEntry, Data]] = []
    for kind in KINDS:
        entry: FileEntry = getattr(manifest, kind)
        data[kind] = content = read_file(folder, entry)
        if isinstance(content, mmap.mmap):
            mapped.append((entry, content))
        elif sha256(content) != entry.sha256:
            raise _wrong_digest(folder / entry.name)
    parts = parse(folder, manifest, data)
    edits: Sequence[StoredEdit] = parts.edits
    if not isinstance(data["edits"], mmap.mmap):
        parts.edits.check()
        edits = tuple(parts.edits)
    store = EditStore(folder, manifest, *parts[:-1], edits, tuple(mapped))
    if not mapped:
        _refuse(folder, store.faults())
    else:
        _refuse(folder, checks.memory_faults(manifest, store.background, store.permutation))
        _refuse(folder, checks.id_faults(manifest, len(store.memories), store.ids, store.memory_of))
    return store


def read_file(folder: Path, entry: FileEntry) -> Data:
    """The content of one file of a generation. Raises FileNotFoundError, and StoreError as `read_or_map`."""
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
