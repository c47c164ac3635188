"""Answering with edits through Hugging Face: slow, plain, and the definition of what is right for a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import StoppingCriteria, StoppingCriteriaList

from memoir_index import unpack
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.lookup.retriever import Retriever
from memoir_retrieval.model.forward import (
    FrozenPast,
    frozen_past,
    frozen_run,
    right_pad,
    run_from_block,
    span_sum,
)
from memoir_retrieval.question.prompts import Prompt, end_token, given_ids, target_ids
from memoir_retrieval.question.span import Span
from memoir_retrieval.question.tasks import Pooled, pooled_spans, with_leads
from memoir_retrieval.question.thinking import behind_thinking, closing

__all__ = ["Answer", "EditedModel"]


@dataclass(frozen=True)
class Answer:
    """One answer.

    text: the answer as text, without special tokens, and without thinking where the chat template has it.
    tokens: the new token ids, with the end token where the model stopped by itself.
    edit: id of the matched edit, or None.
    overlap: that of `memoir_index.Hits`.
    logprobs: natural logarithms of the probabilities of the tokens that `EditedModel.predict` and `EditedModel.score`
        were given.
    """

    text: str
    tokens: tuple[int, ...]
    edit: int | None
    overlap: float
    logprobs: tuple[float, ...] = ()


@dataclass
class _BatchRow:
    """One request of a batch: what of it is looked up, first its message, and once that is done what acts on it.

    questions: the tokens of each span. `offset`: what is to be added to a position in the prompt to get the position in
    the first pass.
    """

    spans: list[Span]
    offset: int
    questions: list[list[int]]
    edit: int | None = None
    overlap: float = 0.0
    mask: torch.Tensor | None = None
    memory: int = 0


# A model's generation_config.json may differ; `generate` then feeds the prompt to a given cache from position 0.
_CACHE_OPTIONS: dict[str, Any] = {"use_cache": True, "prefill_chunk_size": None, "prompt_lookup_num_tokens": None}


class EditedModel:
    """A model with a store's edits switched on, each request routed on its own.

    >>> from memoir_retrieval import EditedModel
    >>> model = EditedModel.open("edits")
    >>> model.generate(["Who is the CEO of Example Corp?"])[0].text
    'Jane Doe'
    """

    def __init__(self, retriever: Retriever):
        """Switch the edits of a store on.

        retriever: the store and its model.

        Raises StoreError for a store with edits that are not trained.
        """
        retriever.store.require_trained()
        self.retriever = retriever
        self.base = retriever.base
        # Not that of the projection, whose weight may be quantised.
        dtype = self.base.model.dtype
        self._memories = torch.as_tensor(retriever.store.memories, device=self.base.device).to(dtype)

    @classmethod
    def open(
        cls, store: str | Path, model: str | Path | None = None, *, tau: float | None = None, device: str = "cpu"
    ) -> EditedModel:
        """Like `Retriever.open`, and with the same errors.

        store, model, tau, device: as there.
        """
        return cls(Retriever.open(store, model, tau=tau, device=device))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt | list[int]],
        *,
        max_new_tokens: int = 32,
        edited: bool = True,
        batch_size: int = 32,
        wanted: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Greedy answers, each until the model ends it or has given `max_new_tokens` tokens.

        prompts: strings, chat messages or token ids.
        max_new_tokens: the most tokens of an answer.
        edited: False asks the base model.
        batch_size: prompts that are run at once.
        wanted: for each prompt the text it is hoped for. An answer is given up, and returned as far as it got, as soon
            as it can no longer become that.

        Raises ConfigError where a prompt and its answer would be longer than the
        model takes.
        """
        rows = [given_ids(p, self.prompt_ids) for p in prompts]
        for row in rows:
            if len(row) + max_new_tokens > self.base.max_length:
                raise ConfigError(
                    f"{len(row)} prompt tokens and {max_new_tokens} new ones exceed the {self.base.max_length} "
                    f"of {self.base.name}: shorten the prompt"
                )
        spans = [self.retriever.spans(row) for row in rows]
        # Padding stands behind it in a shorter row, and a window counts that as tokens.
        window, longest = self.base.window, max(map(len, rows), default=0) + max_new_tokens
        apart = window is not None and window < longest
        past = frozen_past(self.base, [[]]) if apart else self._common_past(rows, spans)
        answers: dict[int, Answer] = {}
        for batch in _by_length([len(row) - past.width for row in rows], batch_size, tokens=4096):
            hoped = [wanted[i] for i in batch] if wanted is not None else None
            batch_answers = self._generate(
                [rows[i] for i in batch], [spans[i] for i in batch], past, max_new_tokens, edited, hoped
            )
            answers.update(zip(batch, batch_answers, strict=True))
        return [answers[i] for i in range(len(rows))]

    def predict(
        self,
        prompts: Sequence[Prompt | list[int]],
        targets: Sequence[Sequence[int]],
        *,
        edited: bool = True,
    ) -> list[Answer]:
        """Teacher forcing: the model's most likely token at each position of each target.

        The answers' `tokens` and `logprobs` have the length of their target.

        prompts: strings, chat messages or token ids.
        targets: token ids of each answer.
        edited: False asks the base model.
        """
        return self._read(prompts, targets, [edited])[0]

    def score(self, prompts: Sequence[Prompt | list[int]], *, edited: bool = True) -> list[Answer]:
        """How likely the model finds the questions themselves, each looked up as a whole.

        The answers' `tokens` and `logprobs` stand for the question's tokens from the second one on.

        prompts: strings, chat messages or token ids.
        edited: False asks the base model.
        """
        return self._read(prompts, None, [edited])[0]

    def compare(
        self, prompts: Sequence[Prompt | list[int]], targets: Sequence[Sequence[int]] | None = None
    ) -> tuple[list[Answer], list[Answer]]:
        """`predict`, or `score` where there are no targets, with edits on and off.

        What lies below the edited projection is the same for both and run once.

        prompts: strings, chat messages or token ids.
        targets: token ids of each answer.
        """
        on, off = self._read(prompts, targets, [True, False])
        return on, off

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """See `Retriever.prompt_ids`.

        prompt: text or messages.
        """
        return self.retriever.prompt_ids(prompt)

    def target_ids(self, target: str) -> list[int]:
        """Token ids of an answer, without the end token, as the store's settings render it.

        target: the answer's text.
        """
        return target_ids(self.base.tokenizer, target, chat=self.retriever.store.manifest.chat)

    @torch.no_grad()
    def _read(
        self,
        prompts: Sequence[Prompt | list[int]],
        targets: Sequence[Sequence[int]] | None,
        edited: Sequence[bool],
    ) -> list[list[Answer]]:
        """What the model expects where the targets are, or the questions' own tokens, for each value of `edited`."""
        rows = [given_ids(p, self.prompt_ids) for p in prompts]
        spans = [self.retriever.spans(row) for row in rows]
        if targets is None:
            places = [range(parts[0].start + 1, parts[0].end) for parts in spans]
        else:
            places = [range(len(row), len(row) + len(target)) for row, target in zip(rows, targets, strict=True)]
            rows = [[*row, *target] for row, target in zip(rows, targets, strict=True)]
        past = self._common_past(rows, spans)
        answers: list[dict[int, Answer]] = [{} for _ in edited]
        for batch in _by_length([len(row) - past.width for row in rows], 64, tokens=2048):
            ids, _ = right_pad([rows[i][past.width :] for i in batch], self.base.device)
            first = min([places[i].start - 1 for i in batch if len(places[i])], default=past.width)
            kept = torch.arange(first - past.width, ids.shape[1], device=self.base.device)
            inputs = past.repeated(len(batch)).inputs(ids)
            with ExitStack() as below:
                if len(edited) > 1:
                    below.enter_context(run_from_block(self.base, frozen_run(self.base, inputs)[0]))
                for on, by_row in zip(edited, answers, strict=True):
                    states = [_BatchRow(spans[i], -past.width, _questions(rows[i], spans[i])) for i in batch]
                    with self._edits_on(states, on):  # no logits are needed before the first of those asked for
                        logits = self.base.model(**inputs, logits_to_keep=kept).logits
                    for r, i in enumerate(batch):
                        expected = logits[r, places[i].start - 1 - first :][: len(places[i])].float()
                        tokens = torch.tensor(rows[i][places[i].start : places[i].stop], device=self.base.device)
                        logprobs = functional.log_softmax(expected, dim=-1).gather(1, tokens.long()[:, None])[:, 0]
                        by_row[i] = self._answer(expected.argmax(-1).tolist(), states[r], tuple(logprobs.tolist()))
        return [[by_row[i] for i in range(len(rows))] for by_row in answers]

    def _common_past(self, rows: Sequence[list[int]], spans: Sequence[Sequence[Span]]) -> FrozenPast:
        """What all rows have in common before their questions, such as a system prompt: run once for all of them."""
        most = min([min(parts[0].start, len(row) - 1) for row, parts in zip(rows, spans, strict=True)], default=0)
        common = 0
        while len(rows) > 1 and common < most and len({row[common] for row in rows}) == 1:
            common += 1
        return frozen_past(self.base, [rows[0][:common]] if common else [[]])

    def _generate(
        self,
        rows: list[list[int]],
        spans: list[list[Span]],
        past: FrozenPast,
        max_new_tokens: int,
        edited: bool,
        wanted: list[str] | None,
    ) -> list[Answer]:
        end = end_token(self.base.tokenizer)
        shared = past.width
        width = max(len(r) for r in rows)
        ids = torch.full((len(rows), width), end, device=self.base.device)
        attention = torch.zeros_like(ids)
        attention[:, :shared] = 1
        states = []
        for r, row in enumerate(rows):  # padding stands after what all share
            ids[r, :shared] = torch.tensor(row[:shared])
            ids[r, width - len(row) + shared :] = torch.tensor(row[shared:])
            attention[r, width - len(row) + shared :] = 1
            states.append(_BatchRow(spans[r], width - len(row) - shared, _questions(row, spans[r])))
        options: dict[str, Any] = {"past_key_values": past.repeated(len(rows)).growing()} if shared else {}
        if wanted is not None:
            begin = closing(self.base.tokenizer) if self.retriever.store.manifest.chat else ""
            hoped = [begin + text for text in wanted]
            options["stopping_criteria"] = StoppingCriteriaList([_GivenUp(self.base.tokenizer, hoped, width)])
        with self._edits_on(states, edited):
            out = self.base.model.generate(
                input_ids=ids,
                attention_mask=attention,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=end,
                pad_token_id=end,
                **_CACHE_OPTIONS,
                **options,
            )[:, width:].tolist()
        for tokens in out:
            if end in tokens:
                del tokens[tokens.index(end) + 1 :]
        return [self._answer(tokens, state) for tokens, state in zip(out, states, strict=True)]

    def _answer(self, tokens: list[int], row: _BatchRow, logprobs: tuple[float, ...] = ()) -> Answer:
        text = self.base.tokenizer.decode(tokens, skip_special_tokens=True)
        if self.retriever.store.manifest.chat:
            text = behind_thinking(self.base.tokenizer, text)
        return Answer(text, tuple(tokens), row.edit, row.overlap, logprobs)

    @contextmanager
    def _edits_on(self, rows: list[_BatchRow], edited: bool) -> Iterator[None]:
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
                    acting = slice(row.offset + row.spans[0].acts_from if first else 0, None)
                    masked = args[0][r, acting] * row.mask
                    out[r, acting] += functional.linear(masked, self._memories[row.memory])
            first = False
            return out

        handle = self.base.projection.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    def _route(self, rows: list[_BatchRow], activations: torch.Tensor) -> None:
        questions = [r for r, row in enumerate(rows) if row.spans[0].start < row.spans[0].end]
        if not questions or not len(self.retriever.index):
            return
        parts = [(r, span.moved(rows[r].offset)) for r in questions for span in pooled_spans(rows[r].spans)]
        sums = [span_sum(activations[r], span) for r, span in parts]
        totals, weights = (torch.stack(column) for column in zip(*sums, strict=True))
        pooled = with_leads(Pooled(totals / weights[:, None], weights), [rows[r].spans for r in questions])
        texts = [tokens for r in questions for tokens in rows[r].questions]
        routes = self.retriever.route(pooled, texts, [len(rows[r].spans) for r in questions])
        store = self.retriever.store
        for q, r in enumerate(questions):
            rows[r].overlap = float(routes.overlaps[q])
            code_row = int(routes.rows[q])
            if code_row >= 0:
                rows[r].edit = int(routes.ids[q])
                bits = unpack(self.retriever.index.code(code_row)[None], store.manifest.d)[0]
                rows[r].mask = torch.as_tensor(bits, device=activations.device).to(activations.dtype)
                rows[r].memory = int(store.memory_of[code_row])


def _questions(ids: list[int], spans: list[Span]) -> list[list[int]]:
    return [ids[span.start : span.end] for span in spans]


class _GivenUp(StoppingCriteria):
    """Ends the rows whose text is no longer the beginning of what is wanted."""

    def __init__(self, tokenizer: Any, wanted: Sequence[str], width: int):
        self.tokenizer, self.wanted, self.width = tokenizer, [text.strip() for text in wanted], width
        # Such a tokenizer takes spaces back when more text follows, so nothing follows from a beginning.
        self.can_tell = not getattr(tokenizer, "clean_up_tokenization_spaces", False)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :], skip_special_tokens=True)
        # A character of several tokens is a replacement mark until its last one.
        begun = [text.strip().rstrip("\ufffd").rstrip() for text in texts]
        over = [not hoped.startswith(text) for text, hoped in zip(begun, self.wanted, strict=True)]
        return torch.tensor([self.can_tell and o for o in over], device=input_ids.device)


def _by_length(lengths: Sequence[int], rows: int, tokens: int) -> Iterator[list[int]]:
    """Batches of rows of similar length, so that padding is short: at most `rows` rows and `tokens` padded tokens."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) == rows or (len(batch) + 1) * lengths[i] > tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
