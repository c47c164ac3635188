"""The manifest of a store: what must be the same at edit time and at serve time, and which files belong to it."""

from __future__ import annotations

import errno
import hashlib
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from memoir_retrieval.errors import StoreError, StoreMismatch
from memoir_retrieval.model.base import Identity
from memoir_retrieval.model.places import Place, place_of
from memoir_retrieval.question.span import SpanRule
from memoir_retrieval.store.files import Written, publish, read_small
from memoir_retrieval.store.tensors import unique_keys
from memoir_retrieval.store.threshold import Threshold, threshold_fault

__all__ = [
    "FIRST_WITH_ADDITIONS",
    "FORMAT",
    "KINDS",
    "MANIFEST",
    "MOST_BYTES",
    "NAMES",
    "FileEntry",
    "Manifest",
    "draft_manifest",
    "library_version",
    "read_manifest",
    "require_range",
    "without_files",
    "write_manifest",
]

# 3 brought additions, 4 what edits require, 5 from which token on the residual acts, 6 the judge, 7 that it spares the
# template's tokens behind a question.
FORMAT = 7
FIRST_WITH_ADDITIONS = 3
_FIRST_WITH_ACTS = 5
_FIRST_WITH_JUDGE = 6
_FIRST_WITH_BEHIND = 7
MANIFEST = "memoir.json"
KINDS = {"memory": "safetensors", "codes": "safetensors", "edits": "jsonl"}
NAMES = {kind: re.compile(rf"{kind}-(0|[1-9][0-9]{{0,18}})\.{extension}") for kind, extension in KINDS.items()}
MOST_BYTES = 1 << 24
"""Bytes of a manifest; those of real stores have a few thousand."""
_UNSIGNED = "0" * 64
_LAST_GENERATION = 1 << 53
_LAST_ID = (1 << 63) - 1


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a generation.

    name: in the store's folder.
    size: in bytes.
    sha256: of its content, in hexadecimal.
    """

    name: str
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`memoir.json`: everything that must be the same at edit time and at serve time.

    format: number of the layout.
    library: the version that wrote it.
    generation: counts the commits.
    model: the name under which the base model was loaded.
    base: its digests.
    module: the edited projection.
    layer: its block.
    d, h: its inputs and outputs.
    k: ones in every mask.
    tau: least overlap that matches, 0 < tau <= 1.
    threshold: what tau rests on; None where somebody has chosen it.
    span: which tokens of a prompt are pooled, and from which on the residual acts.
    chat: whether a plain string is asked through the chat template.
    dtype: of the model's weights.
    seed: of the permutation and of training.
    contexts: what was put before each prompt in training (messages for chat, text for raw prompts).
    training: the fields of `Training`.
    next_id: the id of the next edit; ids are never used twice.
    memory, codes, edits: the files.
    untrained: how many edits have masks only.
    judge: version and digest of what decides whether a question is an edit's; "" where masks alone do.
    sha256: of the manifest itself, written with zeros in its place; format 1 has none.
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
    untrained: int = 0
    judge: str = ""
    threshold: Threshold | None = None
    sha256: str = ""

    @property
    def place(self) -> Place:
        """The part of the block that the edited projection closes."""
        return place_of(self.module)

    @property
    def size(self) -> int:
        """Bytes of the three files."""
        return sum(getattr(self, kind).size for kind in KINDS)

    @property
    def masked_contexts(self) -> tuple[Any, ...]:
        """The contexts after which every question has a mask of its own."""
        masks = self.training.get("context_masks", 0)
        return self.contexts[:masks] if isinstance(masks, int) and masks > 0 else ()


def library_version() -> str:
    """The version of memoir-retrieval, or "0+unknown" in a tree that is not installed."""
    try:
        return version("memoir-retrieval")
    except PackageNotFoundError:
        return "0+unknown"


def draft_manifest(**fields: Any) -> Manifest:
    """The manifest of a store that is not written yet.

    fields: those of `Manifest` but for `format`, `library`, `sha256` and the three files, which a write sets.
    """
    none = FileEntry("", 0, "")
    return Manifest(format=FORMAT, library=library_version(), memory=none, codes=none, edits=none, **fields)


def without_files(manifest: Manifest, **changes: Any) -> Manifest:
    """A manifest less what a write sets: its format, library, digest and files.

    manifest: of any generation.
    changes: of other fields.
    """
    fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    for name in ("format", "library", "sha256", *KINDS):
        del fields[name]
    return draft_manifest(**fields | changes)


def write_manifest(folder: Path, manifest: Manifest, written: dict[str, tuple[str, Written]]) -> Manifest:
    """Publish a manifest under this library's format and version. Returns what was written.

    folder: the store's.
    manifest: every field counts but `format`, `library`, `sha256` and the files.
    written: name, size and digest of the file of each kind.
    """
    entries: dict[str, Any] = {kind: FileEntry(name, *file) for kind, (name, file) in written.items()}
    signed = msgspec.structs.replace(manifest, format=FORMAT, library=library_version(), sha256=_UNSIGNED, **entries)
    require_range(folder, signed)
    head, zeros, tail = msgspec.json.format(msgspec.json.encode(signed), indent=1).rpartition(_UNSIGNED.encode())
    digest = hashlib.sha256(head + zeros + tail).hexdigest()
    data = head + digest.encode() + tail
    try:
        _parse(data)
    except ValueError as error:
        raise StoreError(
            f"store {folder} cannot be written, since no reader would take its manifest ({_short(error)}): choose "
            "other settings; the store is unchanged"
        ) from error
    publish(folder / MANIFEST, data)
    return msgspec.structs.replace(signed, sha256=digest)


def require_range(folder: Path, manifest: Manifest) -> None:
    """Raise StoreError where a manifest about to be written could not be read again; the store is then as it was.

    folder: the store's, for the message.
    manifest: with the numbers of the new generation.
    """
    for name, last in (("generation", _LAST_GENERATION), ("next_id", _LAST_ID)):
        if getattr(manifest, name) <= last:
            continue
        wrong = f"{name} {getattr(manifest, name)}"
        raise StoreError(
            f"store {folder} cannot be written again, its next generation would have {wrong}, more than the format "
            "allows: "
            "edit into a new folder; the store is unchanged"
        )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store, without its additions.

    folder: the store's.

    Raises StoreError for a manifest that is missing or damaged, StoreMismatch for one of a newer format.
    """
    path = folder / MANIFEST
    data = _read(folder, path)
    try:
        content = unique_keys(data)
        number = content.get("format") if isinstance(content, dict) else None
        if type(number) is int and number > FORMAT:
            raise StoreMismatch(
                f"store {folder} has format {number:.6g}, this memoir-retrieval {library_version()} reads up to "
                f"{FORMAT}: pip install --upgrade memoir-retrieval"
            )
        manifest = _parse(data)
    except (ValueError, OverflowError, RecursionError) as error:  # msgspec's and unicode errors are ValueErrors
        raise StoreError(f"{path} is damaged ({_short(error)}): restore it from a backup") from error
    for kind, pattern in NAMES.items():
        entry: FileEntry = getattr(manifest, kind)
        if not pattern.fullmatch(entry.name):
            raise StoreError(
                f"{path} names {entry.name!r:.80} as its {kind} file, which no store does: it may be forged"
            )
    return manifest


