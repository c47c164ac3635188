"""WISE: a side memory beside one layer's matrix, and an activation threshold that chooses between the two.

Wang et al. 2024 (arXiv 2405.14768): the activation of Eq. 3, the choice by a threshold of Eq. 4, the margin loss of Eq.
5 in the sum of Eq. 6, gradients masked to a random part of the side memory (section 2.3.2). Published configuration of
EasyEdit for LLaMA: layer 27 of 32, SGD with learning rate 1.0 and weight decay 1e-5, 70 steps, part .2, margins alpha
5, beta 20, gamma 10, the side memory within 1.0 of the matrix; the threshold is .88 of the least activation of an edit.
Training ends before that once the loss is at most .02 and moves by at most 1e-4.
Each edit is trained with 10 prefixes that the model wrote, and an unrelated prompt for the margin.

Deviations: fewer than 500 edits make one shard, so nothing is merged (section 2.3.2). As in EasyEdit the activation is
the distance of both outputs behind the activation function, not of the outputs themselves. A request is given to one
memory by the mean over its prompt; EasyEdit decides again for each token it generates, and by prompt and answer where
it forces an answer. So the threshold is that of edits' prompts, bare and prefixed; EasyEdit's is that of prompts with
their answers. The unrelated prompt is one of the library's background prompts, of which `memoir bench methods` asks
some where --controls is above 100. The layer is the one that memoir edits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from memoir_retrieval.background import background_prompts
from memoir_retrieval.edits.record import Edit
from memoir_retrieval.evaluation.methods.descent import Settled, descend
from memoir_retrieval.evaluation.methods.method import PrefixedMethod
from memoir_retrieval.evaluation.methods.rows import Rows
from memoir_retrieval.model.base import BaseModel

__all__ = ["Wise"]

RATE, STEPS, DECAY, PART, BOUND, RATIO = 1.0, 70, 1e-5, 0.2, 1.0, 0.88
ALPHA, BETA, GAMMA = 5.0, 20.0, 10.0


class Wise(PrefixedMethod):
    """See the module.

    side: [H, D], the side memory. main: [H, D], the matrix.
    """

    name = "wise"
    writes = True

    def __init__(self, base: BaseModel, **options: Any):
        """base, options: see `Method`."""
        super().__init__(base, **options)
        self.main = self.weight(base).detach()
        self.side = self.main.clone()
        self.part = (torch.rand(self.main.shape, generator=self.random) < PART).to(self.main)
        self.least = float("inf")
        self._edits = 0

    @property
    def settings(self) -> dict[str, Any]:
        """See `Method`."""
        margins = {"alpha": ALPHA, "beta": BETA, "gamma": GAMMA, "threshold": round(self.least * RATIO, 4)}
        return {"layer": self.base.layer, "rate": RATE, "steps": STEPS, "part": PART, **margins}

    @property
    def bytes(self) -> int:
        """See `Method`."""
        return 4 * self.side.numel()

    def edit(self, edits: Sequence[Edit]) -> None:
        """See `Method`."""
        unrelated = background_prompts()
        for edit in edits:
            texts = [edit.prompt, *(f"{prefix} {edit.prompt}" for prefix in self.prefixes)]
            answer = self.answer_ids(edit)
            prompts = [*(self.ids(text) for text in texts), self.ids(unrelated[self._edits % len(unrelated)])]
            rows = Rows(self.base, prompts, [*([answer] * len(texts)), []])
            real = torch.arange(rows.ids.shape[1], device=rows.ids.device) < rows.lengths[:, None]
            main = _activated(rows.activations, self.main)  # the same in every step
            side = self.side.clone().requires_grad_()
            with self.training(), self._sided(side):
                descend(
                    torch.optim.SGD([side], lr=RATE, weight_decay=DECAY),
                    partial(self._loss, rows, main, side, real),
                    STEPS,
                    enough=Settled(),
                    gradients=partial(self._mask, side),
                    weights=partial(self._bound, side),
                )
            self.side = side.detach()
            in_prompt = torch.arange(rows.ids.shape[1]) < torch.tensor(rows.starts)[:, None]  # as a request is judged
            trained = _distance(_activated(rows.activations, self.side), main, in_prompt.to(real.device))
            self.least = min(self.least, float(trained[:-1].mean()))
            self._edits += 1

    def _loss(self, rows: Rows, main: torch.Tensor, side: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Eq. 6."""
        activation = _distance(_activated(rows.activations, side), main, real)
        return rows.loss() + margin(activation[:-1], activation[-1])

    def _mask(self, side: torch.Tensor) -> None:
        """Keep the gradients of the part that is trained (section 2.3.2)."""
        if side.grad is not None:
            side.grad *= self.part

    def _bound(self, side: torch.Tensor) -> None:
        side.copy_(side.clamp(self.main - BOUND, self.main + BOUND))

    @contextmanager
    def acting(self, prompts: torch.Tensor) -> Iterator[None]:
        """See `Method`."""
        with self._sided(self.side, prompts.shape[1]):
            yield

    @contextmanager
    def _sided(self, side: torch.Tensor, length: int = 0) -> Iterator[None]:
        """Within the context the side memory answers; with a length only where the prompt's activation says (Eq. 4)."""
        chosen: list[torch.Tensor] = []

        def choose(_module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            if not length:
                return functional.linear(args[0], side)
            if not chosen:
                outputs = (_activated(args[0][:, :length], weight) for weight in (side, self.main))
                chosen.append(_distance(*outputs) >= self.least * RATIO)
            return torch.where(chosen[0][:, None, None], functional.linear(args[0], side), output)

        handle = self.base.projection.register_forward_hook(choose)
        try:
            yield
        finally:
            handle.remove()


def _activated(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A memory's outputs [B, T, H] behind an activation function, the model's own in the published code."""
    return functional.silu(functional.linear(inputs, weight))


def _distance(side: torch.Tensor, main: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """Eq. 3, the mean over the tokens of each row, or those that are `real` (bool [B, T]): [B]."""
    norms = (side - main).norm(dim=-1)
    return norms.mean(1) if real is None else (norms * real).sum(1) / real.sum(1)


def margin(inside: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
    """Eq. 5: edits' activations above beta, unrelated ones below alpha, and gamma between them.

    inside: [B]. outside: a scalar.
    """
    terms = (outside - ALPHA, BETA - inside, outside - inside + GAMMA)
    return torch.stack([_positive_mean(term) for term in terms]).sum()


def _positive_mean(values: torch.Tensor) -> torch.Tensor:
    values = values.reshape(-1)
    positive = values[values > 0]
    return positive.mean() if len(positive) else values.sum() * 0
