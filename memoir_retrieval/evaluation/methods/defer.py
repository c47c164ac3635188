"""DEFER: a small network beside one layer decides whether a linear map takes the layer's place.

The baseline Defer of Hartvigsen et al. 2023 (arXiv 2211.11031, section 4.1), after SERAC (Mitchell et al. 2022, arXiv
2206.06520): with g(h) = sigmoid(w h + b) and f(h) = V h + c the layer gives g f + (1 - g) layer(h) in training, and f
alone where g is at least .5 afterwards. Published configuration of EasyEdit for LLaMA: layer 27 of 32, Adam with
learning rate 7e-5, 100 steps, threshold .5.

Deviations: the rate is 7e-5 times 11,008 / D, since a step of Adam changes an output by the rate times the sum of its D
inputs; without this a smaller model does not learn single edits. g and f read the prompt's last token, once for each
request; EasyEdit reads the last token of whatever it is given, the answer's in teacher forcing. The layer is the one
that memoir edits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from memoir_retrieval.edits.record import Edit
from memoir_retrieval.evaluation.methods.descent import descend
from memoir_retrieval.evaluation.methods.method import SEED, Method
from memoir_retrieval.evaluation.methods.rows import Rows
from memoir_retrieval.model.base import BaseModel

__all__ = ["Defer"]

RATE, WIDTH, STEPS, THRESHOLD = 7e-5, 11008, 100, 0.5


class Defer(Method):
    """See the module."""

    name = "defer"

    def __init__(self, base: BaseModel, **options: Any):
        """base, options: see `Method`."""
        super().__init__(base, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.gate = torch.nn.Linear(base.d, 1).to(base.device)
            self.values = torch.nn.Linear(base.d, base.h).to(base.device)
        self.trained = False
        self.rate = RATE * WIDTH / base.d

    @property
    def settings(self) -> dict[str, Any]:
        """See `Method`."""
        return {"layer": self.base.layer, "rate": self.rate, "steps": STEPS, "threshold": THRESHOLD}

    @property
    def _parameters(self) -> list[torch.nn.Parameter]:
        return [*self.gate.parameters(), *self.values.parameters()]

    @property
    def bytes(self) -> int:
        """See `Method`."""
        return 4 * sum(weight.numel() for weight in self._parameters)

    def edit(self, edits: Sequence[Edit]) -> None:
        """See `Method`."""
        self.trained = True
        for edit in edits:
            prompt = self.ids(edit.prompt)
            rows = Rows(self.base, [prompt], [self.answer_ids(edit)])
            with self.training(), self._mixed(len(prompt), hard=False):
                descend(torch.optim.Adam(self._parameters, lr=self.rate), rows.loss, STEPS)

    @contextmanager
    def acting(self, prompts: torch.Tensor) -> Iterator[None]:
        """See `Method`."""
        with self._mixed(prompts.shape[1], hard=True):
            yield

    @contextmanager
    def _mixed(self, length: int, hard: bool) -> Iterator[None]:
        queries: list[torch.Tensor] = []

        def mix(_module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            if args[0].shape[1] >= length and (length > 1 or not queries):
                queries[:] = [args[0][:, length - 1]]
            gate = torch.sigmoid(self.gate(queries[0]))[:, None]
            values = self.values(queries[0])[:, None]
            if hard:
                return torch.where(gate >= THRESHOLD, values, output) if self.trained else output
            return gate * values + (1 - gate) * output

        handle = self.base.projection.register_forward_hook(mix)
        try:
            yield
        finally:
            handle.remove()
