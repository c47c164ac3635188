"""Looking up the edit that a prompt asks for, outside a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from memoir_index import Hits, hamming_radius
from memoir_retrieval.edit import StoredEdit
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.fingerprint import Fingerprint
from memoir_retrieval.forward import question_means
from memoir_retrieval.model import BaseModel, load_model
from memoir_retrieval.prompts import Prompt, prompt_ids
from memoir_retrieval.span import find_span
from memoir_retrieval.store import EditStore

__all__ = ["Match", "Retriever"]


@dataclass(frozen=True)
class Match:
    """The edit nearest to a prompt. `overlap` is |M(q) & M(edit)| / k; what `lookup` gives has at least tau.

    `runner_up`: id and overlap of the best other edit, or None in a store of one edit.
    """

    edit: StoredEdit
    overlap: float
    runner_up: tuple[int, float] | None

    @property
    def id(self) -> int:
        """The edit's id in its store."""
        return self.edit.id


class Retriever:
    """A store together with the model it was made on."""

    def __init__(self, store: EditStore, base: BaseModel, tau: float | None = None):
        """Raises StoreMismatch for another model, ConfigError for a tau outside (0, 1], StoreError for damage."""
        store.check()
        store.require(base.identity, base.name)
        self.store = store
        self.base = base
        self.tau = store.manifest.tau if tau is None else tau
        if not 0 < self.tau <= 1:
            raise ConfigError(f"tau is {tau}: choose 0 < tau <= 1 (this store was made with {store.manifest.tau})")
        self.fingerprint = Fingerprint(store.background, store.permutation, store.manifest.k, base.device)
        self.index = store.index()

    @classmethod
    def open(
        cls, store: str | Path, model: str | None = None, *, tau: float | None = None, device: str = "cpu"
    ) -> Retriever:
        """Open a store with its model: `Retriever.open("edits", "smollm2-135m")`.

        model: a folder, an embedded model's name or a Hub id; by default the one the store names.
        Raises StoreError for a store that cannot be opened, ModelError for a model that cannot be loaded, and what the
        constructor raises.
        """
        opened = EditStore.open(store)
        base = load_model(
            model or opened.manifest.model, layer=opened.manifest.layer, dtype=opened.manifest.dtype, device=device
        )
        return cls(opened, base, tau)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt as the store's settings render it. Raises ConfigError where the model is too short."""
        ids = prompt_ids(self.base.tokenizer, prompt, chat=self.store.manifest.chat)
        if len(ids) > self.base.max_length:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens, {self.base.name} takes {self.base.max_length}: shorten it"
            )
        return ids

    def lookup(self, prompt: Prompt) -> Match | None:
        """The stored edit that a prompt (a string or chat messages) matches, or None.

        Raises ConfigError for a prompt that is longer than the model takes, or messages without a chat template.
        """
        return self.lookup_batch([prompt])[0]

    def lookup_batch(self, prompts: Sequence[Prompt]) -> list[Match | None]:
        """`lookup` for many prompts at once."""
        return [match if match and self.reaches_tau(match) else None for match in self.nearest_batch(prompts)]

    def nearest_batch(self, prompts: Sequence[Prompt]) -> list[Match | None]:
        """The nearest edit of each prompt, whether it matches or not; None for an empty store or question."""
        rows = [self.prompt_ids(p) for p in prompts]
        spans = [find_span(ids, self.store.manifest.span) for ids in rows]
        asked = [i for i, span in enumerate(spans) if span.start < span.end]
        found: list[Match | None] = [None] * len(rows)
        if not asked or not len(self.index):
            return found
        means = question_means(self.base, [rows[i] for i in asked], [spans[i] for i in asked])
        ids, overlaps = self.index.nearest(self.fingerprint.codes(means), 2)
        for at, i in enumerate(asked):
            second = (int(ids[at, 1]), float(overlaps[at, 1])) if ids[at, 1] >= 0 else None
            found[i] = Match(self.store.edit(int(ids[at, 0])), float(overlaps[at, 0]), second)
        return found

    def reaches_tau(self, match: Match) -> bool:
        """Whether a nearest edit matches: the same comparison of whole bits that `route` makes."""
        k = self.store.manifest.k
        return round(2 * k * (1 - match.overlap)) <= hamming_radius(self.tau, k)

    def route(self, means: torch.Tensor) -> Hits:
        """means: float32 [Q, D], the mean activation of each question. What a server decides from them."""
        return self.index.search(self.fingerprint.codes(means), self.tau)
