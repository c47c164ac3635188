"""MEMIT: keys and values written into the MLPs of several layers by least squares.

Meng et al. 2023 (arXiv 2210.07229): the value of the last layer by Eq. 16, what is missing of it spread over the layers
by Eq. 20, each written by Eq. 14 with C0 = lambda E[k k^T] (Eq. 15). Published configuration of EasyEdit for LLaMA-3:
layers 4 to 8 of 32, lambda 15,000, Adam with learning rate .5, at most 25 steps, KL .0625, weight decay .001, the
change at most 4 times the first value. As in the authors' code the bare prompt is half of a key, and the mean of its
prefixed forms the other half.

Deviations: lambda is 15,000 times D / 14,336. Eq. 14 makes the share s / (1 + s) of one value, where s = k^T C0^-1 k,
and the mean of s over the corpus is D / lambda whatever the keys' length: unscaled, a model of D = 1,536 gets at most
half of each value. One edit at a time, since edits arrive one after another; statistics of as many tokens of
WikiText as ROME has, instead of 100,000 articles of Wikipedia. On another model the layers are at the same part of the
depth. Models with a norm behind the FFN are refused, such as Gemma 3: what a matrix must put out for a block to put out
a value is not known there. So are those that are edited in their attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from memoir_retrieval.edits.record import Edit
from memoir_retrieval.errors import ModelError
from memoir_retrieval.evaluation.methods.located import LocatedMethod, ValueSearch
from memoir_retrieval.evaluation.methods.method import scaled
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.model.forward import frozen_run

__all__ = ["Memit", "least_squares"]

WEIGHT, WIDTH = 15000.0, 14336


class Memit(LocatedMethod):
    """See the module."""

    name = "memit"
    search = ValueSearch(rate=0.5, steps=25, clamp=4.0, decay=1e-3)

    def __init__(self, base: BaseModel, **options: Any):
        """base, options: see `Method`."""
        super().__init__(base, **options)
        self.layers = tuple(sorted({scaled(layer, base) for layer in range(4, 9)}))

    @classmethod
    def check(cls, base: BaseModel) -> None:
        """See `Method`. Values are block outputs, which must change by what a projection adds.

        base: see there.
        """
        super().check(base)
        if not base.block_adds:
            raise ModelError(
                f"blocks of {base.name} do not add what {base.module} puts out as it is",
                cure="compare methods on another model",
            )

    def edit(self, edits: Sequence[Edit]) -> None:
        """See `Method`."""
        for edit in edits:
            first, change = self.value_change(edit, block_output=True)
            for number, layer in enumerate(self.layers):
                key = self.key(edit, layer)
                missing = (first + change - self._output(edit)) / (len(self.layers) - number)
                weight = self.weight(self.base.at(layer))
                with torch.no_grad():
                    weight.add_(self.solution(layer, key[:, None], missing[:, None]))
            self.finish(edit)

    def key(self, edit: Edit, layer: int) -> torch.Tensor:
        """The mean of the bare prompt's key and of the mean of the others, as in the authors' code: [D].

        edit, layer: see `keys`.
        """
        keys = self.keys(edit, layer)
        return (keys[0] + keys[1:].mean(0)) / 2

    def finish(self, edit: Edit) -> None:
        """What is kept of an edit that was made.

        edit: that edit.
        """

    def solution(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """What is added to a layer's matrix: [H, D].

        layer: number of the block.
        keys: [D, n].
        values: [H, n], what is missing.
        """
        return least_squares(WEIGHT * self.base.d / WIDTH * self.moments[layer], keys, values)

    @torch.no_grad()
    def _output(self, edit: Edit) -> torch.Tensor:
        """Output of the last layer's block at the subject's last token: [H]."""
        ids, place = self.ends(edit)[0]
        inputs = {"input_ids": torch.tensor([ids], device=self.base.device), "use_cache": False}
        return frozen_run(self.base.at(self.layers[-1]), inputs, above=True)[0][0, place]


def least_squares(c: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Eq. 14: values keys^T (C + keys keys^T)^-1, [H, D].

    c: [D, D].
    keys: [D, n].
    values: [H, n].
    """
    return values @ torch.linalg.solve(c + keys @ keys.T, keys).T
