"""Sums of the edited layer's input over each KV block, so that a question may lie in the prefix cache.

A cached token never reaches the layer, so what it would have added to the mean must be kept. The layer's input does
not depend on any edit, which act behind it, so one table serves the blocks of the base model and of all edits. It
is indexed by the number of the physical block and lives as long as what the block holds. Which blocks it is good for
is known where hits are decided, see `core/blocks.py`.

A GPU adds the rows of a block up in no fixed order (`index_add_`), so there the mean of a question that lies in the
cache may differ in its last bits from one run to the next. A bit of its mask differs where two activations are as near.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from memoir_vllm.worker.pooling import SLICE

__all__ = ["BlockSums"]


class BlockSums:
    """float32 [blocks + 1, D/ranks] on the device, with the weight and the number of the tokens in each.

    The last entry takes what belongs to no block.
    """

    def __init__(self, blocks: int, block_size: int, d: int, device: torch.device | str):
        """blocks: how many KV blocks there are.
        block_size: tokens of each.
        d: this rank's share of D.
        device: of the sums.
        """
        self.block_size = block_size
        self._sums = torch.zeros(blocks + 1, d, dtype=torch.float32, device=device)
        self._weights = torch.zeros(blocks + 1, dtype=torch.float32, device=device)
        self._counts = torch.zeros(blocks + 1, dtype=torch.int32, device=device)

    def add(self, x: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor, begins: np.ndarray) -> None:
        """Count rows. No shape depends on the data, so nothing waits for the device.

        x: [rows, D/ranks].
        weights: float32 [rows].
        slots: int64 [rows], where the KV cache keeps each: block * block_size + offset.
        begins: bool [rows], whose block is begun again.
        """
        blocks = slots // self.block_size
        begun = torch.from_numpy(begins).to(x.device, non_blocking=True)
        begun = torch.where(begun, blocks, len(self._counts) - 1)
        for table in (self._sums, self._weights, self._counts):
            table.index_fill_(0, begun, 0)
        for rows, weight, block in zip(x.split(SLICE), weights.split(SLICE), blocks.split(SLICE), strict=True):
            self._sums.index_add_(0, block, rows.float() * weight[:, None])
        self._weights.index_add_(0, blocks, weights)
        self._counts.index_add_(0, blocks, torch.ones_like(blocks, dtype=torch.int32))

    def of(self, blocks: Sequence[int], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Numerator, float32 [D/ranks], and denominator of a mean.

        blocks: which count the tokens.
        tokens: how many those are, all that these blocks count.

        Raises RuntimeError where they count others.
        """
        index = torch.tensor(blocks, device=self._sums.device)
        if int(self._counts[index].sum()) != tokens:
            raise RuntimeError("memoir: a cached block holds tokens that never passed the layer; please report this")
        return self._sums[index].sum(0), self._weights[index].sum()
