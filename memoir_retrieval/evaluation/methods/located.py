"""What ROME, MEMIT and AlphaEdit share: the key of a subject, the value that makes the answer likely, statistics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from memoir_retrieval.edits.record import Edit
from memoir_retrieval.errors import ConfigError, Reason
from memoir_retrieval.evaluation.methods.descent import descend
from memoir_retrieval.evaluation.methods.method import PrefixedMethod
from memoir_retrieval.evaluation.methods.rows import Rows
from memoir_retrieval.evaluation.texts import WORDS
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.model.forward import frozen_run, right_pad
from memoir_retrieval.question.prompts import prompt_ids

__all__ = ["LocatedMethod", "ValueSearch", "corpus", "drift", "second_moments", "subject_end", "texts_needed"]

PREFIXES = 5
KL = 0.0625
STOP = 5e-2
CORPUS_TOKENS = 16384
TOKENS_EACH = 10  # tokens of the corpus for each input of the projection, where this is more
TEXTS = 400  # at least, which are more than enough for most models: the folder of a run takes one corpus
BATCH = 8  # texts of the corpus that are run at once
RIDGE = 1e-4  # of the mean diagonal of C, so that C can be inverted


class ValueSearch(NamedTuple):
    """How a value is sought: Eq. 4 of ROME (arXiv 2202.05262) and Eq. 16 of MEMIT (arXiv 2210.07229).

    rate: of Adam.
    steps: at most.
    clamp: the change's norm is at most so many times that of the first value.
    decay: of the change's norm, over the square of the first value's norm.
    """

    rate: float
    steps: int
    clamp: float
    decay: float


def subject_end(tokenizer: Any, prompt: str, subject: str) -> int:
    """Place of a subject's last token in a prompt; the prompt's last token where the subject does not stand in it.

    tokenizer: of Hugging Face.
    prompt, subject: texts.
    """
    encoded = tokenizer(prompt, return_offsets_mapping=True)
    begin = prompt.rfind(subject) if subject else -1
    if begin < 0:
        return len(encoded["input_ids"]) - 1
    last = begin + len(subject)
    return max(i for i, (start, end) in enumerate(encoded["offset_mapping"]) if start < last and end > start)


class LocatedMethod(PrefixedMethod):
    """A method that writes a key and a value into weights.

    layers: that are written to. The value is sought in the last of them.
    search: how.
    """

    layers: tuple[int, ...]
    search: ValueSearch
    writes = True

    @property
    def corpus(self) -> list[list[int]]:
        """Token ids of the texts of which statistics are taken."""
        return self.once("corpus", lambda: corpus(self.base, self.texts))

    @cached_property
    def moments(self) -> dict[int, torch.Tensor]:
        """C of each layer, of the unedited model, with a ridge. Of all methods that share layers, the first has them
        computed."""
        new = [self.base.at(layer) for layer in self.layers if ("moments", layer) not in self.known]
        for layer, c in second_moments(new, self.corpus).items() if new else ():
            self.known["moments", layer] = c + RIDGE * c.diagonal().mean() * torch.eye(len(c)).to(c)
        return {layer: self.known["moments", layer] for layer in self.layers}

    @property
    def settings(self) -> dict[str, Any]:
        """See `Method`."""
        shared = {"kl": KL, "prefixes": PREFIXES, "corpus_tokens": sum(map(len, self.corpus))}
        return {"layers": self.layers, **self.search._asdict(), **shared}

    def prepare(self) -> None:
        """See `Method`."""
        super().prepare()
        _ = self.moments

    def ends(self, edit: Edit) -> list[tuple[list[int], int]]:
        """The bare prompt and the prompt after each prefix: token ids and the place of the subject's last token.

        edit: any.
        """
        texts = [edit.prompt, *(f"{prefix} {edit.prompt}" for prefix in self.prefixes[:PREFIXES])]
        return [(self.ids(text), subject_end(self.base.tokenizer, text, edit.subject)) for text in texts]

    def value_change(self, edit: Edit, block_output: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The first value [H] and the change [H] that makes the answer likely.

        edit: any.
        block_output: the value is the block's output (MEMIT), not that of its MLP (ROME).
        """
        base = self.base.at(self.layers[-1])
        rows, places = zip(*self.ends(edit), strict=True)
        essence = f"{edit.subject or edit.prompt} is a"
        prompts = [*rows, self.ids(essence)]
        places = (*places, subject_end(base.tokenizer, essence, edit.subject))
        batch = Rows(base, prompts, [*([self.answer_ids(edit)] * len(rows)), []], past=places)
        wanted = batch.wanted.clone()
        wanted[-1, batch.starts[-1] - 1] = True
        first: list[torch.Tensor] = []
        change = torch.zeros(base.h, device=base.device, requires_grad=True)

        def keep(_module: Any, _args: Any, output: Any) -> None:
            if not first:
                first.append((output[0] if isinstance(output, tuple) else output)[0, 0].detach().clone())

        def add(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            return torch.cat([output[:, :1] + change, output[:, 1:]], dim=1)  # the subject's last token is first

        watched = base.blocks[base.layer] if block_output else base.projection
        handles = [watched.register_forward_hook(keep), base.projection.register_forward_hook(add)]
        before: list[torch.Tensor] = []

        def loss() -> torch.Tensor:
            logits = batch.logits(wanted).float()
            odds = functional.log_softmax(logits[-1], dim=-1)
            if not before:
                before.append(odds.detach())
            likely = functional.cross_entropy(logits[:-1], batch.targets)
            kept = KL * drift(before[0], odds)
            return likely + kept + self.search.decay * change.norm() / first[0].norm() ** 2

        try:
            descend(
                torch.optim.Adam([change], lr=self.search.rate),
                loss,
                self.search.steps,
                enough=lambda value: not value > STOP,
                weights=lambda: change.mul_((self.search.clamp * first[0].norm() / change.norm()).clamp(max=1.0)),
            )
        finally:
            for handle in handles:
                handle.remove()
        return first[0], change.detach()

    @torch.no_grad()
    def keys(self, edit: Edit, layer: int) -> torch.Tensor:
        """The input of a layer's projection at the subject's last token, in each row of `ends`: [P, D].

        edit: any.
        layer: number of the block.
        """
        rows, places = zip(*self.ends(edit), strict=True)
        inputs = Rows(self.base.at(layer), rows, [[]] * len(rows)).activations
        return inputs[range(len(places)), places]


def texts_needed(base: BaseModel) -> int:
    """How many texts have the tokens that `corpus` takes, if each word of theirs is a token or more.

    base: the model.
    """
    return max(TEXTS, -(-TOKENS_EACH * base.d // WORDS[0]))


def drift(before: torch.Tensor, odds: torch.Tensor) -> torch.Tensor:
    """The last term of ROME's Eq. 4, KL(edited || before), in nats.

    before, odds: [V], log-probabilities of the unedited and of the edited model.
    """
    return functional.kl_div(before, odds, log_target=True, reduction="sum")


def corpus(base: BaseModel, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of the first texts, in eights, until they have 16,384 tokens and ten for each input of the projection.

    Of all texts where these have fewer.

    base: the model.
    texts: the corpus.

    Raises ConfigError for fewer tokens than the projection has inputs: statistics of them say nothing of most.
    """
    rows: list[list[int]] = []
    enough = max(CORPUS_TOKENS, TOKENS_EACH * base.d)
    for text in texts:
        if len(rows) % BATCH == 0 and sum(map(len, rows)) >= enough:
            break
        rows.append(prompt_ids(base.tokenizer, text, chat=False))
    if (tokens := sum(map(len, rows))) < base.d:
        raise ConfigError(
            f"the statistics of ROME, MEMIT and AlphaEdit need {base.d} tokens of text or more, and there are {tokens}",
            cure="give more text, or leave these methods out",
            reason=Reason.CORPUS,
        )
    return rows


@torch.no_grad()
def second_moments(bases: Sequence[BaseModel], rows: Sequence[list[int]]) -> dict[int, torch.Tensor]:
    """Mean of k k^T over tokens of a corpus, k the input of each layer's projection: float32 [D, D] by layer.

    bases: the model at each layer.
    rows: token ids of texts.
    """
    sums = {base.layer: torch.zeros(base.d, base.d, device=base.device) for base in bases}
    real = torch.zeros(0)
    deepest = max(bases, key=lambda base: base.layer)

    def hook(layer: int) -> Any:
        def add(_module: Any, args: tuple[torch.Tensor]) -> None:
            keys = args[0][real].float()
            sums[layer] += keys.T @ keys

        return add

    handles = [base.projection.register_forward_pre_hook(hook(base.layer)) for base in bases]
    try:
        for first in range(0, len(rows), BATCH):
            batch = rows[first : first + BATCH]
            ids, lengths = right_pad(batch, deepest.device)
            real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
            frozen_run(deepest, {"input_ids": ids, "use_cache": False})
    finally:
        for handle in handles:
            handle.remove()
    return {layer: total / sum(map(len, rows)) for layer, total in sums.items()}
