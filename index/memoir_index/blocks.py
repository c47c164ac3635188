"""Where rows lie: blocks that readers may look at while a writer goes on behind their last row.

A block that was published never changes. Rows are appended to room that no published block reaches; a removal
publishes the block again with the row marked as gone, and a block with many such rows is written again. So a write
costs what it writes, not what is stored, and a reader keeps what it began with. Rows that lie in a file stay there.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from memoir_index.codes import Codes, popcount
from memoir_index.plan import sketch_bytes, usual_ones

Ids = NDArray[np.int64]

BLOCK = 16384
"""Rows of a block. Memory is reserved for all of them and used as they come."""

MOST_GONE = 1 / 8
"""A block with a larger share of removed rows is written again, unless it lies in foreign memory."""


class Room:
    """The memory of a block: codes uint8 [capacity, d/8], ids int64 [capacity] and, once asked for, the sketch.

    Only a writer that holds the index' lock appends. Foreign memory, such as a file's, is full from the start.
    """

    def __init__(self, codes: Codes, ids: Ids, used: int, *, foreign: bool = False) -> None:
        self.codes = codes
        self.ids = ids
        self.used = used
        self.foreign = foreign
        self._sketch: Codes | None = None
        self._sketched = 0
        self._odd = False
        self._sketching = threading.Lock()

    @classmethod
    def empty(cls, width: int) -> Room:
        return cls(np.empty((BLOCK, width), np.uint8), np.empty(BLOCK, np.int64), 0)

    @property
    def free(self) -> int:
        return len(self.codes) - self.used

    def append(self, ids: Ids, codes: Codes) -> None:
        end = self.used + len(ids)
        self.codes[self.used : end] = codes
        self.ids[self.used : end] = ids
        self.used = end

    def sketch(self, rows: int, bits: int, k: int) -> Codes | None:
        """The first bits of the first rows, uint8 [rows, `sketch_bytes`], copied when first asked for; an index asks
        for one size only. None where a row has so many or so few ones there that its bits were never permuted.
        """
        if self._sketched < rows:
            with self._sketching:
                self._extend(rows, bits, k)
        if self._odd or self._sketch is None:
            return None
        return self._sketch[:rows]

    def _extend(self, rows: int, bits: int, k: int) -> None:
        if self._sketch is None:
            self._sketch = np.zeros((len(self.codes), sketch_bytes(bits)), np.uint8)
        start, d = self._sketched, 8 * self.codes.shape[1]
        if start < rows:
            self._sketch[start:rows, : bits // 8] = self.codes[start:rows, : bits // 8]
            ones = popcount(self._sketch[start:rows])
            least, most = usual_ones(d, k, bits)
            self._odd |= bool((ones < least).any() or (ones > most).any())
            self._sketched = rows  # last, for readers that look without the lock


@dataclass(frozen=True, eq=False)
class Block:
    """The first `rows` rows of a room, less those gone: bool [rows], or None where all are there."""

    room: Room
    rows: int
    gone: NDArray[np.bool_] | None = None

    @cached_property
    def codes(self) -> Codes:
        """uint8 [rows, d/8], those gone included."""
        return _read_only(self.room.codes[: self.rows])

    @cached_property
    def ids(self) -> Ids:
        """int64 [rows], those gone included."""
        return _read_only(self.room.ids[: self.rows])

    @cached_property
    def _span(self) -> tuple[int, int]:
        return int(self.ids.min()), int(self.ids.max())

    def may_hold(self, ids: Ids) -> bool:
        """Whether some of the ids, int64 [N], lie between the least and the largest of this block's."""
        least, largest = self._span
        return bool(((ids >= least) & (ids <= largest)).any())

    @cached_property
    def positions(self) -> Ids:
        """Positions of the rows that are there, int64, ascending."""
        return np.arange(self.rows) if self.gone is None else np.flatnonzero(~self.gone)

    @cached_property
    def alive(self) -> int:
        return self.rows if self.gone is None else self.rows - int(self.gone.sum())

    @cached_property
    def rank(self) -> Ids:
        """At each position: how many rows that are there come before it, int64 [rows]."""
        if self.gone is None:
            return np.arange(self.rows)
        return np.cumsum(~self.gone) - ~self.gone

    def sketch(self, bits: int, k: int) -> Codes | None:
        """See `Room.sketch`."""
        return self.room.sketch(self.rows, bits, k)


def lend(ids: Ids, codes: Codes) -> tuple[Block, ...]:
    """Blocks that look at the given arrays and copy nothing."""
    blocks = []
    for start in range(0, len(ids), BLOCK):
        part = slice(start, start + BLOCK)
        room = Room(codes[part], ids[part], len(ids[part]), foreign=True)
        blocks.append(Block(room, room.used))
    return tuple(blocks)


def append(blocks: tuple[Block, ...], ids: Ids, codes: Codes) -> tuple[Block, ...]:
    """The blocks with rows added behind the last. Callers hold the index' lock."""
    out, start = list(blocks), 0
    while start < len(ids):
        if not out or out[-1].room.used > out[-1].rows or not out[-1].room.free:
            out.append(Block(Room.empty(codes.shape[1]), 0))
        last = out[-1]
        part = slice(start, start + last.room.free)
        last.room.append(ids[part], codes[part])
        gone = last.gone
        if gone is not None:
            gone = np.concatenate([gone, np.zeros(last.room.used - last.rows, np.bool_)])
        out[-1] = Block(last.room, last.room.used, gone)
        start = part.stop
    return tuple(out)


def remove(blocks: tuple[Block, ...], ids: Ids) -> tuple[Block, ...]:
    """The blocks without the rows of the given ids. Callers hold the index' lock."""
    out: list[Block] = []
    renewed = False
    for block in blocks:
        if not block.may_hold(ids):
            out.append(block)
            renewed = False
            continue
        hit = block.ids == ids[0] if len(ids) == 1 else np.isin(block.ids, ids)
        if block.gone is not None:
            hit |= block.gone
        gone = int(hit.sum())
        if gone == block.rows or (gone > block.rows * MOST_GONE and not block.room.foreign):
            keep = np.flatnonzero(~hit)
            # Behind a block that was just renewed there is room that no reader sees.
            before = tuple(out[-1:]) if renewed else ()
            out[len(out) - len(before) :] = append(before, block.ids[keep], block.codes[keep])
            renewed = renewed or bool(len(keep))
        else:
            out.append(Block(block.room, block.rows, hit) if gone else block)
            renewed = False
    return tuple(out)


def only(blocks: tuple[Block, ...], rows: Ids) -> tuple[Block, ...]:
    """The blocks with none but some rows, ascending numbers counted over all blocks without the rows that are gone."""
    out = []
    start = 0
    for block in blocks:
        first, end = np.searchsorted(rows, [start, start + block.alive])
        if end - first == block.alive:
            out.append(block)
        elif end > first:
            gone = np.ones(block.rows, np.bool_)
            gone[block.positions[rows[first:end] - start]] = False
            out.append(Block(block.room, block.rows, gone))
        start += block.alive
    return tuple(out)


def _read_only(view: NDArray) -> NDArray:
    view.flags.writeable = False
    return view