def _parse(data: bytes) -> Manifest:
    """The manifest that these bytes are. Raises ValueError for what is none."""
    manifest = msgspec.json.decode(data, type=Manifest)
    digest = manifest.sha256
    if manifest.format == 1 and digest:
        raise ValueError("format 1 with a sha256")
    if manifest.format != 1:
        unsigned = data.replace(digest.encode(), _UNSIGNED.encode()) if len(digest) == len(_UNSIGNED) else b""
        if hashlib.sha256(unsigned).hexdigest() != digest:
            raise ValueError("its sha256 is not that of its content")
    if wrong := _out_of_range(manifest):
        raise ValueError(wrong)
    return manifest


def _short(error: Exception) -> str:
    return f"{' '.join(str(error).split()):.200}"


def _read(folder: Path, path: Path) -> bytes:
    missing: OSError | None = None
    for _ in range(3):
        try:
            return read_small(path, MOST_BYTES)
        except FileNotFoundError as error:
            # A rename may come between looking and opening; a missing manifest stays missing.
            missing = error
        except OSError as error:
            if error.errno != errno.ESTALE:  # a network file system says so of a manifest that was just replaced
                raise StoreError(f"{path} cannot be read: {error.strerror}") from error
            missing = error
    if not folder.is_dir():
        raise StoreError(
            f"store {folder} does not exist: make one with `memoir edit FILE --model NAME --store {folder}`"
        ) from missing
    raise StoreError(
        f"{folder} is not a store, or its first write was cut off: it has no {MANIFEST}; "
        f"run `memoir edit FILE --model NAME --store {folder}` (again)"
    ) from missing


def _out_of_range(manifest: Manifest) -> str:
    """What of a manifest's numbers cannot be, or nothing."""
    ranges = {
        "format": (1, FORMAT),
        "generation": (0, _LAST_GENERATION),
        "layer": (0, 1 << 20),
        "d": (8, 1 << 28),
        "h": (1, 1 << 28),
        "k": (1, manifest.d),
        "seed": (0, (1 << 64) - 1),
        "next_id": (0, _LAST_ID),
    }
    for name, (least, most) in ranges.items():
        if not least <= getattr(manifest, name) <= most:
            return f"{name} {getattr(manifest, name)}"
    if not 0 < manifest.tau <= 1:
        return f"tau {manifest.tau}"
    if manifest.d % 8:
        return f"d {manifest.d}"
    if manifest.format < _FIRST_WITH_ACTS and manifest.span.acts != "first":  # readers of its time would act elsewhere
        return f"span.acts {manifest.span.acts} in format {manifest.format}"
    may_spare = manifest.format >= _FIRST_WITH_BEHIND and manifest.span.acts == "last"
    if manifest.span.behind < 0 or (manifest.span.behind and not may_spare):
        return f"span.behind {manifest.span.behind} with span.acts {manifest.span.acts} in format {manifest.format}"
    if manifest.format < _FIRST_WITH_JUDGE and (manifest.span.candidates or manifest.span.tools):
        return f"span.candidates or span.tools in format {manifest.format}"
    if manifest.format < _FIRST_WITH_JUDGE and manifest.judge:  # readers of its time would go by masks alone
        return f"judge {manifest.judge:.80} in format {manifest.format}"
    if manifest.format < _FIRST_WITH_JUDGE and manifest.base.adapter:  # they would take the model without it
        return f"base.adapter in format {manifest.format}"
    if manifest.threshold and (wrong := threshold_fault(manifest.threshold)):
        return wrong
    if manifest.format < _FIRST_WITH_JUDGE and manifest.threshold:
        return f"threshold in format {manifest.format}"
    for kind in KINDS:
        size = getattr(manifest, kind).size
        if not 0 <= size < 1 << 48:
            return f"{kind} of {size} bytes"
    return ""
