"""Writing the files of a store's next generation, and removing those of earlier ones.

New files are made beside the old ones and the manifest is replaced last, so a reader sees the old generation or the new
one. The caller holds `files.store_lock` throughout. A small commit need not write them: see `additions`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.errors import StoreError
from memoir_retrieval.store.additions import find_additions, is_taken_up, numbers_of
from memoir_retrieval.store.edit_lines import edit_chunks
from memoir_retrieval.store.files import Written, remove_unused, store_lock, write_new
from memoir_retrieval.store.manifest import KINDS, MANIFEST, NAMES, FileEntry, Manifest, read_manifest, write_manifest
from memoir_retrieval.store.read import Content, EditStore
from memoir_retrieval.store.tensors import tensor_chunks, tensors_size
from memoir_retrieval.store.threshold import References

__all__ = ["leftovers", "refuse_foreign", "sweep", "sweep_if_free", "write_again", "write_generation"]


def write_generation(
    folder: Path,
    manifest: Manifest,
    content: Content,
    *,
    rows: np.ndarray | None = None,
    unchanged: dict[str, FileEntry] | None = None,
) -> Manifest:
    """Publish a new generation; the caller holds `store_lock`. Returns its manifest.

    folder: the store's.
    manifest: with `generation` being the one to write; `format`, `library`, `sha256` and the files are set here.
    content: what the generation holds.
    rows: int64, which rows of codes, ids and memory_of are written; by default all.
    unchanged: the files, by kind, that an earlier generation has already written and that stay as they are.
    Raises StoreError where the disk refuses; the store is then what it was before. The files of other generations are
    removed unless a reader holds them: see `leftovers`.
    """
    generation = manifest.generation
    if (folder / MANIFEST).exists():
        manifest_now = read_manifest(folder)
        now = manifest_now.generation + find_additions(folder, manifest_now)
        if now >= generation:
            raise StoreError(f"store {folder} is at generation {now} already, {generation} is old: open it again")
    if strays := [number for number in numbers_of(folder) if number > generation]:
        raise StoreError(f"{folder} holds added-{min(strays)}.safetensors of another store: choose a new folder")
    memory = (
        {"memory": content.memories, "background": content.background, "permutation": content.permutation}
        | ({"task_units": content.tasks} if len(content.tasks) else {})
        | _reference_tensors(content.references)
    )
    codes = {"codes": content.codes, "ids": content.ids, "memory_of": content.memory_of}
    # How large the edits are is known once they are written.
    files: dict[str, tuple[Iterable[bytes | memoryview], int | None]] = {
        "memory": (tensor_chunks(memory), tensors_size(memory)),
        "codes": (tensor_chunks(codes, rows), tensors_size(codes, rows)),
        "edits": (edit_chunks(content.edits), None),
    }
    written = {kind: (entry.name, Written(entry.size, entry.sha256)) for kind, entry in (unchanged or {}).items()}
    try:
        for kind, (chunks, size) in files.items():
            if kind not in written:
                name = f"{kind}-{generation}.{KINDS[kind]}"
                written[kind] = (name, write_new(folder / name, chunks, size))
        published = write_manifest(folder, manifest, written)
    except StoreError:
        # Where the manifest was replaced and its folder not synced, a power cut may bring the old one back.
        now_there = read_manifest(folder) if (folder / MANIFEST).exists() else None
        kept = {getattr(now_there, kind).name for kind in KINDS} if now_there else set()
        ours = [name for kind, (name, _) in written.items() if kind not in (unchanged or {})]
        remove_unused(folder / name for name in ours if name not in kept)
        raise
    remove_unused(leftovers(folder, published))
    return published


def write_again(
    folder: Path,
    store: EditStore,
    *,
    edits: Iterable[StoredEdit] | None = None,
    rows: np.ndarray | None = None,
    tasks: np.ndarray | None = None,
    references: References | None = None,
    **changes: Any,
) -> Manifest:
    """Publish the content of `store` in `folder` as it is, but for some fields of its manifest.

    folder: where, with its `store_lock` held.
    store: what is written.
    edits, rows: given together, only these edits and these rows of `codes` are kept.
    tasks: float32 [K, 2 D + 2], in place of what the store has (default: as it is).
    references: the same.
    changes: fields of `Manifest`, `generation` among them.
    Raises as `write_generation`.
    """
    kept = set(KINDS) if edits is None else {"memory"}
    content = store.content if edits is None else store.content._replace(edits=edits)
    if tasks is not None and not np.array_equal(tasks, content.tasks):
        kept.discard("memory")
        content = content._replace(tasks=tasks)
    if references is not None and references is not content.references:
        kept.discard("memory")
        content = content._replace(references=references)
    same = Path(folder).resolve() == store.path.resolve() and not store.additions
    return write_generation(
        folder,
        msgspec.structs.replace(store.manifest, **changes),
        content,
        rows=rows,
        unchanged={kind: getattr(store.manifest, kind) for kind in kept} if same else None,
    )


def _reference_tensors(references: References) -> dict[str, np.ndarray]:
    if not references.texts:
        return {}
    texts = np.frombuffer("\n".join(references.texts).encode(), np.uint8)
    return {"references": references.codes, "reference_texts": texts}


def leftovers(folder: Path, manifest: Manifest | None = None) -> list[Path]:
    """Files of other generations: a reader holds them, or a crash left them. The next write removes them.

    folder: the store's.
    manifest: its own, which names the files that stay; by default it is read.
    """
    manifest = manifest or read_manifest(folder)
    ours = {getattr(manifest, kind).name for kind in KINDS}
    return sorted(
        path
        for path in folder.iterdir()
        if (path.name not in ours and any(pattern.fullmatch(path.name) for pattern in NAMES.values()))
        or is_taken_up(path.name, manifest)
    )


def sweep(folder: Path) -> list[str]:
    """Remove the files of other generations that no reader holds; the caller holds `store_lock`. Returns the others.

    Writers do so themselves, but cannot let go of a mapped file that they are still writing from.

    folder: the store's.
    """
    return [path.name for path in remove_unused(leftovers(folder))]


def sweep_if_free(folder: Path) -> list[str]:
    """As `sweep`, for a caller without the lock. Where another holds it nothing is removed: the next write does it.

    folder: the store's.
    """
    try:
        with store_lock(folder):
            return sweep(folder)
    except StoreError:
        return [path.name for path in leftovers(folder)]


def refuse_foreign(path: Path) -> None:
    """Refuse a folder of something else, before anything, a lock included, is put into it.

    path: a folder without a manifest, or none.

    Raises StoreError.
    """
    if not path.is_dir():
        return
    ours = (".", "memory-", "codes-", "edits-", MANIFEST)  # what a first write that was cut off may leave
    others = sorted(p.name for p in path.iterdir() if not p.name.startswith(ours))
    if others:
        raise StoreError(f"{path} is not empty and not a store (it holds {others[0]}): choose a new folder")
