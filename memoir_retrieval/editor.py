"""Turning edits into a store, one after another: train, ask back, keep or refuse."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch

from memoir_index import HammingIndex
from memoir_retrieval.background import background_prompts
from memoir_retrieval.contexts import chat_contexts, own_prefixes
from memoir_retrieval.edit import Edit, StoredEdit, same_prompt
from memoir_retrieval.errors import ConfigError, StoreError
from memoir_retrieval.files import store_lock
from memoir_retrieval.fingerprint import Fingerprint, permutation
from memoir_retrieval.forward import question_means
from memoir_retrieval.memory import Memory
from memoir_retrieval.model import BaseModel
from memoir_retrieval.outcome import SAME_QUESTION, Conflict, Conflicting, Failed, Outcome, Progress, Step, plan
from memoir_retrieval.presets import preset_for
from memoir_retrieval.products import HalfProducts, half_is_faster
from memoir_retrieval.prompts import prompt_ids
from memoir_retrieval.span import derive_span_rule, find_span
from memoir_retrieval.store import MANIFEST, EditStore
from memoir_retrieval.train import Frozen, Lesson, Trained, Training, answered, train_edit
from memoir_retrieval.wordings import Wordings
from memoir_retrieval.write_store import write_generation

__all__ = ["Editor"]

# A checkpoint rewrites the store. Its cost is bounded by writing at most this often (seconds) while edits go on.
CHECKPOINT_EVERY = 30.0
# A residual memory takes at most D over this many edits: as many as were measured to leave each other alone (docs).
EDITS_PER_MEMORY = 5
# Earlier edits that are asked again after each new one: those whose masks overlap most with its own.
NEIGHBOURS = 4


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
        watch: Callable[[Step], None] = lambda _: None,
    ):
        """Settings only matter for a new store; an existing one keeps those it was made with.

        base: the loaded model. chat: ask each prompt through the chat template. rule: which tokens are pooled.
        k, tau: by default the preset's. watch: told of every gradient step. Raises ConfigError for settings that cannot
        work.
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
        self.outcome = Outcome()
        self._watch = watch
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
        self._lock.__exit__(None, None, None)

    def _begin(self) -> None:
        self.generation = 0
        self.next_id = 0
        self.span = derive_span_rule(self.base.tokenizer, self.rule)
        wanted = self.training.contexts
        given = chat_contexts()[:wanted] if self.chat else own_prefixes(self.base, wanted, self.seed)
        self.contexts: tuple[Any, ...] = tuple(given)
        self.permutation = permutation(self.base.d, self.seed)
        rows = [prompt_ids(self.base.tokenizer, p, chat=self.chat) for p in background_prompts()]
        means = question_means(self.base, rows, [find_span(ids, self.span) for ids in rows])
        self.background = means.mean(0).cpu().numpy()
        self._forget()
        self._prepare()

    def _forget(self) -> None:
        """Begin with nothing trained."""
        self.memories = [torch.zeros(self.base.h, self.base.d, device=self.base.device)]
        self._open = Memory(self.memories[0])
        self.edits: list[StoredEdit] = []
        self.index = HammingIndex(self.base.d, self.k)

    def _load(self, store: EditStore) -> None:
        store.require(self.base.identity, self.base.name)
        made = store.manifest
        self.generation, self.next_id = made.generation, made.next_id
        self.span, self.contexts, self.chat = made.span, made.contexts, made.chat
        self.k, self.tau, self.seed = made.k, made.tau, made.seed
        try:
            self.training = msgspec.convert(made.training, Training)
        except msgspec.ValidationError as error:
            raise StoreError(f"store {self.path} is damaged (training: {error}): restore it from a backup") from None
        self.permutation, self.background = store.permutation, store.background
        self.memories = [torch.tensor(memory, device=self.base.device) for memory in store.memories]
        self.edits = list(store.edits)
        self.index = HammingIndex.from_codes(self.base.d, self.k, store.ids, store.codes)
        self._prepare()

    def _prepare(self) -> None:
        fingerprint = Fingerprint(self.background, self.permutation, self.k, self.base.device)
        self._wordings = Wordings(
            self.base, self.span, self.contexts, fingerprint, self.training, chat=self.chat, seed=self.seed
        )
        self._changed = False
        self._products = HalfProducts(self.base) if half_is_faster(self.base) else None
        self._open = Memory(self.memories[-1])
        for edit in self.edits:
            if edit.trained and edit.memory == len(self.memories) - 1:
                self._open.add(edit.id, self._lessons_of(edit))

    def _quick(self) -> AbstractContextManager[None]:
        """Within the context the model may round its products, where that is faster."""
        return self._products.used() if self._products else nullcontext()

    def add(
        self,
        edits: Iterable[Edit],
        *,
        on_conflict: Conflict = "refuse",
        rephrase_masks: bool = False,
        keep_failed: bool = False,
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
        Interrupted (KeyboardInterrupt, or any error), the edits that are done are committed first.
        """
        given = list(edits)
        for edit in given:
            self._wordings.check(edit)
        todo, replaced = plan(given, self.edits, on_conflict)
        self.outcome = outcome = Outcome(skipped=len(given) - len(todo))
        started = committed = time.monotonic()
        pause = CHECKPOINT_EVERY
        try:
            for done, edit in enumerate(todo, 1):
                old = replaced.get(same_prompt(edit.prompt))
                extra = len(edit.rephrases) if rephrase_masks else 0
                stored = self._add(edit, old, on_conflict, extra, keep_failed)
                now = time.monotonic()
                if now - committed > pause:
                    self._commit()
                    committed = time.monotonic()
                    pause = max(CHECKPOINT_EVERY, 20 * (committed - now))
                progress(Progress(done, len(todo), stored, now - started))
        finally:
            if self._changed:
                self._commit()
        return outcome.stored

    def compact(self, progress: Callable[[Progress], None] = lambda _: None) -> list[StoredEdit]:
        """Train the stored edits again, from an empty memory, in their order and under their ids, and publish that.

        Returns them; one that fails the audit is kept, and named in `outcome`. Nothing is left of edits that were
        removed or replaced. Interrupted, store and editor are what they were.
        """
        held = self.memories, self._open, self.edits, self.index, self.next_id
        self.outcome = Outcome()
        started = time.monotonic()
        try:
            self._forget()
            _, _, edits, index, next_id = held
            masks = Counter(index.ids.tolist())
            for done, edit in enumerate(edits, 1):
                self.next_id = edit.id
                stored = self._add(edit, None, "both", masks[edit.id] - 1, keep_failed=True)
                progress(Progress(done, len(edits), stored, time.monotonic() - started))
            self.next_id = next_id
            self._commit()
        except BaseException:
            self.memories, self._open, self.edits, self.index, self.next_id = held
            self._changed = False
            raise
        return self.outcome.stored

    def _add(
        self, edit: Edit | StoredEdit, old: StoredEdit | None, on_conflict: Conflict, extra: int, keep_failed: bool
    ) -> StoredEdit | None:
        """Train one edit, ask it back and take it up, or say in `outcome` why not. extra: rephrasings to train too."""
        frozen, codes = self._wordings.trained(edit, self.next_id, extra, self._quick())
        rival = self._contradicted(edit, codes[:1]) if old is None else None
        if rival:
            self.outcome.conflicting.append(rival)
            if on_conflict in ("refuse", "first"):
                return None
            if on_conflict == "last":
                old = rival.stored
        if old:
            self._open.forget(old.id)
        lessons = self._wordings.lessons(frozen, edit, len(codes))
        trained, problem = self._learn(frozen, lessons)
        if problem:
            self.outcome.failed.append(Failed(edit.prompt, edit.target, problem))
            if not keep_failed:
                if old and old.trained and old.memory == len(self.memories) - 1:
                    self._open.add(old.id, self._lessons_of(old))
                return None
        self._open.weight[:, trained.columns] = trained.weights
        return self._take_up(edit, trained, lessons, codes, old)

    def _contradicted(self, edit: Edit | StoredEdit, code: np.ndarray) -> Conflicting | None:
        """The stored edit that answers the same question, going by the masks, otherwise."""
        hit = self.index.search(code, SAME_QUESTION)
        if hit.ids[0] < 0:
            return None
        stored = next(one for one in self.edits if one.id == hit.ids[0])
        if not stored.trained or same_prompt(stored.target) == same_prompt(edit.target):
            return None
        return Conflicting(edit.prompt, edit.target, stored, round(float(hit.overlaps[0]), 4))

    def _learn(self, frozen: Frozen, lessons: list[Lesson]) -> tuple[Trained, str]:
        """Train until the edit is answered and its neighbours still are; what is wrong, or "".

        The second try is with more steps; the third, of an edit that costs others theirs, in a new memory.
        """
        if len(self._open.lessons) >= (self.training.edits_per_memory or self.base.d // EDITS_PER_MEMORY):
            self._open_memory()
        trained, problem, lost = self._try(frozen, lessons, self.training)
        if problem:
            self.outcome.retried += 1
        if problem and not lost:
            patient = replace(
                self.training, stop_loss=self.training.stop_loss / 4, max_steps=2 * self.training.max_steps
            )
            trained, problem, lost = self._try(frozen, lessons, patient)
        if lost:
            self._open_memory()
            trained, problem, _ = self._try(frozen, lessons, self.training)
        return trained, problem

    def _try(self, frozen: Frozen, lessons: list[Lesson], training: Training) -> tuple[Trained, str, bool]:
        """Train, ask back with the trained weights, and put the memory back: (result, what is wrong, others lost)."""
        memory = self._open
        with self._quick():
            trained = train_edit(self.base, frozen, memory.weight, memory.used, training, self._watch)
        before = memory.weight[:, trained.columns]
        memory.weight[:, trained.columns] = trained.weights
        try:
            if not all(answered(self.base, lessons, memory.weight)):
                reason = f"the target is not the first choice after {trained.steps} steps (loss {trained.loss:.3f})"
                return trained, reason, False
            near = memory.nearest(trained.columns, NEIGHBOURS)
            with self._quick():
                near = memory.forgotten(self.base, near)
            lost = memory.forgotten(self.base, near)  # what seems lost is asked again without rounding
        finally:
            memory.weight[:, trained.columns] = before
        return trained, f"it would overwrite edit {lost[0]}" if lost else "", bool(lost)

    def _open_memory(self) -> None:
        self.memories.append(torch.zeros_like(self._open.weight))
        self._open = Memory(self.memories[-1])

    def _lessons_of(self, edit: StoredEdit) -> list[Lesson]:
        """The lessons of a stored edit, run again."""
        masks = int((self.index.ids == edit.id).sum())
        return self._wordings.lessons(self._wordings.asked(edit, masks - 1)[0], edit, masks)

    def _take_up(
        self,
        edit: Edit | StoredEdit,
        trained: Trained,
        lessons: list[Lesson],
        codes: np.ndarray,
        old: StoredEdit | None,
    ) -> StoredEdit:
        stored = StoredEdit(
            id=self.next_id,
            prompt=edit.prompt,
            target=edit.target,
            created=getattr(edit, "created", "") or datetime.now(UTC).isoformat(timespec="seconds"),
            loss=round(trained.loss, 5),
            steps=trained.steps,
            memory=len(self.memories) - 1,
            subject=edit.subject,
            rephrases=edit.rephrases,
            source=edit.source,
        )
        self._open.weight[:, trained.columns] = trained.weights
        self._open.add(stored.id, lessons)
        if old:
            self.index.remove([old.id])
            self.edits.remove(old)
        self.index.add([stored.id] * len(codes), codes)
        self.edits.append(stored)
        self.outcome.stored.append(stored)
        self.next_id += 1
        self._changed = True
        return stored

    def fields(self, edits: Iterable[StoredEdit]) -> dict[str, Any]:
        """What `write_generation` takes as `manifest`, for a next generation of these edits."""
        return {
            "generation": self.generation + 1,
            "model": self.base.name,
            "base": self.base.identity,
            "module": self.base.module,
            "layer": self.base.layer,
            "d": self.base.d,
            "h": self.base.h,
            "k": self.k,
            "tau": self.tau,
            "span": self.span,
            "chat": self.chat,
            "dtype": str(self.base.model.dtype).removeprefix("torch."),
            "seed": self.seed,
            "contexts": self.contexts,
            "training": msgspec.to_builtins(self.training),
            "next_id": self.next_id,
            "untrained": sum(not edit.trained for edit in edits),
        }

    def _commit(self) -> None:
        """Write everything trained so far as the next generation."""
        memory_of = {edit.id: edit.memory for edit in self.edits}
        manifest = write_generation(
            self.path,
            self.fields(self.edits),
            memories=torch.stack(self.memories).cpu().numpy(),
            background=self.background,
            permutation=self.permutation,
            codes=self.index.codes,
            ids=self.index.ids,
            memory_of=np.array([memory_of[edit] for edit in self.index.ids.tolist()], dtype=np.int32),
            edits=self.edits,
        )
        self.generation = manifest.generation
        self._changed = False


def _refuse_foreign(path: Path) -> None:
    """Raise StoreError for a folder of something else, before anything, a lock included, is put into it."""
    if not path.is_dir() or (path / MANIFEST).exists():
        return
    ours = (".", "memory-", "codes-", "edits-", MANIFEST)  # what a first write that was cut off may leave
    others = sorted(p.name for p in path.iterdir() if not p.name.startswith(ours))
    if others:
        raise StoreError(f"{path} is not empty and not a store (it holds {others[0]}): choose a new folder")
