"""Turning edits into a store: one residual memory, one mask per edit, one edit after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch

from memoir_index import unpack
from memoir_retrieval.background import background_prompts
from memoir_retrieval.contexts import chat_contexts, own_prefixes
from memoir_retrieval.edit import Edit, StoredEdit, same_prompt
from memoir_retrieval.errors import ConfigError, EditFileError, StoreError
from memoir_retrieval.files import store_lock
from memoir_retrieval.fingerprint import Fingerprint, permutation
from memoir_retrieval.forward import FrozenPast, frozen_past, question_means
from memoir_retrieval.model import BaseModel
from memoir_retrieval.presets import preset_for
from memoir_retrieval.prompts import Prompt, end_token, prompt_ids, target_ids
from memoir_retrieval.span import Span, derive_span_rule, find_span
from memoir_retrieval.store import MANIFEST, EditStore, write_generation
from memoir_retrieval.train import Training, edit_activations, train_edit

__all__ = ["Editor", "Progress"]

Conflict = Literal["refuse", "first", "last"]
# A checkpoint rewrites the store. Its cost is bounded by writing at most this often (seconds) while edits go on.
CHECKPOINT_EVERY = 30.0


@dataclass(frozen=True)
class Progress:
    """Told after every edit. `done` of `total` are trained; `edit` is the one just made; `seconds` since the start."""

    done: int
    total: int
    edit: StoredEdit
    seconds: float


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
    ):
        """Settings only matter for a new store; an existing one keeps those it was made with.

        base: the loaded model. chat: ask each prompt through the chat template. rule: which tokens are pooled.
        k, tau: by default the preset's. Raises ConfigError for settings that cannot work.
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
        rows = [self._prompt_ids(p) for p in background_prompts()]
        means = question_means(self.base, rows, [find_span(ids, self.span) for ids in rows])
        self.background = means.mean(0).cpu().numpy()
        self.edits: list[StoredEdit] = []
        self._forget()
        self._prepare()

    def _forget(self) -> None:
        """Begin with nothing trained."""
        self.memories = torch.zeros(1, self.base.h, self.base.d, device=self.base.device)
        self._used = torch.zeros(1, self.base.d, self.base.d, device=self.base.device)
        self.codes = np.empty((0, self.base.d // 8), dtype=np.uint8)
        self.ids = np.empty(0, dtype=np.int64)
        self.memory_of = np.empty(0, dtype=np.int32)

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
        self.memories = torch.as_tensor(store.memories, device=self.base.device).clone()
        self.edits = list(store.edits)
        self.codes, self.ids, self.memory_of = store.codes, store.ids, store.memory_of
        self._prepare()

    def _prepare(self) -> None:
        self.fingerprint = Fingerprint(self.background, self.permutation, self.k, self.base.device)
        self._past = self._frozen_contexts()
        self._other_tokens = np.array([t for p in background_prompts() for t in self.base.tokenizer(p).input_ids])
        # C of `train`, one a memory: what earlier edits rely on. Not stored, since the edits can give it again.
        self._used = torch.zeros(len(self.memories), self.base.d, self.base.d, device=self.base.device)
        for edit in self.edits:
            if edit.trained:
                self._recall(edit, 1)

    def _columns(self, code: np.ndarray) -> torch.Tensor:
        """Positions of the ones of one packed code: int64 [k]."""
        return torch.as_tensor(np.flatnonzero(unpack(code, self.base.d)[0]), device=self.base.device)

    def _remember(self, memory: int, columns: torch.Tensor, activations: torch.Tensor, sign: int = 1) -> None:
        self._used[memory][columns[:, None], columns] += sign * (activations.T @ activations)

    def _recall(self, edit: StoredEdit, sign: Literal[1, -1]) -> None:
        """Count a stored edit among those that training must leave alone (1), or no longer (-1)."""
        prompt, target = self._rows(edit)
        columns = self._columns(self.codes[self.ids == edit.id][:1])
        question = prompt[find_span(prompt, self.span).start :]
        answer = [*target, end_token(self.base.tokenizer)]
        activations = edit_activations(self.base, self._past, question, answer, columns)
        self._remember(edit.memory, columns, activations, sign)

    def add(
        self,
        edits: Iterable[Edit],
        *,
        on_conflict: Conflict = "refuse",
        progress: Callable[[Progress], None] = lambda _: None,
    ) -> list[StoredEdit]:
        """Train edits in order and commit them. Returns those that are new.

        An edit that the store has already is skipped, so an interrupted run is resumed by running it again.
        on_conflict: what happens to a prompt that the store answers otherwise: "refuse" raises EditFileError,
        "first" keeps the stored edit, "last" replaces it. All edits are checked before the first is trained.
        Interrupted (KeyboardInterrupt, or any error), the edits that are done are committed first.
        """
        todo, replaced = self._plan(list(edits), on_conflict)
        made: list[StoredEdit] = []
        started = committed = time.monotonic()
        try:
            for edit in todo:
                if (old := replaced.get(same_prompt(edit.prompt))) and old.trained:
                    self._recall(old, -1)
                made.append(self._train(edit))
                now = time.monotonic()
                if now - committed > CHECKPOINT_EVERY:
                    self._commit(made, replaced)
                    committed = now
                progress(Progress(len(made), len(todo), made[-1], now - started))
        finally:
            if made:
                self._commit(made, replaced)
        return made

    def compact(self, progress: Callable[[Progress], None] = lambda _: None) -> list[StoredEdit]:
        """Train the stored edits again, from an empty memory, in their order and under their ids, and publish that.

        Returns them. Nothing is left of edits that were removed or replaced. Interrupted, store and editor are what
        they were.
        """
        held = self.memories, self._used, self.codes, self.ids, self.memory_of, self.next_id
        made: list[StoredEdit] = []
        started = time.monotonic()
        try:
            self._forget()
            for edit in self.edits:
                self.next_id = edit.id
                new = self._train(edit)
                made.append(msgspec.structs.replace(new, created=edit.created or new.created))
                progress(Progress(len(made), len(self.edits), made[-1], time.monotonic() - started))
            self.next_id = held[-1]
            self._commit(made, {})
        except BaseException:
            self.memories, self._used, self.codes, self.ids, self.memory_of, self.next_id = held
            raise
        return made

    def _plan(self, edits: list[Edit], on_conflict: Conflict) -> tuple[list[Edit], dict[str, StoredEdit]]:
        """The edits to train, and for each prompt of theirs that is stored untrained or with another target the stored
        edit."""
        stored = {same_prompt(edit.prompt): edit for edit in self.edits}
        todo: list[Edit] = []
        replaced: dict[str, StoredEdit] = {}
        for edit in edits:
            self._rows(edit)
            old = stored.get(same_prompt(edit.prompt))
            if old is None:
                todo.append(edit)
            elif not old.trained:
                todo.append(edit)
                replaced[same_prompt(edit.prompt)] = old
            elif old.target == edit.target or on_conflict == "first":
                continue
            elif on_conflict == "last":
                todo.append(edit)
                replaced[same_prompt(edit.prompt)] = old
            else:
                raise EditFileError(
                    f"prompt {edit.prompt!r} is stored with target {old.target!r} (edit {old.id}), the file says "
                    f"{edit.target!r}: choose with --on-conflict first (keep the stored one) or last (replace it)"
                )
        return todo, replaced

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        return prompt_ids(self.base.tokenizer, prompt, chat=self.chat)

    def _rows(self, edit: Edit | StoredEdit) -> tuple[list[int], list[int]]:
        """Token ids of prompt and target. Raises EditFileError where the model cannot be trained on them."""
        prompt = self._prompt_ids(edit.prompt)
        target = target_ids(self.base.tokenizer, edit.target, chat=self.chat)
        span = find_span(prompt, self.span)
        if span.start >= span.end:
            raise EditFileError(f"prompt {edit.prompt!r} has no tokens to pool: give a longer prompt")
        if not target:
            raise EditFileError(f"target {edit.target!r} of prompt {edit.prompt!r} has no tokens: give a longer target")
        asked = max([self._past.width + len(prompt), *map(len, self._in_contexts(edit.prompt))])
        longest = asked + len(target) + 1
        if longest > self.base.max_length:
            raise EditFileError(
                f"prompt {edit.prompt[:60]!r} and its target need {longest} tokens, {self.base.name} takes "
                f"{self.base.max_length}: shorten them"
            )
        return prompt, target

    def _frozen_contexts(self) -> FrozenPast:
        """The tokens before the question, in every training context; the first is the bare prompt's own."""
        if self.span.rule == "all":  # every token is edited, so nothing before the question is frozen
            count = 1 + len(self.contexts) + self.training.variants
            return FrozenPast(None, torch.zeros(count, dtype=torch.int64, device=self.base.device))
        bare = self._prompt_ids("Who?")
        rows = [bare[: find_span(bare, self.span).start]]
        for context in self.contexts:
            if self.chat:
                ids = self._prompt_ids([*context, {"role": "user", "content": "Who?"}])
                rows.append(ids[: find_span(ids, self.span).start])
            else:
                rows.append(self._prompt_ids(context))
        return frozen_past(self.base, rows + rows[:1] * self.training.variants)

    def _in_contexts(self, prompt: str) -> list[list[int]]:
        """Token ids of a prompt after each context, where contexts are edited too (rule "all"); else nothing."""
        if self.span.rule != "all":
            return []
        if self.chat:
            return [self._prompt_ids([*context, {"role": "user", "content": prompt}]) for context in self.contexts]
        return [self._prompt_ids(f"{context} {prompt}") for context in self.contexts]

    def _questions(self, edit: Edit | StoredEdit, prompt: list[int], span: Span) -> list[list[int]]:
        """What follows each context of `_frozen_contexts`: the question as it is, or a noisy variant of it."""
        question, rest = prompt[span.start : span.end], prompt[span.end :]
        random = np.random.default_rng([self.seed, self.next_id])
        # Rows with their context in them are whole: under the rule "all" no `rest` follows the question.
        rows = [question, *(self._in_contexts(edit.prompt) or [question] * len(self.contexts))]
        for _ in range(self.training.variants):
            replaced = random.random(len(question)) < self.training.noise
            others = random.choice(self._other_tokens, len(question))
            rows.append(np.where(replaced, others, question).tolist())
        return [[*row, *rest] for row in rows]

    def _train(self, edit: Edit | StoredEdit) -> StoredEdit:
        prompt, target = self._rows(edit)
        span = find_span(prompt, self.span)
        code = self.fingerprint.codes(question_means(self.base, [prompt], [span]))
        columns = self._columns(code)
        answer = [*target, end_token(self.base.tokenizer)]
        memory = len(self.memories) - 1
        result = train_edit(
            self.base,
            self._past,
            self._questions(edit, prompt, span),
            answer,
            columns,
            weights=self.memories[memory][:, columns],
            used=self._used[memory][columns[:, None], columns],
            training=self.training,
        )
        self.memories[memory][:, columns] = result.columns
        self._remember(memory, columns, result.activations)
        self.codes = np.concatenate([self.codes, code])
        self.ids = np.append(self.ids, np.int64(self.next_id))
        self.memory_of = np.append(self.memory_of, np.int32(memory))
        stored = StoredEdit(
            id=self.next_id,
            prompt=edit.prompt,
            target=edit.target,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            loss=round(result.loss, 5),
            steps=result.steps,
            memory=memory,
            subject=edit.subject,
            rephrases=edit.rephrases,
            source=edit.source,
        )
        self.next_id += 1
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

    def _commit(self, made: Sequence[StoredEdit], replaced: dict[str, StoredEdit]) -> None:
        """Write everything trained so far as the next generation."""
        gone = {replaced[key].id for edit in made if (key := same_prompt(edit.prompt)) in replaced}
        kept = {edit.id: edit for edit in (*self.edits, *made) if edit.id not in gone}
        keep = np.isin(self.ids, list(kept))
        manifest = write_generation(
            self.path,
            self.fields(kept.values()),
            memories=self.memories.float().cpu().numpy(),
            background=self.background,
            permutation=self.permutation,
            codes=self.codes[keep],
            ids=self.ids[keep],
            memory_of=self.memory_of[keep],
            edits=list(kept.values()),
        )
        self.generation = manifest.generation
        self.edits = list(kept.values())
        self.codes, self.ids, self.memory_of = self.codes[keep], self.ids[keep], self.memory_of[keep]


def _refuse_foreign(path: Path) -> None:
    """Raise StoreError for a folder of something else, before anything, a lock included, is put into it."""
    if not path.is_dir() or (path / MANIFEST).exists():
        return
    ours = (".", "memory-", "codes-", "edits-", MANIFEST)  # what a first write that was cut off may leave
    others = sorted(p.name for p in path.iterdir() if not p.name.startswith(ours))
    if others:
        raise StoreError(f"{path} is not empty and not a store (it holds {others[0]}): choose a new folder")
