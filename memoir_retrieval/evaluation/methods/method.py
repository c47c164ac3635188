"""What every editing method has: edits are made one after another, then prompts are answered."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch.nn import functional
from transformers.cache_utils import DynamicCache

from memoir_retrieval.editing.contexts import own_prefixes
from memoir_retrieval.edits.record import Edit
from memoir_retrieval.errors import ModelError
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.model.bfloat16 import HalfProducts, half_is_faster
from memoir_retrieval.model.forward import right_pad
from memoir_retrieval.question.prompts import end_token, prompt_ids, target_ids

__all__ = ["SEED", "Method", "PrefixedMethod", "Unedited", "scaled"]

ROWS = 32  # prompts that are run at once
SEED = 0  # of every draw
PREFIXES = 10

Value = TypeVar("Value")


def scaled(layer: int, base: BaseModel, of: int = 32) -> int:
    """The layer of a model that stands where a published configuration has its own.

    layer: the published number.
    base: the model.
    of: how many layers the published model has.
    """
    return min(round(layer * len(base.blocks) / of), len(base.blocks) - 1)


class Method:
    """An editing method on a model. Prompts are raw; an answer begins with a space.

    A method may change weights of the model until it is closed, or act in hooks while it answers (`acting`).

    name: on the command line.
    batch: edits that are made at once; None for any number.
    writes: whether it takes the projection's weight (`weight`).
    """

    name: ClassVar[str]
    batch: ClassVar[int | None] = 1
    writes: ClassVar[bool] = False

    @classmethod
    def check(cls, base: BaseModel) -> None:
        """Raise what keeps the method from editing a model, before anything is run.

        base: the model.

        Raises ModelError for a model that the method cannot edit, and ConfigError for a package that is not installed.
        """
        if cls.writes:
            _plain_weight(base)

    def __init__(
        self,
        base: BaseModel,
        *,
        end: bool = True,
        texts: Sequence[str] = (),
        known: dict[Hashable, Any] | None = None,
    ):
        """Prepare a method.

        base: the model, in float32.
        end: train the token that ends an answer too.
        texts: text of a corpus, for methods that need statistics of one.
        known: what `once` has computed, which all methods on one model and one corpus may share.
        """
        self.base, self.end, self.texts = base, end, texts
        self.known = {} if known is None else known
        self.random = torch.Generator().manual_seed(SEED)
        self._originals: dict[torch.nn.Parameter, torch.Tensor] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """The hyper-parameters, for the report."""
        return {}

    @property
    def bytes(self) -> int:
        """Bytes that must be kept beside the base model to answer with the edits made so far."""
        return sum(weight.numel() * weight.element_size() for weight in self._originals)

    def prepare(self) -> None:
        """Compute what the unedited model alone decides, before the first edit."""

    def once(self, name: Hashable, compute: Callable[[], Value]) -> Value:
        """What depends on the unedited model and the corpus alone, computed when it is first needed.

        name: of the value.
        compute: gives it.
        """
        if name not in self.known:
            self.known[name] = compute()
        value: Value = self.known[name]
        return value

    def edit(self, edits: Sequence[Edit]) -> None:
        """Make edits, after those that were made before.

        edits: at most `batch`, if that is a number.
        """
        raise NotImplementedError

    def training(self) -> AbstractContextManager[None]:
        """Within the context the model multiplies as in memoir's own training, so that seconds compare.

        That is in bfloat16 on a CPU where it is faster, except with weights that `weight` has given out.
        """
        return self._products.used() if self._products else nullcontext()

    @cached_property
    def _products(self) -> HalfProducts | None:
        return HalfProducts(self.base, without=self._originals) if half_is_faster(self.base) else None

    def rendered(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """What the model is given for each prompt: the prompt, unless a method reads.

        prompts: token ids.
        """
        return list(prompts)

    def acting(self, prompts: torch.Tensor) -> AbstractContextManager[None]:
        """Within the context the model answers as edited.

        prompts: int64 [B, T], the prompts without their answers; the model's first pass begins with them.
        """
        return nullcontext()

    def close(self) -> None:
        """Give the model its own weights back, bit for bit."""
        with torch.no_grad():
            for weight, original in self._originals.items():
                weight.copy_(original)
                weight.requires_grad_(False)
        self._originals.clear()

    def restart(self) -> Self:
        """Close this method and open it again on the unedited model, with what was computed of that."""
        self.close()
        again = type(self)(self.base, end=self.end, texts=self.texts, known=self.known)
        if "_products" in self.__dict__:  # of weights that no edit changes
            again._products = self._products
        return again

    def weight(self, base: BaseModel) -> torch.nn.Parameter:
        """The projection's weight [H, D] of a layer, which may be written to until the method is closed.

        base: the model at that layer.

        Raises ModelError where the weight lies the other way round, as in GPT-2.
        """
        weight = _plain_weight(base)
        if weight not in self._originals:
            self._originals[weight] = weight.detach().clone()
        return weight

    def ids(self, text: str) -> list[int]:
        """Token ids of a raw prompt.

        text: of the prompt.
        """
        return prompt_ids(self.base.tokenizer, text, chat=False)

    def answer_ids(self, edit: Edit) -> list[int]:
        """Token ids that an edit is trained to answer, with the end token where that is trained.

        edit: any.
        """
        end = [end_token(self.base.tokenizer)] if self.end else []
        return [*target_ids(self.base.tokenizer, edit.target, chat=False), *end]

    @torch.no_grad()
    def choices(self, prompts: Sequence[list[int]], targets: Sequence[list[int]]) -> list[list[int]]:
        """Teacher forcing: the first choice at each position of each target.

        prompts, targets: token ids.
        """
        rows, out = self.rendered(prompts), [[0]] * len(prompts)
        for batch in _equally_long(rows):
            n = len(rows[batch[0]])
            ids, _ = right_pad([[*rows[i], *targets[i]] for i in batch], self.base.device)
            with self.acting(ids[:, :n]):
                kept = torch.arange(n - 1, ids.shape[1], device=ids.device)
                logits = self.base.model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
            for row, i in zip(logits.argmax(-1).tolist(), batch, strict=True):
                out[i] = row[: len(targets[i])]
        return out

    def answers(self, prompts: Sequence[list[int]], tokens: int) -> list[str]:
        """Free answers as texts, see `generated`.

        prompts: token ids.
        tokens: the most of an answer.
        """
        return [self.text(answer) for answer in self.generated(prompts, tokens)]

    def likely_answers(
        self, prompts: Sequence[list[int]], likely: Sequence[list[int]], tokens: int, choices: Sequence[list[int]] = ()
    ) -> list[str]:
        """The same answers, sooner where many are known beforehand: what the model chooses throughout, it would say.

        prompts: token ids.
        likely: what each answer may be, with the token that ends it.
        tokens: the most of an answer.
        choices: the model's, where `likely` is forced on it; asked for by default.
        """
        choices = choices or self.choices(prompts, likely)
        out = [self.text(row) for row in likely]
        open_rows = [i for i, row in enumerate(likely) if len(row) > tokens or choices[i] != row]
        for i, text in zip(open_rows, self.answers([prompts[i] for i in open_rows], tokens), strict=True):
            out[i] = text
        return out

    def text(self, answer: list[int]) -> str:
        """The first line of an answer.

        answer: token ids.
        """
        text = self.base.tokenizer.decode(answer, skip_special_tokens=True)
        return (text.strip().splitlines() or [""])[0].strip()

    @torch.no_grad()
    def generated(self, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
        """Greedy answers as token ids, each until the model ends it, a line ends, or it has `tokens` tokens.

        prompts: token ids.
        tokens: the most of an answer.
        """
        tokenizer, end = self.base.tokenizer, end_token(self.base.tokenizer)
        rows, out = self.rendered(prompts), [[0]] * len(prompts)
        for batch in _equally_long(rows):
            ids = torch.tensor([rows[i] for i in batch], device=self.base.device)
            over, cache = [False] * len(batch), DynamicCache()
            answers: list[list[int]] = [[] for _ in batch]
            with self.acting(ids):
                for _ in range(tokens):
                    logits = self.base.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
                    ids = logits[:, -1].argmax(-1)[:, None]
                    for r, token in enumerate(ids[:, 0].tolist()):
                        if not over[r]:
                            answers[r].append(token)
                            text = tokenizer.decode(answers[r], skip_special_tokens=True)
                            over[r] = token == end or "\n" in text.lstrip()
                    if all(over):
                        break
            for i, answer in zip(batch, answers, strict=True):
                out[i] = answer
        return out

    @torch.no_grad()
    def loss(self, texts: Sequence[list[int]]) -> float:
        """Mean negative log-likelihood of texts in nats per token, each asked as a prompt of its own.

        texts: token ids.
        """
        total = 0.0
        for batch in _equally_long(texts):
            ids = torch.tensor([texts[i] for i in batch], device=self.base.device)
            with self.acting(ids):
                logits = self.base.model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            total += float(loss)
        return total / _predicted(texts)

    def changed_loss(self, texts: Sequence[list[int]], changes: Sequence[float]) -> float:
        """See `loss`, where a method knows by how much it makes each text less likely than the model alone.

        texts: token ids.
        changes: in nats, of each text.
        """
        return Method.loss(self, texts) + sum(changes) / _predicted(texts)


class PrefixedMethod(Method):
    """A method that is trained on prompts behind texts of the model's own, too."""

    @property
    def prefixes(self) -> list[str]:
        """Ten texts that the unedited model wrote."""
        return self.once("prefixes", lambda: own_prefixes(self.base, PREFIXES, SEED))

    def prepare(self) -> None:
        """See `Method`."""
        _ = self.prefixes


class Unedited(Method):
    """The base model, for comparison."""

    name = "base"

    def edit(self, edits: Sequence[Edit]) -> None:
        """See `Method`."""


def _plain_weight(base: BaseModel) -> torch.nn.Parameter:
    if not isinstance(base.projection, torch.nn.Linear):
        raise ModelError(
            f"{base.module} of {base.name} is not a plain linear layer", cure="compare methods on another model"
        )
    weight: Any = base.projection.weight
    plain: torch.nn.Parameter = weight
    return plain


def _predicted(texts: Sequence[list[int]]) -> int:
    """How many tokens have others before them."""
    return sum(len(text) - 1 for text in texts)


def _equally_long(rows: Sequence[list[int]]) -> Iterator[list[int]]:
    """Batches of prompts of one length: nothing is padded, so no method need know of padding."""
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(i)
    for group in by_length.values():
        for first in range(0, len(group), ROWS):
            yield group[first : first + ROWS]
