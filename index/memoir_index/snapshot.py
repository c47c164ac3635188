"""The rows of an index at one moment, across its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from memoir_index.blocks import Block, Ids
from memoir_index.codes import Codes
from memoir_index.scan import Distances, Rows, first, nearest_there


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What one reader works on. A place is a position counted over all blocks, with the rows that are gone; a row is
    one counted without them."""

    blocks: tuple[Block, ...]

    @cached_property
    def places(self) -> Ids:
        """The first place of each block, and the end."""
        return np.cumsum([0, *(block.rows for block in self.blocks)])

    @cached_property
    def starts(self) -> Ids:
        """The first row of each block, and the end."""
        return np.cumsum([0, *(block.alive for block in self.blocks)])

    @property
    def alive(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def ids(self) -> Ids:
        parts = [block.ids if block.gone is None else block.ids[block.positions] for block in self.blocks]
        ids = np.concatenate(parts) if parts else np.empty(0, np.int64)
        ids.flags.writeable = False
        return ids

    @cached_property
    def edits(self) -> int:
        return len(np.unique(self.ids))

    def code(self, row: int) -> Codes:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        block = self.blocks[number]
        return block.codes[block.positions[row - self.starts[number]]]

    def take(self, rows: Rows) -> Codes:
        """The codes of many rows, a copy."""
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        codes = np.empty((len(rows), self.blocks[0].codes.shape[1]), np.uint8)
        for number in np.unique(numbers).tolist():
            block, in_block = self.blocks[number], numbers == number
            codes[in_block] = block.codes[block.positions[rows[in_block] - self.starts[number]]]
        return codes

    def resolve(self, places: Rows) -> tuple[Rows, Ids]:
        """Rows and edit ids of places, -1 for -1."""
        rows, ids = np.full(len(places), -1, np.int64), np.full(len(places), -1, np.int64)
        numbers = np.searchsorted(self.places, places, side="right") - 1
        for number in np.unique(numbers[places >= 0]).tolist():
            block, in_block = self.blocks[number], numbers == number
            positions = places[in_block] - self.places[number]
            rows[in_block] = self.starts[number] + block.rank[positions]
            ids[in_block] = block.ids[positions]
        return rows, ids

    def nearest(self, codes: Codes, n: int) -> tuple[Distances, Rows]:
        """Hamming distances int32 [Q, n] and places int64 [Q, n] of the n <= N nearest rows, nearest first and the
        earlier row first among equals."""
        distances, places = [], []
        for start, block in zip(self.places.tolist(), self.blocks, strict=False):
            dist, positions = nearest_there(block, codes, min(n, block.alive))
            distances.append(dist)
            places.append(positions + start)
        return first(np.concatenate(distances, axis=1), np.concatenate(places, axis=1), n)
