"""FT: one matrix of one layer is trained on the answer, edit after edit.

The baseline FT of Zhu et al. 2020 (arXiv 2012.00363) without their norm constraint, and with the loss of all tokens of
the target (FT-M of Zhang et al., arXiv 2401.01286, section 3). Published configuration of EasyEdit for LLaMA: layer 21
of 32, Adam with learning rate 5e-4, at most 25 steps, until the loss is below .01.

Deviations: none. On another model the layer is at the same part of the depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from memoir_retrieval.edits.record import Edit
from memoir_retrieval.evaluation.methods.descent import descend
from memoir_retrieval.evaluation.methods.method import Method, scaled
from memoir_retrieval.evaluation.methods.rows import Rows
from memoir_retrieval.model.base import BaseModel

__all__ = ["FineTuning"]

LAYER, RATE, STEPS, STOP = 21, 5e-4, 25, 1e-2


class FineTuning(Method):
    """See the module."""

    name = "ft"
    writes = True

    def __init__(self, base: BaseModel, **options: Any):
        """base, options: see `Method`."""
        super().__init__(base, **options)
        self.at = base.at(scaled(LAYER, base))

    @property
    def settings(self) -> dict[str, Any]:
        """See `Method`."""
        return {"layer": self.at.layer, "rate": RATE, "steps": STEPS, "stop": STOP}

    def edit(self, edits: Sequence[Edit]) -> None:
        """See `Method`."""
        for edit in edits:
            rows = Rows(self.at, [self.ids(edit.prompt)], [self.answer_ids(edit)])
            weight = self.weight(self.at).requires_grad_()
            with self.training():
                descend(torch.optim.Adam([weight], lr=RATE), rows.loss, STEPS, enough=lambda loss: loss < STOP)
            weight.requires_grad_(False)
