"""The loss of answers that a method trains, with what lies below its layer run once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.model.forward import frozen_past, frozen_run, right_pad, run_from_block

__all__ = ["Rows"]


class Rows:
    """Prompts with answers, padded on the right, and the hidden states that enter the layer of `base`.

    Tokens of `past` are left out of everything below.

    ids: int64 [B, T].
    starts: length of each prompt.
    targets: int64 [n], the tokens of all answers, row after row.
    activations: [B, T, D], what enters the projection of the unedited model.
    """

    def __init__(
        self,
        base: BaseModel,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        past: Sequence[int] = (),
    ):
        """Run the model up to the layer.

        base: the model at the lowest layer that is trained.
        prompts, answers: token ids; a row without an answer has no part in the loss.
        past: so many first tokens of each prompt are run once, since nothing that is trained acts on them.
        """
        self.base = base
        _ = base.blocks_return_tuples  # runs the model, which no hook of a method should see
        before = frozen_past(base, [prompt[:n] for prompt, n in zip(prompts, past, strict=True)]) if past else None
        if past:
            prompts = [prompt[n:] for prompt, n in zip(prompts, past, strict=True)]
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        self.ids, self.lengths = right_pad(rows, base.device)
        self.starts = [len(prompt) for prompt in prompts]
        self.targets = torch.tensor([token for answer in answers for token in answer], device=base.device)
        self.wanted = torch.zeros_like(self.ids, dtype=torch.bool)
        for row, prompt, answer in zip(self.wanted, prompts, answers, strict=True):
            row[len(prompt) - 1 : len(prompt) - 1 + len(answer)] = True
        self._inputs = before.inputs(self.ids) if before else {"input_ids": self.ids, "use_cache": False}
        self.hidden, self.activations = frozen_run(base, self._inputs)

    def logits(self, wanted: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of some tokens, [n, V], under the hooks and weights that hold now.

        wanted: bool [B, T]; by default those from which the answers are predicted.
        """
        wanted = self.wanted if wanted is None else wanted
        with run_from_block(self.base, self.hidden, None, wanted) as model:
            return model(**self._inputs).logits[0]

    def loss(self) -> torch.Tensor:
        """Mean cross-entropy of the answers' tokens, in nats."""
        return functional.cross_entropy(self.logits().float(), self.targets)
