"""A store while one editor writes it: what exists only between opening and closing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch

from memoir_index import HammingIndex
from memoir_retrieval.background import background_prompts, chat_contexts, reference_prompts
from memoir_retrieval.editing.contexts import own_prefixes
from memoir_retrieval.edits.judge import judge_named, shipped_judge
from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.errors import ConfigError, ModelError, StoreError
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.model.forward import question_means
from memoir_retrieval.question.fingerprint import Fingerprint, permutation
from memoir_retrieval.question.prompts import prompt_ids
from memoir_retrieval.question.span import derive_span_rule, find_span
from memoir_retrieval.question.tasks import shipped_tasks
from memoir_retrieval.store.commits import Commits
from memoir_retrieval.store.files import store_lock
from memoir_retrieval.store.manifest import MANIFEST, Manifest, draft_manifest, read_manifest
from memoir_retrieval.store.read import NO_TASKS, EditStore
from memoir_retrieval.store.settings import Settings, require_made_with, training_of
from memoir_retrieval.store.threshold import NO_REFERENCES, References, set_tau
from memoir_retrieval.store.write import refuse_foreign

__all__ = ["MOST_OWN", "OpenStore", "StoreState", "make_references"]

MOST_OWN = 2000
"""Reference prompts of a store's users, at most: each is compared with the edits at every commit."""


@dataclass(frozen=True)
class StoreState:
    """What changes while a store is open.

    manifest, memories, edits, index: see `OpenStore`.
    commits: what is not written yet.
    """

    manifest: Manifest
    memories: list[torch.Tensor]
    edits: list[StoredEdit]
    index: HammingIndex
    commits: Commits


