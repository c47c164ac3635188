"""Which rows of a step belong to which request, and which of them a residual memory acts on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from memoir_vllm.worker.product import ResidualProduct

__all__ = ["Acting", "Batch", "StepRows", "acting_rows"]


class StepRows(NamedTuple):
    """The rows of one forward. Rows `[edges[i], edges[i + 1])` hold tokens of request `ids[i]` from `positions[i]` on.

    All are the step's own: a runner reuses its buffers.

    ids: of the requests.
    edges: int [requests + 1].
    positions: int [requests].
    """

    ids: Sequence[str]
    edges: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class Batch:
    """All rows of a step that one residual memory acts on.

    memory: which one.
    index: int64 [R] the rows.
    masks: [S, D] of the requests.
    owner: int64 [R] in [0, S), whose row it is.
    """

    memory: ResidualProduct
    index: torch.Tensor
    masks: torch.Tensor
    owner: torch.Tensor

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """y += W (mask * x) on these rows, and on no other.

        x: [tokens, D/ranks] into the layer.
        y: [tokens, H] out of it, this rank's partial sum, which is changed.
        """
        one_row_each = len(self.masks) == len(self.owner)
        masks = self.masks if one_row_each else self.masks[self.owner]
        y.index_add_(0, self.index, self.memory(x[self.index] * masks))


class Acting(NamedTuple):
    """Edited requests of a step.

    places: int [S], where each stands in it.
    starts: int [S], the position from which each is edited.
    numbers: int [S], that of its memory among `memories`.
    masks: of each, [D].
    memories: those that act.
    """

    places: np.ndarray
    starts: np.ndarray
    numbers: np.ndarray
    masks: Sequence[torch.Tensor]
    memories: Sequence[ResidualProduct]

    def all_rows(self, step: StepRows) -> bool:
        """Whether every row of these requests is edited, as it is once they generate.

        step: in which they are.
        """
        return bool((step.positions[self.places] >= self.starts).all())


def acting_rows(step: StepRows, acting: Acting) -> list[Batch]:
    """One batch for each memory.

    step: in which the requests are.
    acting: the edited requests.
    """
    ends = step.edges[acting.places + 1]
    first = step.edges[acting.places] + np.maximum(0, acting.starts - step.positions[acting.places])
    counts = np.maximum(0, ends - first)
    batches = []
    for number, memory in enumerate(acting.memories):
        chosen = np.flatnonzero((acting.numbers == number) & (counts > 0))
        if not len(chosen):
            continue
        rows = counts[chosen]
        owner = np.repeat(np.arange(len(chosen)), rows)
        index = np.arange(len(owner)) + np.repeat(first[chosen] - (np.cumsum(rows) - rows), rows)
        masks = torch.stack([acting.masks[i] for i in chosen.tolist()])
        # The host runs ahead of the device. Memory that is not pinned has been read when this returns.
        numbers = torch.from_numpy(np.stack([index, owner])).to(masks.device, non_blocking=True)
        batches.append(Batch(memory, numbers[0], masks, numbers[1]))
    return batches
