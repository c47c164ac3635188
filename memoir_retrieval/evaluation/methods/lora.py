"""LoRA: low-rank changes of the attention's query and value projections, trained edit after edit.

Hu et al. 2021 (arXiv 2106.09685), Eq. 3: h = W0 x + B A x, with B zero at first. Published configuration of EasyEdit
for LLaMA: rank 8, alpha 32, Adam with learning rate 5e-3, at most 70 steps.

Deviations: no dropout (.1 there); training stops when the loss is below .01; plain LoRA, where the configuration for
LLaMA-3 names AdaLoRA. Forty lines of our own instead of PEFT, which would be a dependency of this module alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import functional

from memoir_retrieval.edits.record import Edit
from memoir_retrieval.errors import ModelError
from memoir_retrieval.evaluation.methods.method import Method
from memoir_retrieval.evaluation.methods.rows import Rows
from memoir_retrieval.model.base import BaseModel

__all__ = ["Lora"]

NAMES = ("q_proj", "v_proj")
RANK, ALPHA, RATE, STEPS, STOP = 8, 32, 5e-3, 70, 1e-2


class Lora(Method):
    """See the module."""

    name = "lora"

    def __init__(self, base: BaseModel, **options: Any):
        """base, options: see `Method`.

        Raises ModelError for a model whose attention has no such projections.
        """
        super().__init__(base, **options)
        modules = [m for name, m in base.model.named_modules() if name.rpartition(".")[2] in NAMES]
        if not modules:
            raise ModelError(f"{base.name} has no modules named {' or '.join(NAMES)}: compare methods on another model")
        self.pairs = [(module, *self._pair(module.in_features, module.out_features)) for module in modules]

    def _pair(self, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        bound = 1 / math.sqrt(inputs)
        down = (torch.rand(RANK, inputs, generator=self.random) * 2 - 1) * bound
        return down.to(self.base.device).requires_grad_(), torch.zeros(outputs, RANK).to(down).requires_grad_()

    @property
    def settings(self) -> dict[str, Any]:
        """See `Method`."""
        return {"modules": NAMES, "rank": RANK, "alpha": ALPHA, "rate": RATE, "steps": STEPS, "stop": STOP}

    @property
    def bytes(self) -> int:
        """See `Method`."""
        return 4 * sum(down.numel() + up.numel() for _, down, up in self.pairs)

    def edit(self, edits: Sequence[Edit]) -> None:
        """See `Method`."""
        for edit in edits:
            rows = Rows(self.base, [self.ids(edit.prompt)], [self.answer_ids(edit)], whole=True)
            optimizer = torch.optim.Adam([tensor for _, *pair in self.pairs for tensor in pair], lr=RATE)
            with self.acting(rows.ids), torch.enable_grad():
                for _ in range(STEPS):
                    loss = rows.loss()
                    if loss < STOP:
                        break
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()

    @contextmanager
    def acting(self, prompts: torch.Tensor) -> Iterator[None]:
        """See `Method`."""
        with ExitStack() as hooks:
            for module, down, up in self.pairs:

                def add(
                    _module: Any,
                    args: tuple[torch.Tensor],
                    output: torch.Tensor,
                    down: torch.Tensor = down,
                    up: torch.Tensor = up,
                ) -> torch.Tensor:
                    return output + functional.linear(functional.linear(args[0], down), up) * (ALPHA / RANK)

                hooks.callback(module.register_forward_hook(add).remove)
            yield
