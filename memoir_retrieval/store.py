"""The edit store: a folder, and the only thing that passes from editing to serving.

A store is read as one immutable generation. Writing makes new files beside the old ones and then replaces the
manifest, so a reader sees the old generation or the new one. `docs/format.md` describes every byte.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from memoir_index import check_codes
from memoir_retrieval.edit import StoredEdit
from memoir_retrieval.errors import CodeError, StoreError, StoreMismatch
from memoir_retrieval.files import publish, write_synced
from memoir_retrieval.model import Identity
from memoir_retrieval.span import SpanRule

__all__ = ["FORMAT", "EditStore", "FileEntry", "Manifest", "write_again", "write_generation"]

FORMAT = 1
MANIFEST = "memoir.json"
_NAMES = {kind: re.compile(rf"{kind}-\d+\.{ext}") for kind, ext in
          (("memory", "safetensors"), ("codes", "safetensors"), ("edits", "jsonl"))}  # fmt: skip


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a generation: its name in the folder, size in bytes and sha256 in hexadecimal."""

    name: str
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`memoir.json`: everything that must be the same at edit time and at serve time.

    `d`, `h`: inputs and outputs of the edited projection `module` in block `layer`. `k`: ones in every mask.
    `tau`: least overlap that matches, 0 < tau <= 1. `chat`: whether a plain string is asked through the chat
    template. `contexts`: what was put before each prompt in training (messages for chat, text for raw prompts).
    `next_id`: the id of the next edit; ids are never used twice.
    """

    format: int
    library: str
    generation: int
    model: str
    base: Identity
    module: str
    layer: int
    d: int
    h: int
    k: int
    tau: float
    span: SpanRule
    chat: bool
    dtype: str
    seed: int
    contexts: tuple[Any, ...]
    training: dict[str, float | int | str]
    next_id: int
    memory: FileEntry
    codes: FileEntry
    edits: FileEntry


@dataclass(frozen=True)
class EditStore:
    """One generation of a store, read into memory and checked.

    memories: float32 [M, H, D]. background: float32 [D]. permutation: int64 [D]. codes: uint8 [N, D/8] masks in
    little bit order; ids: int64 [N] the edit each mask belongs to; memory_of: int32 [N] the memory that holds it.
    """

    path: Path
    manifest: Manifest
    memories: np.ndarray
    background: np.ndarray
    permutation: np.ndarray
    codes: np.ndarray
    ids: np.ndarray
    memory_of: np.ndarray
    edits: tuple[StoredEdit, ...]

    @classmethod
    def open(cls, path: str | Path) -> EditStore:
        """Read and check the current generation.

        Raises StoreError for a folder that is no store, is half-written or damaged; StoreMismatch for a store of
        a newer format. A writer that replaces the generation meanwhile is no error: the new one is read.
        """
        folder = Path(path)
        for _ in range(3):
            manifest = _read_manifest(folder)
            try:
                return _read_generation(folder, manifest)
            except FileNotFoundError as error:
                missing = error
                if _read_manifest(folder).generation == manifest.generation:
                    break
        raise StoreError(
            f"store {folder} is incomplete: {Path(str(missing.filename)).name} is missing; restore it from a backup "
            "or edit again into a new folder"
        )

    def require(self, identity: Identity, model: str) -> None:
        """Raise StoreMismatch, naming both values, unless the store belongs to this base model."""
        for field, what in (("config", "config.json"), ("layer", self.manifest.module), ("tokenizer", "tokenizer")):
            ours, theirs = getattr(self.manifest.base, field), getattr(identity, field)
            if ours != theirs:
                raise StoreMismatch(
                    f"store {self.path} was made on {self.manifest.model} ({what} {ours[:12]}), but {model} has "
                    f"{what} {theirs[:12]}: use the model it was made on, or edit this model into a new store"
                )

    def edit(self, edit_id: int) -> StoredEdit:
        """The edit of that id. Raises StoreError where there is none."""
        for edit in self.edits:
            if edit.id == edit_id:
                return edit
        raise StoreError(f"store {self.path} has no edit {edit_id}: `memoir list {self.path}` shows the ids")


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
    edits: Sequence[StoredEdit],
) -> Manifest:
    """Publish a new generation; the caller holds `store_lock`. Returns its manifest.

    manifest: the fields of `Manifest` except `format`, `library` and the three files, with `generation` being the
    one to write. Raises StoreError where the disk refuses; the store is then what it was before.
    """
    generation = manifest["generation"]
    encode = msgspec.json.Encoder().encode
    contents = {
        "memory": (
            f"memory-{generation}.safetensors",
            save_tensors({"memory": memories, "background": background, "permutation": permutation}),
        ),
        "codes": (
            f"codes-{generation}.safetensors",
            save_tensors({"codes": codes, "ids": ids, "memory_of": memory_of}),
        ),
        "edits": (f"edits-{generation}.jsonl", b"".join(encode(edit) + b"\n" for edit in edits)),
    }
    entries: dict[str, FileEntry] = {}
    try:
        for kind, (name, data) in contents.items():
            write_synced(folder / name, data)
            entries[kind] = FileEntry(name, len(data), hashlib.sha256(data).hexdigest())
        fields: dict[str, Any] = {**manifest, **entries}
        made = Manifest(format=FORMAT, library=library_version(), **fields)
        publish(folder / MANIFEST, msgspec.json.format(encode(made), indent=1))
    except StoreError:
        if (folder / MANIFEST).exists():
            _remove_others(folder, keep=_read_manifest(folder).generation)
        raise
    _remove_others(folder, keep=generation)
    return made


def write_again(folder: Path, store: EditStore, **changes: Any) -> Manifest:
    """Publish the content of `store` in `folder` as it is, but for some fields of its manifest.

    changes: fields of `Manifest`, `generation` among them. The caller holds `store_lock`. Raises as `write_generation`.
    """
    fields = msgspec.structs.asdict(store.manifest)
    for ours in ("format", "library", "memory", "codes", "edits"):
        del fields[ours]
    return write_generation(
        folder,
        fields | changes,
        memories=store.memories,
        background=store.background,
        permutation=store.permutation,
        codes=store.codes,
        ids=store.ids,
        memory_of=store.memory_of,
        edits=store.edits,
    )


def library_version() -> str:
    """The version of memoir-retrieval, or "0+unknown" in a tree that is not installed."""
    try:
        return version("memoir-retrieval")
    except PackageNotFoundError:
        return "0+unknown"


def _remove_others(folder: Path, keep: int) -> None:
    """Remove the files of other generations. Readers that have them open keep what they read."""
    for path in folder.iterdir():
        if any(p.fullmatch(path.name) for p in _NAMES.values()) and f"-{keep}." not in path.name:
            path.unlink(missing_ok=True)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if not folder.is_dir():
            raise StoreError(
                f"store {folder} does not exist: make one with `memoir edit FILE --store {folder}`"
            ) from None
        raise StoreError(
            f"{folder} is not a store, or its first write was cut off: it has no {MANIFEST}; "
            f"run `memoir edit FILE --store {folder}` (again)"
        ) from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    try:
        found = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).get("format", msgspec.Raw(b"null"))
        number = msgspec.json.decode(found, type=int)
    except msgspec.DecodeError as error:
        raise StoreError(f"{path} is damaged ({error}): restore it from a backup") from error
    if number > FORMAT:
        raise StoreMismatch(
            f"store {folder} has format {number}, this memoir-retrieval {library_version()} reads up to {FORMAT}: "
            "pip install --upgrade memoir-retrieval"
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is damaged ({error}): restore it from a backup") from error
    if not 0 < manifest.tau <= 1 or not 0 < manifest.k <= manifest.d or manifest.d % 8 or manifest.h < 1:
        raise StoreError(
            f"{path} is damaged (tau {manifest.tau}, k {manifest.k}, d {manifest.d}, h {manifest.h}): "
            "restore it from a backup"
        )
    for kind, pattern in _NAMES.items():
        name = getattr(manifest, kind).name
        if not pattern.fullmatch(name):
            raise StoreError(f"{path} names {name!r} as its {kind} file, which no store does: it may be forged")
    return manifest


def _read_generation(folder: Path, manifest: Manifest) -> EditStore:
    d, h = manifest.d, manifest.h
    memory = _tensors(folder, manifest.memory)
    memories = _tensor(folder, manifest.memory, memory, "memory", np.float32, (None, h, d))
    background = _tensor(folder, manifest.memory, memory, "background", np.float32, (d,))
    permutation = _tensor(folder, manifest.memory, memory, "permutation", np.int64, (d,))
    coded = _tensors(folder, manifest.codes)
    codes = _tensor(folder, manifest.codes, coded, "codes", np.uint8, (None, d // 8))
    ids = _tensor(folder, manifest.codes, coded, "ids", np.int64, (len(codes),))
    memory_of = _tensor(folder, manifest.codes, coded, "memory_of", np.int32, (len(codes),))
    edits = _edits(folder, manifest.edits)

    def damaged(what: str) -> StoreError:
        return StoreError(f"store {folder} is damaged: {what}; restore it from a backup")

    if not (np.isfinite(memories).all() and np.isfinite(background).all()):
        raise damaged(f"{manifest.memory.name} holds NaN or infinite numbers")
    if not np.array_equal(np.sort(permutation), np.arange(d)):
        raise damaged(f"{manifest.memory.name} holds no permutation of {d} positions")
    try:
        codes = check_codes(codes, d, manifest.k)
    except CodeError as error:
        raise damaged(f"{manifest.codes.name}: {error}") from error
    if len(codes) and not (memory_of.min() >= 0 and memory_of.max() < len(memories)):
        raise damaged(f"{manifest.codes.name} names a memory that {manifest.memory.name} does not hold")
    known = [edit.id for edit in edits]
    if len(set(known)) != len(known) or set(known) != set(ids.tolist()):
        raise damaged(f"the edit ids of {manifest.codes.name} and {manifest.edits.name} differ")
    if known and (min(known) < 0 or max(known) >= manifest.next_id):
        raise damaged(f"{manifest.edits.name} holds an edit id outside 0..{manifest.next_id - 1}")
    return EditStore(folder, manifest, memories, background, permutation, codes, ids, memory_of, edits)


def _read(folder: Path, entry: FileEntry) -> bytes:
    path = folder / entry.name
    try:
        size = path.stat().st_size
        if size != entry.size:
            raise StoreError(
                f"{path} is damaged: it has {size} bytes, the manifest says {entry.size}; restore it from a backup"
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise StoreError(f"{path} is damaged: its sha256 is not the manifest's; restore it from a backup")
    return data


def _tensors(folder: Path, entry: FileEntry) -> dict[str, np.ndarray]:
    try:
        return load_tensors(_read(folder, entry))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder / entry.name} is damaged ({error}): restore it from a backup") from error


def _tensor(
    folder: Path, entry: FileEntry, tensors: dict[str, np.ndarray], key: str, dtype: Any, shape: tuple[int | None, ...]
) -> np.ndarray:
    found = tensors.get(key)
    fits = (
        found is not None
        and found.dtype == dtype
        and found.ndim == len(shape)
        and all(want is None or have == want for have, want in zip(found.shape, shape, strict=True))
    )
    if not fits or found is None:
        have = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
        raise StoreError(
            f"{folder / entry.name} is damaged: tensor {key!r} is {have}, not {np.dtype(dtype)} "
            f"{['any' if n is None else n for n in shape]}; restore it from a backup"
        )
    return found


def _edits(folder: Path, entry: FileEntry) -> tuple[StoredEdit, ...]:
    decode = msgspec.json.Decoder(StoredEdit).decode
    try:
        return tuple(decode(line) for line in _read(folder, entry).splitlines() if line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{folder / entry.name} is damaged ({error}): restore it from a backup") from error
