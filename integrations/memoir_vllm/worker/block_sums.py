"""Sums of the edited layer's input over each KV block, so that a question may lie in the prefix cache.

A cached token never reaches the layer, so what it would have added to the mean must be kept. The layer's input does
not depend on any edit, which act behind it, so one table serves the blocks of the base model and of all edits. It
is indexed by the number of the physical block and lives as long as what the block holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["BlockSums"]


class BlockSums:
    """float32 [blocks + 1, D/ranks] on the device; the last entry takes what belongs to no block."""

    def __init__(self, blocks: int, block_size: int, d: int, device: torch.device | str):
        self.block_size = block_size
        self._sums = torch.zeros(blocks + 1, d, dtype=torch.float32, device=device)
        self._counts = torch.zeros(blocks + 1, dtype=torch.int64, device=device)

    def add(self, x: torch.Tensor, slots: torch.Tensor) -> None:
        """x: [rows, D/ranks]. slots: int64 [rows], where the KV cache keeps each row: block * block_size + offset.

        A row at the start of a block begins it anew. No shape depends on the data, so nothing waits for the device.
        """
        block, offset = slots // self.block_size, slots % self.block_size
        begun = torch.where(offset == 0, block, len(self._counts) - 1)
        self._sums.index_fill_(0, begun, 0)
        self._counts.index_fill_(0, begun, 0)
        self._sums.index_add_(0, block, x.float())
        self._counts.index_add_(0, block, torch.ones_like(block))

    def of(self, blocks: Sequence[int]) -> torch.Tensor:
        """float32 [D/ranks], over all tokens of full blocks. Raises RuntimeError where tokens of one are missing."""
        index = torch.tensor(blocks, device=self._sums.device)
        if not bool((self._counts[index] == self.block_size).all()):
            raise RuntimeError("memoir: a cached block holds tokens that never passed the layer; please report this")
        return self._sums[index].sum(0)
