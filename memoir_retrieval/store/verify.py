"""Recomputing everything that a store says of itself, and saying what differs."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from memoir_index import popcount
from memoir_retrieval.errors import StoreError, StoreMismatch
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.store.additions import fetch_additions
from memoir_retrieval.store.files import Data
from memoir_retrieval.store.manifest import KINDS, MANIFEST, FileEntry, Manifest, read_manifest
from memoir_retrieval.store.read import TRIES, EditStore, assemble, parse, read_file, sha256

__all__ = ["SAME_MASK", "verify_masks", "verify_store"]

SAME_MASK = 0.98
"""Least overlap of a mask with itself made again. Another machine, batch or dtype rounds a few bits differently."""


def verify_store(path: str | Path) -> list[str]:
    """Read every byte of a store again. Returns one line for each thing that is not as it says; none for a sound store.

    A writer that replaces the generation meanwhile is no fault: the new one is read.

    path: its folder.

    Raises StoreError where there is no store at all, or it changes all the time; StoreMismatch for one of a newer
    format.
    """
    folder = Path(path)
    manifest, faults = None, list[str]()
    for _ in range(TRIES + 1):
        before = manifest
        try:
            manifest = read_manifest(folder)
        except StoreMismatch:
            raise
        except StoreError as error:
            if not (folder / MANIFEST).exists():
                raise
            return [str(error)]
        if manifest == before:
            return faults
        faults = list(_faults(folder, manifest))
        if not faults:
            return []
    raise StoreError(f"store {folder} changes faster than it can be read: try again when its writer is done")


def _faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    try:
        fetched = fetch_additions(folder, manifest)
    except FileNotFoundError as error:
        yield f"{Path(str(error.filename)).name} is missing"
        return
    except StoreError as error:
        yield str(error)
        return
    data: dict[str, Data] = {}
    for kind in KINDS:  # all before any is hashed: no writer removes a file that is open
        entry: FileEntry = getattr(manifest, kind)
        try:
            data[kind] = read_file(folder, entry)
        except FileNotFoundError:
            yield f"{entry.name} is missing"
        except StoreError as error:
            yield str(error)
    for kind, content in data.items():
        entry = getattr(manifest, kind)
        if (digest := sha256(content)) != entry.sha256:
            yield f"{entry.name} has sha256 {digest}, the manifest says {entry.sha256}"
    if len(data) < len(KINDS):
        return
    mapped = tuple(
        (getattr(manifest, kind), content) for kind, content in data.items() if isinstance(content, mmap.mmap)
    )
    try:
        parts = parse(folder, manifest, data)
        parts.edits.check()
        store = assemble(folder, manifest, parts, fetched, mapped)
    except StoreError as error:
        yield str(error)
        return
    yield from store.faults()


def verify_masks(store: EditStore, base: BaseModel, progress: Callable[[int], None] = lambda _: None) -> list[str]:
    """Make the mask of every edit again and compare. Returns one line for each that differs.

    Each must be one of those that `record.masked` names, up to `SAME_MASK`.

    store: which holds them.
    base: the model that they were made on.
    progress: called with how many edits are done.

    Raises StoreMismatch for another model.
    """
    from memoir_retrieval.edits.record import masked
    from memoir_retrieval.model.forward import question_means
    from memoir_retrieval.question.fingerprint import Fingerprint
    from memoir_retrieval.question.prompts import prompt_ids
    from memoir_retrieval.question.span import find_span

    manifest = store.manifest
    store.require(base.identity, base.name)
    fingerprint = Fingerprint(store.background, store.permutation, manifest.k, base.device)
    faults = []
    for done, edit in enumerate(store.edits, 1):
        texts = masked(edit, manifest.masked_contexts, len(edit.rephrases))
        rows = [prompt_ids(base.tokenizer, text, chat=manifest.chat) for text in texts]
        spans = [find_span(ids, manifest.span) for ids in rows]
        pooled = [(ids, span) for ids, span in zip(rows, spans, strict=True) if span.start < span.end]
        # One at a time, as the editor does: another batch would round differently.
        again = [fingerprint.codes(question_means(base, [ids], [span]))[0] for ids, span in pooled]
        for row in np.flatnonzero(store.ids == edit.id).tolist():
            shared = [int(popcount((store.codes[row] & code)[None])[0]) for code in again]
            if max(shared, default=0) < SAME_MASK * manifest.k:
                faults.append(
                    f"mask {row} of edit {edit.id} overlaps {max(shared, default=0) / manifest.k:.3f} with the one "
                    f"that {edit.prompt!r} gives on {base.name}"
                )
        progress(done)
    return faults
