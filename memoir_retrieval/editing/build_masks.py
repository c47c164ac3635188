"""Making the masks of many edits at once, before any of them is trained.

Prompts are sorted by length and cut into shards, each of which is computed in the same batches wherever it is computed:
by this process, by the next one after an interruption, or by another machine (`build_ray`). So the same input gives the
same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from memoir_index import HammingIndex, check_codes
from memoir_retrieval.edits.record import Edit, StoredEdit, check_texts, masked, stored_as
from memoir_retrieval.edits.requires import check_requires
from memoir_retrieval.errors import CodeError, EditFileError, StoreError
from memoir_retrieval.question.prompts import Prompt, prompt_ids
from memoir_retrieval.question.span import SpanRule, find_span
from memoir_retrieval.store.files import publish, read_small
from memoir_retrieval.store.manifest import Manifest
from memoir_retrieval.store.read import Content
from memoir_retrieval.store.write import write_generation

if TYPE_CHECKING:
    from memoir_retrieval.editing.editor import Editor
    from memoir_retrieval.model.base import BaseModel
    from memoir_retrieval.question.fingerprint import Fingerprint

__all__ = ["BuildProgress", "Compute", "Shard", "build", "shard_codes"]

SHARD = 1024
BATCH = 32


class Shard(NamedTuple):
    """Prompts that are computed together.

    number: of the shard.
    rows: the token ids of each prompt.
    places: where their masks go, int64 [n].
    """

    number: int
    rows: list[list[int]]
    places: np.ndarray


class BuildProgress(NamedTuple):
    """How far a build is.

    done: masks that are made.
    total: of so many.
    resumed: of those that are made, how many were before an interruption.
    """

    done: int
    total: int
    resumed: int


Compute = Callable[[Iterable[Shard]], Iterator[tuple[Shard, np.ndarray]]]
"""Makes the masks of shards, in any order: uint8 [n, D/8] each."""


def build(
    editor: Editor,
    edits: Sequence[Edit],
    *,
    rephrases: bool = False,
    compute: Compute | None = None,
    progress: Callable[[BuildProgress], None] = lambda _: None,
) -> Manifest:
    """Write a store of edits that can be looked up and are not trained. Returns its manifest.

    editor: an open one on a folder without a store.
    edits: what is written.
    rephrases: give each edit the masks of its rephrasings too.
    compute: makes the masks (default: this process).
    progress: called after every shard.
    Interrupted, what is done is kept in the folder, and the same call goes on from there.
    Raises StoreError where there is a store already, EditFileError for a prompt without tokens.
    """
    store = editor.store
    if editor.generation:
        raise StoreError(f"{editor.path} is a store already: choose a new folder, or append with `memoir edit`")
    for edit in edits:
        check_texts(edit, len(edit.rephrases) * rephrases)
        check_requires(edit, whole=store.manifest.span.rule == "all")
    after = store.manifest.masked_contexts
    texts = [(i, text) for i, edit in enumerate(edits) for text in masked(edit, after, len(edit.rephrases) * rephrases)]
    codes = _codes(editor, [text for _, text in texts], compute or partial(_compute_here, editor), progress)
    stored = _stored(edits)
    ids = np.array([i for i, _ in texts], dtype=np.int64)
    content = Content(
        memories=np.zeros((1, editor.base.h, editor.base.d), dtype=np.float32),
        background=store.background,
        permutation=store.permutation,
        tasks=store.tasks,
        references=store.references,
        codes=codes,
        ids=ids,
        memory_of=np.zeros(len(texts), dtype=np.int32),
        edits=stored,
    )
    index = HammingIndex.from_codes(editor.base.d, store.manifest.k, ids, codes, copy=False)
    manifest = msgspec.structs.replace(store.next_manifest(stored, index), next_id=len(stored))
    published = write_generation(editor.path, manifest, content)
    for path in editor.path.glob(".masks-*"):
        path.unlink(missing_ok=True)
    return published


def _codes(
    editor: Editor, texts: Sequence[Prompt], compute: Compute, progress: Callable[[BuildProgress], None]
) -> np.ndarray:
    """The masks of texts, those included that an interrupted run has left: uint8 [N, D/8]."""
    shards = list(_shards(editor, texts))
    key = _key(editor, shards)
    codes = np.empty((len(texts), editor.base.d // 8), dtype=np.uint8)
    todo, done = [], 0
    for shard in shards:
        if (kept := _resume(_part(editor.path, key, shard), len(shard.rows), editor.base.d, editor.manifest.k)) is None:
            todo.append(shard)
        else:
            codes[shard.places] = kept
            done += len(kept)
    resumed = done
    progress(BuildProgress(done, len(texts), resumed))
    for shard, masks in compute(todo):
        codes[shard.places] = masks
        publish(_part(editor.path, key, shard), hashlib.sha256(masks.data).digest() + masks.tobytes())
        done += len(masks)
        progress(BuildProgress(done, len(texts), resumed))
    return codes


def shard_codes(base: BaseModel, fingerprint: Fingerprint, rule: SpanRule, shard: Shard, batch: int) -> np.ndarray:
    """The masks of a shard's prompts: uint8 [n, D/8].

    base: the loaded model.
    fingerprint: makes the masks.
    rule: which tokens of a prompt are pooled.
    shard: the prompts.
    batch: prompts of one forward pass.
    """
    from memoir_retrieval.model.forward import question_means

    spans = [find_span(ids, rule) for ids in shard.rows]
    return fingerprint.codes(question_means(base, shard.rows, spans, batch))


def _compute_here(editor: Editor, shards: Iterable[Shard]) -> Iterator[tuple[Shard, np.ndarray]]:
    fingerprint, rule = editor.store.fingerprint, editor.manifest.span
    for shard in shards:
        yield shard, shard_codes(editor.base, fingerprint, rule, shard, BATCH)


def _shards(editor: Editor, texts: Sequence[Prompt]) -> Iterator[Shard]:
    rows = []
    for text in texts:
        ids = prompt_ids(editor.base.tokenizer, text, chat=editor.manifest.chat)
        span = find_span(ids, editor.manifest.span)
        if span.start >= span.end or len(ids) > editor.base.max_length:
            raise EditFileError(
                f"prompt {text[:60]!r} has {len(ids)} tokens, {span.end - span.start} of them to pool; the model takes "
                f"{editor.base.max_length}: leave it out"
            )
        rows.append(ids)
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    for first in range(0, len(order), SHARD):
        places = order[first : first + SHARD]
        yield Shard(first // SHARD, [rows[i] for i in places], np.array(places))


def _key(editor: Editor, shards: Sequence[Shard]) -> str:
    """A digest of all that the masks depend on."""
    store, manifest = editor.store, editor.manifest
    digest = hashlib.sha256(msgspec.json.encode((manifest.base, manifest.module, manifest.span, manifest.k)))
    digest.update(store.background.tobytes() + store.permutation.tobytes())
    digest.update(str((editor.base.model.dtype, SHARD, BATCH)).encode())
    for shard in shards:
        digest.update(msgspec.msgpack.encode(shard.rows))
    return digest.hexdigest()[:16]


def _part(folder: Path, key: str, shard: Shard) -> Path:
    return folder / f".masks-{key}-{shard.number:06d}"


def _resume(path: Path, rows: int, d: int, k: int) -> np.ndarray | None:
    """The masks that an interrupted run has left, or None where there are none, or damaged ones."""
    size = rows * (d // 8)
    try:
        data = read_small(path, 32 + size)
        codes = np.frombuffer(data, np.uint8, offset=32)
        if len(codes) != size or hashlib.sha256(codes.data).digest() != data[:32]:
            return None
        return check_codes(codes.reshape(rows, -1), d, k)
    except (OSError, StoreError, CodeError, ValueError):
        return None


def _stored(edits: Sequence[Edit]) -> list[StoredEdit]:
    return [stored_as(edit, id=i, created="", loss=0.0, steps=0, trained=False) for i, edit in enumerate(edits)]