class OpenStore:
    """The content of a store under its writer's lock, and the changes that are not written yet.

    base: the model that it belongs to.
    path: its folder.
    manifest: as it is now; generation 0 before the first write.
    background: float32 [D]. permutation: int64 [D].
    tasks: float32 [K, 2 D + 2], by which tasks around a question are known; [0, 0] where words alone tell them.
    references: prompts by which tau is set with every commit; none where somebody has chosen tau.
    memories: float32 [H, D] each.
    edits: those that are stored, in the order in which they came.
    index: their masks.
    judge: what decides whether two prompts are one question; None where masks alone do.
    """

    def __init__(self, base: BaseModel, path: Path, settings: Settings):
        """Lock the folder, and read its store or begin one.

        base: the model that is edited.
        path: of the folder.
        settings: of a new store, what `Settings.resolved` completes; a store that is there must not contradict them.

        Raises StoreError for a folder of something else, a store that is damaged or locked; StoreMismatch for one of
        another model; ConfigError for settings that cannot work or contradict the store; ModelError for a model whose
        activations overflow.
        """
        self.base, self.path = base, path
        new = not (path / MANIFEST).exists()
        complete = settings
        if new:
            complete = settings.resolved(base)
            refuse_foreign(path)
        with ExitStack() as lock:
            lock.enter_context(store_lock(path))
            if new and not (path / MANIFEST).exists():
                self._begin(complete, settings.tau is not None)
            else:  # perhaps of another first writer, to whom only what was given here can be contrary
                self._load(EditStore.open(path), settings)
            self.training = training_of(self.manifest)
            self._lock = lock.pop_all()
        self._by_halves = False
        self.is_open = True

    def close(self) -> None:
        """Let others write. What was not committed is lost."""
        self.is_open = False
        self._lock.close()

    def _begin(self, settings: Settings, chosen: bool) -> None:
        """settings: all of them. chosen: whether tau stays as it is there."""
        base = self.base
        span = derive_span_rule(base.tokenizer, settings.rule, chat=settings.chat)
        if not settings.chat:
            # No template stands behind a raw prompt, so its last token would be alike in all edits
            # (docs/measurements/choices.md).
            span = msgspec.structs.replace(span, acts="first", behind=0)
        elif settings.rule == "question":
            span = msgspec.structs.replace(span, candidates=True)
        count = int(settings.training["contexts"])
        contexts = chat_contexts()[:count] if settings.chat else own_prefixes(base, count, settings.seed)
        self.manifest = draft_manifest(
            generation=0,
            model=base.name,
            base=base.identity,
            module=base.module,
            d=base.d,
            h=base.h,
            span=span,
            contexts=tuple(contexts),
            next_id=0,
            judge=shipped_judge().name if settings.rule == "question" else "",
            **{
                name: value for name, value in msgspec.structs.asdict(settings).items() if name not in ("rule", "place")
            },
        )
        self.judge = judge_named(self.manifest.judge, self.path)
        self.tasks = shipped_tasks(base.identity.layer) if span.candidates and span.behind else NO_TASKS
        self.permutation = permutation(base.d, settings.seed)
        means = self._background_means()
        self.background: np.ndarray = means.mean(0).cpu().numpy()
        if not np.isfinite(self.background).all():
            raise ModelError(
                f"{base.name} gives NaN or infinite numbers at {base.module} in {settings.dtype}: choose another "
                "dtype, such as float32"
            )
        self.references = NO_REFERENCES
        if not chosen:
            known = dict(zip(background_prompts(), means, strict=True))
            self.references = make_references(base, self.manifest, self.fingerprint, known=known)
        self.empty()

    def _background_means(self) -> torch.Tensor:
        """The mean activation of each prompt whose mean is the background: float32 [N, D]."""
        rows = [prompt_ids(self.base.tokenizer, text, chat=self.manifest.chat) for text in background_prompts()]
        spans = [find_span(ids, self.manifest.span) for ids in rows]
        # What a template puts before every question is run once, and what it puts behind them not at all.
        shared = rows[0][: min(span.start for span in spans)]
        if any(ids[: len(shared)] != shared for ids in rows):
            shared = []
        questions = [ids[len(shared) : span.end] for ids, span in zip(rows, spans, strict=True)]
        return question_means(self.base, questions, [span.moved(-len(shared)) for span in spans], before=shared)

    def _load(self, store: EditStore, settings: Settings) -> None:
        stored = Settings.of(store.manifest)
        if store.manifest.base.config == self.base.identity.config and settings.place not in (None, stored.place):
            stored.require(settings, self.path)  # names the place, where the model's digests name a layer
        store.require(self.base.identity, self.base.name)
        require_made_with(store.manifest, settings, self.path)
        self.judge = judge_named(store.manifest.judge, self.path)
        self.manifest = store.manifest
        # Copies: a view of a mapped file would keep this editor from removing it, with all memories in it.
        self.permutation, self.background = store.permutation.copy(), store.background.copy()
        self.tasks = store.tasks.copy()
        self.references = store.references._replace(codes=store.references.codes.copy())
        self.memories = [torch.tensor(memory, device=self.base.device) for memory in store.memories]
        self.edits = list(store.edits)
        self.index = store.index()
        self._commits = Commits(self.path, store)

    def empty(self, acts: Literal["first", "last"] | None = None) -> None:
        """Have no edits and one memory of zeros; the next commit writes every file.

        acts: "first": the residual acts from a question's first token on from now on; "last": from the token before
            the answer, as in new chat stores; by default as before.
        Raises ConfigError for "last" where the span rule is "all".
        """
        span = self.manifest.span
        if acts == "last" and span.rule == "all":
            raise ConfigError(f"store {self.path} has the span rule all, which acts on every token: choose acts first")
        if acts:
            behind = derive_span_rule(self.base.tokenizer).behind if acts == "last" and self.manifest.chat else 0
            span = msgspec.structs.replace(span, acts=acts, behind=behind)
        self.manifest = msgspec.structs.replace(self.manifest, span=span)
        self.memories = []
        self.new_memory()
        self.edits = []
        self.index = HammingIndex(self.base.d, self.manifest.k)
        self._commits = Commits(self.path)

    @property
    def state(self) -> StoreState:
        """What changes while the store is open, to be put back by `restore`."""
        return StoreState(self.manifest, self.memories, self.edits, self.index, self._commits)

    def restore(self, state: StoreState) -> None:
        """Go back to a state from before `empty` was called.

        state: taken then.
        """
        self.manifest, self.memories, self.edits = state.manifest, state.memories, state.edits
        self.index, self._commits = state.index, state.commits
        self._by_halves = False

    def is_published(self, state: StoreState) -> bool:
        """Whether the folder has a generation after a state, though the commit that wrote it was interrupted.

        If so, this is that generation from then on.

        state: taken before.
        """
        if not (self.path / MANIFEST).exists() or read_manifest(self.path).generation <= state.manifest.generation:
            return False
        store = EditStore.open(self.path)
        self.manifest, self._commits = store.manifest, Commits(self.path, store)
        return True

    @property
    def fingerprint(self) -> Fingerprint:
        """What makes the store's masks."""
        return Fingerprint(self.background, self.permutation, self.manifest.k, self.base.device)

    @property
    def changed(self) -> bool:
        """Whether there is anything that can be committed: nothing can once an edit was taken up by halves."""
        return self._commits.changed and not self._by_halves

    def new_memory(self) -> int:
        """Add a memory of zeros. Returns its number."""
        self.memories.append(torch.zeros(self.base.h, self.base.d, device=self.base.device))
        return len(self.memories) - 1

    def add(
        self, edit: StoredEdit, codes: np.ndarray, columns: torch.Tensor, replaced: Sequence[StoredEdit] | None
    ) -> None:
        """Take up an edit whose memory holds it already.

        edit: as it is stored.
        codes: uint8 [R, D/8], its masks.
        columns: int64 [C], those of its memory that were changed for it.
        replaced: the edits that it replaces, if any; in its place where one is the same, trained again.
        Raises StoreError where an interruption has left another by halves.
        """
        if self._by_halves:
            raise StoreError(f"an edit was being taken up into {self.path} when this was interrupted: open it again")
        self._by_halves = True
        place = len(self.edits)
        for old in replaced or ():
            self._commits.rewrite()
            self.index.remove([old.id])
            if old.id == edit.id:
                place = self.edits.index(old)
            self.edits.remove(old)
        self._commits.add(edit, codes, columns)
        self.index.add([edit.id] * len(codes), codes)
        self.edits.insert(place, edit)
        self.manifest = msgspec.structs.replace(self.manifest, next_id=max(self.manifest.next_id, edit.id + 1))
        self._by_halves = False

    def next_manifest(self, edits: Sequence[StoredEdit], index: HammingIndex) -> Manifest:
        """The manifest of a next generation, as `write_generation` takes it, with the tau that its edits need.

        edits: those of that generation.
        index: their masks.
        """
        tau, threshold = self.manifest.tau, None
        if self.references.texts:
            tau, threshold = set_tau(index, edits, self.references, self.judge, len(self.manifest.masked_contexts))
        return msgspec.structs.replace(
            self.manifest,
            tau=tau,
            threshold=threshold,
            generation=self.manifest.generation + 1,
            model=self.base.name,
            untrained=sum(not edit.trained for edit in edits),
        )

    def commit(self) -> None:
        """Write everything as the next generation. Raises StoreError where the disk refuses."""
        self.manifest = self._commits.write(
            self.next_manifest(self.edits, self.index),
            self.memories,
            self.index,
            self.edits,
            self.background,
            self.permutation,
            self.tasks,
            self.references,
        )


