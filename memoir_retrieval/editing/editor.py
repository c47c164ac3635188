"""Turning edits into a store: train, ask back, keep or refuse; one after another, or several memories side by side."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import torch

from memoir_index import HammingIndex, unpack
from memoir_retrieval.background import background_prompts
from memoir_retrieval.editing.contexts import chat_contexts, own_prefixes
from memoir_retrieval.editing.outcome import (
    SAME_QUESTION,
    Conflict,
    Conflicting,
    Failed,
    Outcome,
    Progress,
    TrainingStep,
    plan,
)
from memoir_retrieval.editing.train import Training
from memoir_retrieval.editing.trainer import Learnt, Task, Trainer
from memoir_retrieval.editing.wordings import Wordings
from memoir_retrieval.edits.record import Edit, StoredEdit, prompt_key, stored_as
from memoir_retrieval.edits.requires import one_question
from memoir_retrieval.errors import ConfigError, StoreError
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.model.forward import question_means
from memoir_retrieval.model.presets import preset_for
from memoir_retrieval.question.fingerprint import Fingerprint, permutation
from memoir_retrieval.question.prompts import prompt_ids
from memoir_retrieval.question.span import derive_span_rule, find_span
from memoir_retrieval.store.commits import Commits
from memoir_retrieval.store.files import store_lock
from memoir_retrieval.store.manifest import Manifest, draft_manifest
from memoir_retrieval.store.read import MANIFEST, EditStore

__all__ = ["Editor"]

# A checkpoint rewrites the store. Its cost is bounded by writing at most this often (seconds) while edits go on.
CHECKPOINT_EVERY = 30.0
# A residual memory takes at most D over this many edits: as many as were measured to leave each other alone (docs).
EDITS_PER_MEMORY = 5
# Memories that are trained side by side, at most, unless told otherwise: what more of them gain is little (docs).
SIDE_BY_SIDE = 4


class NewEdit(NamedTuple):
    """An edit to be added. id: under which. rephrases: how many of them are trained too. old: the stored edit that it
    replaces."""

    edit: Edit | StoredEdit
    id: int
    rephrases: int
    old: StoredEdit | None = None


class Editor:
    """Trains edits on a model and writes them to a store.

    One editor at a time may write a store: use it as a context manager, which takes the store's lock.
    """

    def __init__(
        self,
        base: BaseModel,
        store: str | Path,
        *,
        chat: bool = True,
        rule: Literal["question", "all"] = "question",
        k: int | None = None,
        tau: float | None = None,
        seed: int = 0,
        training: Training | None = None,
        trainer: Callable[[Editor], Any] | None = None,
        watch: Callable[[TrainingStep], None] = lambda _: None,
    ):
        """Settings only matter for a new store; an existing one keeps those it was made with.

        base: the loaded model. chat: ask each prompt through the chat template. rule: which tokens are pooled.
        k, tau: by default the preset's. trainer: makes what has the methods of `Trainer`, as the editor is entered; by
        default one in this process, whose every gradient step `watch` is told of. Raises ConfigError for settings that
        cannot work.
        """
        preset = preset_for(base.model.config)
        self.base = base
        self.path = Path(store)
        self.chat = chat
        self.rule = rule
        self.k = preset.k if k is None else k
        usual = preset.tau_chat if chat else preset.tau
        self.tau = usual if tau is None else tau
        self.seed = seed
        self.training = training or Training()
        self._make_trainer = trainer or (lambda editor: Trainer(base, editor._wordings, editor.training, watch))
        self.outcome = Outcome()
        self._trainer: Any = None
        if not 0 < self.k <= base.d:
            raise ConfigError(f"k is {self.k}, but {base.module} has D={base.d} inputs: choose 0 < k <= {base.d}")
        if not 0 < self.tau <= 1:
            raise ConfigError(f"tau is {self.tau}: choose 0 < tau <= 1, such as the preset's {usual}")
        if base.d % 8:
            raise ConfigError(f"{base.module} has D={base.d} inputs, which is no multiple of 8: masks cannot be packed")
        if chat and not getattr(base.tokenizer, "chat_template", None):
            raise ConfigError(f"{base.name} has no chat template: use raw prompts (--no-chat)")

    def __enter__(self) -> Editor:
        _refuse_foreign(self.path)
        self._lock = store_lock(self.path)
        self._lock.__enter__()
        try:
            if (self.path / MANIFEST).exists():
                self._load(EditStore.open(self.path))
            else:
                self._begin()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self._trainer.stop()
        self._lock.__exit__(None, None, None)

    def _begin(self) -> None:
        self.generation = 0
        self.next_id = 0
        self.span = derive_span_rule(self.base.tokenizer, self.rule)
        wanted = self.training.contexts
        given = chat_contexts()[:wanted] if self.chat else own_prefixes(self.base, wanted, self.seed)
        self.contexts: tuple[Any, ...] = tuple(given)
        with_mask = min(self.training.context_masks, wanted) if self.chat and self.rule == "question" else 0
        self.training = replace(self.training, context_masks=with_mask)
        self.permutation = permutation(self.base.d, self.seed)
        rows = [prompt_ids(self.base.tokenizer, p, chat=self.chat) for p in background_prompts()]
        means = question_means(self.base, rows, [find_span(ids, self.span) for ids in rows])
        self.background = means.mean(0).cpu().numpy()
        self._forget()
        self._commits = Commits(self.path)
        self._prepare()

    def _forget(self) -> None:
        """Begin with nothing trained."""
        self.memories = [torch.zeros(self.base.h, self.base.d, device=self.base.device)]
        self.edits: list[StoredEdit] = []
        self.index = HammingIndex(self.base.d, self.k)

    def _load(self, store: EditStore) -> None:
        store.require(self.base.identity, self.base.name)
        made = store.manifest
        self.generation, self.next_id = made.generation, made.next_id
        self.span, self.contexts, self.chat = made.span, made.contexts, made.chat
        self.k, self.tau, self.seed = made.k, made.tau, made.seed
        try:
            self.training = msgspec.convert({"context_masks": 0} | made.training, Training)
        except msgspec.ValidationError as error:
            raise StoreError(f"store {self.path} is damaged (training: {error}): restore it from a backup") from None
        self.permutation, self.background = store.permutation, store.background
        self.memories = [torch.tensor(memory, device=self.base.device) for memory in store.memories]
        self.edits = list(store.edits)
        self.index = store.index()
        self._commits = Commits(self.path, store)
        self._prepare()

    def _prepare(self) -> None:
        fingerprint = Fingerprint(self.background, self.permutation, self.k, self.base.device)
        self._wordings = Wordings(
            self.base, self.span, self.contexts, fingerprint, self.training, chat=self.chat, seed=self.seed
        )
        if self._trainer:
            self._trainer.stop()
        self._trainer = self._make_trainer(self)

    def add(
        self,
        edits: Iterable[Edit],
        *,
        on_conflict: Conflict = "refuse",
        rephrase_masks: bool = False,
        keep_failed: bool = False,
        side_by_side: int | None = None,
        progress: Callable[[Progress], None] = lambda _: None,
    ) -> list[StoredEdit]:
        """Train edits in order and commit them. Returns those that are new; `outcome` tells what became of the others.

        An edit that the store has already is skipped, so an interrupted run is resumed by running it again.
        on_conflict: what happens to a question that the store answers otherwise. The same text: "refuse" and "both"
        raise EditFileError before the first edit is trained, "first" keeps the stored edit, "last" replaces it. Other
        words with nearly the same mask: "refuse" and "first" leave the new edit out, "last" replaces the stored one,
        "both" stores it beside that one; each is reported.
        rephrase_masks: an edit's rephrasings are trained too and get masks of their own.
        keep_failed: store edits that failed the audit as well.
        side_by_side: so many memories are trained at a time, and each edit goes to the emptiest of them. By default as
        many as the edits would fill one after the other, at most 4: so one for what fits into one.
        Interrupted (KeyboardInterrupt, or any error), the edits that are done are committed first.
        """
        given = list(edits)
        for edit in given:
            self._wordings.check(edit)
        todo, replaced = plan(given, self.edits, on_conflict)
        self.outcome = outcome = Outcome(skipped=len(given) - len(todo))
        n = min(side_by_side or self.side_by_side(len(given)), max(1, len(given)))
        started = committed = time.monotonic()
        pause = CHECKPOINT_EVERY
        done = 0
        try:
            while done < len(todo):
                following = [(edit, replaced.get(prompt_key(edit.prompt))) for edit in todo[done : done + n]]
                asked = [
                    NewEdit(e, self.next_id + i, len(e.rephrases) * rephrase_masks, old)
                    for i, (e, old) in enumerate(following)
                ]
                new = self._add(asked, n, on_conflict, keep_failed)
                now = time.monotonic()
                if self._commits.changed and now - committed > pause:
                    self._commit()
                    committed = time.monotonic()
                    pause = max(CHECKPOINT_EVERY, 20 * (committed - now))
                for stored in new:
                    done += 1
                    progress(Progress(done, len(todo), stored, now - started))
        finally:
            if self._commits.changed:
                self._commit()
        return outcome.stored

    def compact(
        self,
        progress: Callable[[Progress], None] = lambda _: None,
        *,
        acts: Literal["first", "last"] | None = None,
    ) -> list[StoredEdit]:
        """Train the stored edits again, from an empty memory, in their order and under their ids, and publish that.

        acts: from which of a question's tokens on the residual acts from now on (see `Span`); by default as before.
        Raises ConfigError for "last" where the span rule is "all". Returns them; one that fails the audit is kept, and
        named in `outcome`. Nothing is left of edits that were removed or replaced. Interrupted, store and editor are
        what they were.
        """
        if acts == "last" and self.span.rule == "all":
            raise ConfigError(f"store {self.path} has the span rule all, which acts on every token: choose acts first")
        held = self.memories, self.edits, self.index, self.next_id
        span, self.span = self.span, msgspec.structs.replace(self.span, acts=acts or self.span.acts)
        commits, self._commits = self._commits, Commits(self.path)
        self.outcome = Outcome()
        started = time.monotonic()
        try:
            self._forget()
            self._prepare()
            _, edits, index, next_id = held
            masks = Counter(index.ids.tolist())
            n, done = self.side_by_side(len(edits)), 0
            while done < len(edits):
                asked = [
                    NewEdit(edit, edit.id, self._wordings.rephrases(masks[edit.id])) for edit in edits[done : done + n]
                ]
                for stored in self._add(asked, n, "both", keep_failed=True):
                    done += 1
                    progress(Progress(done, len(edits), stored, time.monotonic() - started))
            self.next_id = next_id
            self._commit()
        except BaseException:
            self.memories, self.edits, self.index, self.next_id = held
            self.span, self._commits = span, commits
            self._prepare()
            raise
        return self.outcome.stored

    def side_by_side(self, edits: int) -> int:
        """How many memories `add` trains at a time, unless told otherwise, of so many edits."""
        return max(1, min(SIDE_BY_SIDE, -(-edits // self._room)))

    @property
    def _room(self) -> int:
        """Edits that a memory takes."""
        return self.training.edits_per_memory or max(1, self.base.d // EDITS_PER_MEMORY)

    def _add(
        self, asked: Sequence[NewEdit], side_by_side: int, on_conflict: Conflict, keep_failed: bool
    ) -> list[StoredEdit | None]:
        """Train the first of the edits, as many as can be side by side, ask them back and take them up, or say in
        `outcome` why not."""
        memories = self._memories(len(asked), side_by_side)
        tasks = [Task(one.id, one.edit, memory, one.rephrases) for one, memory in zip(asked, memories, strict=True)]
        codes = self._trainer.prepare(tasks)
        # Two of one question are trained one after the other, so that the second meets the first in the store.
        bits = unpack(np.concatenate([own[:1] for own in codes]), self.base.d).astype(np.float32)
        alike = bits @ bits.T >= SAME_QUESTION * self.k
        first = np.flatnonzero(np.tril(alike, -1).any(axis=1))
        together = range(int(first[0]) if len(first) else len(tasks))
        old = {i: one for i in together if (one := asked[i].old) is not None}
        refused: set[int] = set()
        for i in together:
            rival = None if i in old else self._contradicted(asked[i].edit, codes[i][:1])
            if rival:
                self.outcome.conflicting.append(rival)
                if on_conflict in ("refuse", "first"):
                    refused.add(i)
                elif on_conflict == "last":
                    old[i] = rival.stored
        for one in old.values():
            self._trainer.forget(one.id)
        trained = [i for i in together if i not in refused]
        learnt = dict(zip(trained, self._trainer.learn([tasks[i] for i in trained]), strict=True)) if trained else {}
        done: list[StoredEdit | None] = [None for _ in together]
        for i in trained:
            done[i] = self._take_up(tasks[i], learnt[i], codes[i], old.get(i), keep_failed, memories)
        return done

    def _contradicted(self, edit: Edit | StoredEdit, code: np.ndarray) -> Conflicting | None:
        """The stored edit that answers the same question, going by the masks, otherwise."""
        if self.index.search(code, SAME_QUESTION).ids[0] < 0:
            return None
        # Like questions about other names are no rivals: the nearest that may answer this one is, or would be.
        for number, overlap in self._like(code):
            stored = next(one for one in self.edits if one.id == number)
            if one_question(stored, edit):
                same = not stored.trained or prompt_key(stored.target) == prompt_key(edit.target)
                return None if same else Conflicting(edit.prompt, edit.target, stored, round(overlap, 4))
        return None

    def _like(self, code: np.ndarray) -> list[tuple[int, float]]:
        """Ids and overlaps of all stored edits with nearly this mask, the nearest first."""
        n = 16
        while True:
            ids, overlaps = self.index.nearest(code, n)
            like = [(i, o) for i, o in zip(ids[0].tolist(), overlaps[0].tolist(), strict=True) if o >= SAME_QUESTION]
            if len(like) < n:
                return like
            n *= 4

    def _memories(self, n: int, side_by_side: int) -> list[int]:
        """Numbers of n open memories, the emptiest first. Of those that have room the first `side_by_side` are open;
        missing ones are added. So a run that goes on chooses as if it had never stopped."""
        held = self._held()
        with_room = [number for number in range(len(self.memories)) if held[number] < self._room]
        while len(with_room) < side_by_side:
            with_room.append(self._new_memory())
        chosen = sorted(with_room[:side_by_side], key=lambda m: held[m])
        for number in set(self._trainer.memories) - set(chosen):
            self._trainer.close(number)
        for number in chosen[:n]:
            self._open(number)
        return chosen[:n]

    def _held(self) -> Counter[int]:
        """How many edits each memory holds."""
        return Counter(edit.memory for edit in self.edits if edit.trained)

    def _new_memory(self) -> int:
        self.memories.append(torch.zeros(self.base.h, self.base.d, device=self.base.device))
        return len(self.memories) - 1

    def _spare(self, busy: Collection[int]) -> Iterator[int]:
        """Where an edit is tried that would overwrite others: in the newest memory, unless it is busy or full, which
        takes all of them in this way; then in one of its own."""
        newest = len(self.memories) - 1
        if newest not in busy and self._held()[newest] < self._room:
            yield newest
        yield self._new_memory()

    def _open(self, number: int) -> None:
        if number not in self._trainer.memories:
            masks = Counter(self.index.ids.tolist())
            own = [(edit, masks[edit.id]) for edit in self.edits if edit.trained and edit.memory == number]
            self._trainer.open(number, self.memories[number], own)

    def _take_up(
        self,
        task: Task,
        learnt: Learnt,
        codes: np.ndarray,
        old: StoredEdit | None,
        keep_failed: bool,
        busy: Collection[int],
    ) -> StoredEdit | None:
        """busy: the memories that others of the batch were trained in, which may not be taken up yet."""
        self.outcome.retried += learnt.retried
        if learnt.lost:
            for number in self._spare(busy):
                task = task._replace(memory=number)
                self._open(number)
                (learnt,) = self._trainer.learn([task])
                if not learnt.lost:
                    break
        if learnt.reason:
            self.outcome.failed.append(Failed(task.edit.prompt, task.edit.target, learnt.reason))
            if not keep_failed:
                if old and old.trained:
                    self._trainer.remember(old.memory, old, int((self.index.ids == old.id).sum()))
                return None
        edit, trained = task.edit, learnt.trained
        stored = stored_as(
            edit,
            id=task.id,
            created=getattr(edit, "created", "") or _now(),
            loss=round(trained.loss, 5),
            steps=trained.steps,
            memory=task.memory,
        )
        self._trainer.take(task, trained)
        if old:
            self._commits.rewrite()
            self.index.remove([old.id])
            self.edits.remove(old)
        self._commits.add(stored, codes, trained.columns)
        self.index.add([stored.id] * len(codes), codes)
        self.edits.append(stored)
        self.outcome.stored.append(stored)
        self.next_id = max(self.next_id, task.id + 1)
        return stored

    def next_manifest(self, edits: Iterable[StoredEdit]) -> Manifest:
        """The manifest of a next generation of these edits, as `write_generation` takes it."""
        return draft_manifest(
            generation=self.generation + 1,
            model=self.base.name,
            base=self.base.identity,
            module=self.base.module,
            layer=self.base.layer,
            d=self.base.d,
            h=self.base.h,
            k=self.k,
            tau=self.tau,
            span=self.span,
            chat=self.chat,
            dtype=str(self.base.model.dtype).removeprefix("torch."),
            seed=self.seed,
            contexts=self.contexts,
            training=msgspec.to_builtins(self.training),
            next_id=self.next_id,
            untrained=sum(not edit.trained for edit in edits),
        )

    def _commit(self) -> None:
        """Write everything trained so far as the next generation."""
        manifest = self._commits.write(
            self.next_manifest(self.edits), self.memories, self.index, self.edits, self.background, self.permutation
        )
        self.generation = manifest.generation


def _refuse_foreign(path: Path) -> None:
    """Raise StoreError for a folder of something else, before anything, a lock included, is put into it."""
    if not path.is_dir() or (path / MANIFEST).exists():
        return
    ours = (".", "memory-", "codes-", "edits-", MANIFEST)  # what a first write that was cut off may leave
    others = sorted(p.name for p in path.iterdir() if not p.name.startswith(ours))
    if others:
        raise StoreError(f"{path} is not empty and not a store (it holds {others[0]}): choose a new folder")


def _now() -> str:
    """The time that new edits get. $SOURCE_DATE_EPOCH sets it, so that the same input gives the same bytes."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not fixed:
        return datetime.now(UTC).isoformat(timespec="seconds")
    try:
        return datetime.fromtimestamp(int(fixed), UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        raise ConfigError(f"SOURCE_DATE_EPOCH is {fixed!r}; give seconds since 1970, or unset it") from None
