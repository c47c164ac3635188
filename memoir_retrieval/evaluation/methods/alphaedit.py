"""AlphaEdit: MEMIT, projected to where the keys of kept knowledge are (almost) zero.

Fang et al. 2024 (arXiv 2410.02355, section 3): P projects to the eigenvectors of K0 K0^T with small eigenvalues, the
change is values K^T P (Kp Kp^T P + K K^T P + L2 I)^-1 with the keys Kp of earlier edits. Published configuration for
LLaMA-3: layers 4 to 8 of 32, eigenvalues below .02, L2 10, Adam with at most 25 steps, weight decay .5, the change at
most .75 times the first value.

Deviations: the learning rate is .5, as published for GPT-2 XL with the same clamp. That for LLaMA-3, .1, ends below
half of the clamp in SmolLM2, whose values are long: 25 steps add at most 25 sqrt(H) times the rate. One edit at a
time; statistics of as many tokens of WikiText as ROME has, instead of 100,000 articles of Wikipedia. Keys have another
length on another model; the threshold and L2 are kept as published all the same, and `settings` says which share of the
directions is left (`kept`). On another model the layers are at the same part of the depth.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch

from memoir_retrieval.edits.record import Edit
from memoir_retrieval.evaluation.methods.located import ValueSearch
from memoir_retrieval.evaluation.methods.memit import Memit
from memoir_retrieval.model.base import BaseModel

__all__ = ["AlphaEdit", "null_space"]

EIGENVALUE, L2 = 2e-2, 10.0


class AlphaEdit(Memit):
    """See the module."""

    name = "alphaedit"
    search = ValueSearch(rate=0.5, steps=25, clamp=0.75, decay=0.5)

    def __init__(self, base: BaseModel, **options: Any):
        """base, options: see `Method`."""
        super().__init__(base, **options)
        self.earlier = {layer: torch.zeros(base.d, base.d, device=base.device) for layer in self.layers}

    @cached_property
    def projections(self) -> dict[int, torch.Tensor]:
        """P of each layer, [D, D]."""
        return {
            layer: self.once(("null space", layer), partial(null_space, c, EIGENVALUE))
            for layer, c in self.moments.items()
        }

    @property
    def settings(self) -> dict[str, Any]:
        """See `Method`; `kept`: the share of directions in which each layer may change."""
        kept = [round(float(p.trace()) / len(p), 3) for p in self.projections.values()]
        return super().settings | {"eigenvalue": EIGENVALUE, "l2": L2, "kept": kept}

    def prepare(self) -> None:
        """See `Method`."""
        super().prepare()
        _ = self.projections

    def finish(self, edit: Edit) -> None:
        """See `Memit`: the keys of this edit."""
        for layer in self.layers:
            key = self.key(edit, layer)
            self.earlier[layer] += torch.outer(key, key)

    def solution(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See `Memit`."""
        p = self.projections[layer]
        inside = p @ (self.earlier[layer] + keys @ keys.T) + L2 * torch.eye(len(p), device=p.device)
        return torch.linalg.solve(inside, p @ keys @ values.T).T


def null_space(c: torch.Tensor, threshold: float) -> torch.Tensor:
    """Eq. 7: the projection to the eigenvectors of C whose eigenvalue is below a threshold, [D, D].

    c: [D, D], symmetric.
    threshold: of the eigenvalues.
    """
    eigenvalues, vectors = torch.linalg.eigh(c)
    small = vectors[:, eigenvalues < threshold]
    return small @ small.T