def make_references(
    base: BaseModel,
    manifest: Manifest,
    fingerprint: Fingerprint,
    more: Sequence[str] = (),
    known: Mapping[str, torch.Tensor] | None = None,
) -> References:
    """The library's prompts that no edit should match, and others, with their masks.

    base: the model.
    manifest: of the store, whose way of asking counts.
    fingerprint: makes its masks.
    more: prompts of the store's own users; of more than `MOST_OWN` so many are drawn, evenly.
    known: float32 [D], the mean activation of prompts that need not be asked again.
    """
    own = list(dict.fromkeys(plain for text in more if (plain := " ".join(text.split()))))
    if len(own) > MOST_OWN:
        own = [own[number * len(own) // MOST_OWN] for number in range(MOST_OWN)]
    prompts = list(dict.fromkeys((*(" ".join(text.split()) for text in reference_prompts()), *own)))
    new = [prompt for prompt in prompts if not known or prompt not in known]
    rows = [prompt_ids(base.tokenizer, prompt, chat=manifest.chat) for prompt in new]
    means = dict(zip(new, question_means(base, rows, [find_span(ids, manifest.span) for ids in rows]), strict=True))
    means |= known or {}
    return References(fingerprint.codes(torch.stack([means[prompt] for prompt in prompts])), tuple(prompts))
