"""ROME: a rank-one change of one MLP's second matrix, so that a subject's key gives the value of the new answer.

Meng et al. 2022 (arXiv 2202.05262): the key of Eq. 3, the value of Eq. 4, the change of Eq. 2. As in the authors' code
the change has the direction of the mean key, and is so long that the bare prompt's key gives the value. Published
configuration of EasyEdit for LLaMA-3: layer 5 of 32, Adam with learning rate .5, at most 25 steps, until the loss is
below .05, KL .0625, weight decay .001, the change at most 4 times the first value.

Deviations: 5 prefixes instead of 20; C (of Eq. 2) from 16,384 tokens of WikiText, or ten for each input of the matrix
where that is more, instead of 100,000 articles of Wikipedia, and used as in the paper, where that configuration leaves
it out. A prompt that does not name its subject is keyed at its last token. On another model the layer is at the same
part of the depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from memoir_retrieval.edits.record import Edit
from memoir_retrieval.evaluation.methods.located import LocatedMethod, ValueSearch
from memoir_retrieval.evaluation.methods.method import scaled
from memoir_retrieval.model.base import BaseModel

__all__ = ["Rome", "rank_one"]


class Rome(LocatedMethod):
    """See the module."""

    name = "rome"
    search = ValueSearch(rate=0.5, steps=25, clamp=4.0, decay=1e-3)

    def __init__(self, base: BaseModel, **options: Any):
        """base, options: see `Method`."""
        super().__init__(base, **options)
        self.layers = (scaled(5, base),)

    @property
    def _factor(self) -> torch.Tensor:
        (layer,) = self.layers
        return self.once(("factor", layer), lambda: torch.linalg.cholesky(self.moments[layer]))

    def prepare(self) -> None:
        """See `Method`."""
        super().prepare()
        _ = self._factor

    def edit(self, edits: Sequence[Edit]) -> None:
        """See `Method`."""
        for edit in edits:
            _first, change = self.value_change(edit, block_output=False)
            keys = self.keys(edit, self.layers[0])
            weight = self.weight(self.base.at(self.layers[0]))
            with torch.no_grad():
                whitened = torch.cholesky_solve(keys.mean(0)[:, None], self._factor)[:, 0]
                weight.add_(rank_one(keys[0], change, whitened))


def rank_one(key: torch.Tensor, change: torch.Tensor, whitened: torch.Tensor) -> torch.Tensor:
    """Eq. 2: what is added to W so that W key changes by `change`, and little else: [H, D].

    key: [D], of the bare prompt, whose value was sought.
    change: [H].
    whitened: C^-1 k, [D], where k is the mean key over all prefixes.
    """
    return torch.outer(change / (whitened @ key), whitened)
