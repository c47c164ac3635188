"""Answering with edits through Hugging Face: slow, plain, and the definition of what is right for a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from memoir_index import unpack
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.forward import right_pad, span_mean
from memoir_retrieval.prompts import Prompt, end_token, given_ids, target_ids
from memoir_retrieval.retriever import Retriever
from memoir_retrieval.span import Span, find_span

__all__ = ["Answer", "EditedModel"]


@dataclass(frozen=True)
class Answer:
    """One answer. `edit`: id of the matched edit, or None; `overlap`: of the nearest edit, matched or not.

    `tokens`: the new token ids, with the end token where the model stopped by itself. `logprobs`: natural logarithms of
    the probabilities of the target's tokens, where `EditedModel.predict` was asked for a target.
    """

    text: str
    tokens: tuple[int, ...]
    edit: int | None
    overlap: float
    logprobs: tuple[float, ...] = ()


@dataclass
class _Row:
    """One request of a batch: where its question is, and once looked up what acts on it."""

    span: Span
    offset: int
    edit: int | None = None
    overlap: float = 0.0
    mask: torch.Tensor | None = None
    memory: int = 0


class EditedModel:
    """A model with a store's edits switched on, each request routed on its own."""

    def __init__(self, retriever: Retriever):
        self.retriever = retriever
        self.base = retriever.base
        self._memories = torch.as_tensor(retriever.store.memories, device=self.base.device).to(
            next(self.base.projection.parameters()).dtype
        )

    @classmethod
    def open(cls, store: str | Path, model: str | None = None, *, tau: float | None = None) -> EditedModel:
        """Like `Retriever.open`, and with the same errors."""
        return cls(Retriever.open(store, model, tau=tau))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt | list[int]],
        *,
        max_new_tokens: int = 32,
        edited: bool = True,
        batch_size: int = 32,
    ) -> list[Answer]:
        """Greedy answers, each until the model ends it or has given `max_new_tokens` tokens.

        prompts: strings, chat messages or token ids. edited=False is the base model. batch_size: prompts that are run
        at once. Raises ConfigError where a prompt and its answer would be longer
        than the model takes.
        """
        rows = [given_ids(p, self.prompt_ids) for p in prompts]
        for row in rows:
            if len(row) + max_new_tokens > self.base.max_length:
                raise ConfigError(
                    f"{len(row)} prompt tokens and {max_new_tokens} new ones exceed the {self.base.max_length} "
                    f"of {self.base.name}: shorten the prompt"
                )
        answers: list[Answer] = []
        for at in range(0, len(rows), batch_size):
            answers += self._generate(rows[at : at + batch_size], max_new_tokens, edited)
        return answers

    @torch.no_grad()
    def predict(
        self,
        prompts: Sequence[Prompt | list[int]],
        targets: Sequence[Sequence[int]],
        *,
        edited: bool = True,
        batch_size: int = 16,
    ) -> list[Answer]:
        """Teacher forcing: the model's most likely token at each position of each target.

        targets: token ids. The answers' `tokens` and `logprobs` have the length of their target.
        """
        rows = [given_ids(p, self.prompt_ids) for p in prompts]
        answers: list[Answer] = []
        for at in range(0, len(rows), batch_size):
            batch, wanted = rows[at : at + batch_size], targets[at : at + batch_size]
            ids, _ = right_pad([[*p, *t] for p, t in zip(batch, wanted, strict=True)], self.base.device)
            states = [_Row(find_span(p, self.retriever.store.manifest.span), 0) for p in batch]
            with self._edits_on(states, edited):
                first = min(len(p) for p in batch) - 1  # no logits are needed before the first target
                kept = torch.arange(first, ids.shape[1], device=self.base.device)
                logits = self.base.model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
            for r, (p, t) in enumerate(zip(batch, wanted, strict=True)):
                start = len(p) - 1 - first
                rows_of_target = logits[r, start : start + len(t)].float()
                target = torch.tensor(t, dtype=torch.int64, device=self.base.device)[:, None]
                logprobs = functional.log_softmax(rows_of_target, dim=-1).gather(1, target)[:, 0]
                answers.append(self._answer(rows_of_target.argmax(-1).tolist(), states[r], tuple(logprobs.tolist())))
        return answers

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """See `Retriever.prompt_ids`."""
        return self.retriever.prompt_ids(prompt)

    def target_ids(self, target: str) -> list[int]:
        """Token ids of an answer, without the end token, as the store's settings render it."""
        return target_ids(self.base.tokenizer, target, chat=self.retriever.store.manifest.chat)

    def _generate(self, rows: list[list[int]], max_new_tokens: int, edited: bool) -> list[Answer]:
        end = end_token(self.base.tokenizer)
        width = max(len(r) for r in rows)
        ids = torch.full((len(rows), width), end, device=self.base.device)
        attention = torch.zeros_like(ids)
        states = []
        for r, row in enumerate(rows):
            ids[r, width - len(row) :] = torch.tensor(row)
            attention[r, width - len(row) :] = 1
            states.append(_Row(find_span(row, self.retriever.store.manifest.span), width - len(row)))
        with self._edits_on(states, edited):
            out = self.base.model.generate(
                input_ids=ids,
                attention_mask=attention,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=end,
                pad_token_id=end,
            )[:, width:].tolist()
        for tokens in out:
            if end in tokens:
                del tokens[tokens.index(end) + 1 :]
        return [self._answer(tokens, state) for tokens, state in zip(out, states, strict=True)]

    def _answer(self, tokens: list[int], row: _Row, logprobs: tuple[float, ...] = ()) -> Answer:
        text = self.base.tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(text, tuple(tokens), row.edit, row.overlap, logprobs)

    @contextmanager
    def _edits_on(self, rows: list[_Row], edited: bool) -> Iterator[None]:
        """Within the context the first pass looks every row up and each pass adds what was found (Eq. 4)."""
        if not edited:
            yield
            return
        first = True

        def add(_module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            nonlocal first
            if first:
                self._route(rows, args[0])
            out = output.clone()
            for r, row in enumerate(rows):
                if row.mask is not None:  # every other row keeps the base layer's bits
                    acting = slice(row.offset + row.span.start if first else 0, None)
                    masked = args[0][r, acting] * row.mask
                    out[r, acting] += functional.linear(masked, self._memories[row.memory])
            first = False
            return out

        handle = self.base.projection.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    def _route(self, rows: list[_Row], activations: torch.Tensor) -> None:
        asked = [r for r, row in enumerate(rows) if row.span.start < row.span.end]
        if not asked or not len(self.retriever.index):
            return
        means = torch.stack(
            [span_mean(activations[r], *(rows[r].offset + edge for edge in rows[r].span)) for r in asked]
        )
        found = self.retriever.route(means)
        store = self.retriever.store
        for at, r in enumerate(asked):
            rows[r].overlap = float(found.overlaps[at])
            code_row = int(found.rows[at])
            if code_row >= 0:
                rows[r].edit = int(found.ids[at])
                bits = unpack(store.codes[code_row : code_row + 1], store.manifest.d)[0]
                rows[r].mask = torch.as_tensor(bits, device=activations.device).to(activations.dtype)
                rows[r].memory = int(store.memory_of[code_row])
