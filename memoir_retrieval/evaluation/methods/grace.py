"""GRACE: a codebook beside one layer replaces its output where the input is near a key.

Hartvigsen et al. 2023 (arXiv 2211.11031): the layer's rule is Eq. 1, the value is trained by gradients on the edit's
loss, and the codebook is updated by Algorithm 1 (add, expand or split). Published configuration of EasyEdit for LLaMA:
layer 27 of 32, eps 1.0, Adam with learning rate 1.0, 50 steps, values begin at random ("cold"), the value takes the
place of the output of the prompt's last token ("replace_last"), radii expand to cover ("coverage").

Deviations: the codebook is asked once for each request, at the prompt's last token; EasyEdit's generation asks it
again at each new token. Labels are compared as texts, where EasyEdit compares the means of token ids. The layer is the
one that memoir edits, as in the published configurations of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from memoir_retrieval.edits.record import Edit
from memoir_retrieval.evaluation.methods.descent import descend
from memoir_retrieval.evaluation.methods.method import Method
from memoir_retrieval.evaluation.methods.rows import Rows
from memoir_retrieval.model.base import BaseModel

__all__ = ["Grace"]

RADIUS, RATE, STEPS = 1.0, 1.0, 50


class Grace(Method):
    """See the module.

    keys: [N, D]. values: [N, H]. radii: [N]. labels: the target of each.
    """

    name = "grace"

    def __init__(self, base: BaseModel, **options: Any):
        """base, options: see `Method`."""
        super().__init__(base, **options)
        self.keys, self.values = (torch.zeros(0, width, device=base.device) for width in (base.d, base.h))
        self.radii, self.labels = torch.zeros(0, device=base.device), list[str]()

    @property
    def settings(self) -> dict[str, Any]:
        """See `Method`."""
        return {"layer": self.base.layer, "radius": RADIUS, "rate": RATE, "steps": STEPS}

    @property
    def bytes(self) -> int:
        """See `Method`."""
        return 4 * (self.keys.numel() + self.values.numel() + self.radii.numel())

    def edit(self, edits: Sequence[Edit]) -> None:
        """See `Method`."""
        for edit in edits:
            prompt = self.ids(edit.prompt)
            rows = Rows(self.base, [prompt], [self.answer_ids(edit)], past=[len(prompt) - 1])
            chosen = self._entry(rows.activations[0, 0], edit.target)
            value = self.values[chosen].clone().requires_grad_()
            with self.training(), self._written(value):
                descend(torch.optim.Adam([value], lr=RATE), rows.loss, STEPS)
            self.values[chosen] = value.detach()

    def _written(self, value: torch.Tensor) -> AbstractContextManager[None]:
        return replaced(self.base, lambda _: [(0, 0, value)])

    def _entry(self, query: torch.Tensor, label: str) -> int:
        """The entry that is to hold an edit's value (Algorithm 1): a new one, or the nearest where it says the same."""
        new, radius = len(self.keys), RADIUS
        if new:
            distance, nearest = (row.item() for row in (self.keys - query).norm(dim=1).min(0))
            nearest = int(nearest)
            if distance <= self.radii[nearest] + RADIUS:
                if self.labels[nearest] == label:
                    self.radii[nearest] = max(float(self.radii[nearest]), distance)
                    return nearest
                self.radii[nearest] = distance / 2 - 1e-5
                radius = distance / 2
        self.keys = torch.cat([self.keys, query[None]])
        drawn = torch.rand(1, self.base.h, generator=self.random)  # on the CPU: the same values on every device
        self.values = torch.cat([self.values, drawn.to(self.values)])
        self.radii = torch.cat([self.radii, self.radii.new_tensor([radius])])
        self.labels.append(label)
        return new

    @contextmanager
    def acting(self, prompts: torch.Tensor) -> Iterator[None]:
        """See `Method`."""
        last = prompts.shape[1] - 1

        def near(queries: torch.Tensor) -> list[tuple[int, int, torch.Tensor]]:
            distances, nearest = torch.cdist(queries[:, last], self.keys).min(1)
            inside = (distances <= self.radii[nearest]).nonzero()[:, 0].tolist()
            return [(row, last, self.values[nearest[row]]) for row in inside]

        with replaced(self.base, near) if len(self.keys) else replaced(self.base, lambda _: []):
            yield


@contextmanager
def replaced(base: BaseModel, values: Callable[[torch.Tensor], list[tuple[int, int, torch.Tensor]]]) -> Iterator[None]:
    """Within the context the projection's output is replaced at some tokens; cached passes of one token are let be.

    base: the model.
    values: from the projection's input [B, T, D] to (row, token, value [H]) of what is replaced.
    """
    first = True

    def replace(_module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor | None:
        nonlocal first
        if not first and args[0].shape[1] == 1:
            return None
        first = False
        output = output.clone()
        for row, token, value in values(args[0]):
            output[row, token] = value
        return output

    handle = base.projection.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
