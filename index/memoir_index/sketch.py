"""Sketch, then verify: the same answer as a full scan for a fraction of its reading. `plan` tells why it holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from memoir_index.blocks import BLOCK, Block
from memoir_index.codes import Codes
from memoir_index.plan import Plan, limits_for
from memoir_index.scan import FAR, Distances, Rows, between, knn, nearest_there, within

TOP = 8
"""Rows of a block that are kept for each query where few pass; most often they are more than could match."""

_PLACE_BITS = 32
_NOTHING = np.int64(FAR) << _PLACE_BITS

_Pairs = tuple[Rows, Rows, Distances]
"""Numbers of queries, positions of rows in a block, and their distances in the sketch; all [P]."""


def search_sketch(
    blocks: Sequence[Block], codes: Codes, plan: Plan, k: int, radius: int
) -> tuple[NDArray[np.int64], Rows]:
    """The nearest row of each query, uint8 [Q, d/8], where it differs in at most radius bits; the earliest of equals.

    Returns distances int64 [Q] and places int64 [Q], positions counted over all blocks. Where no row is that near,
    those of the nearest row that was looked at, at least one.
    """
    search = _SketchSearch(codes, plan, radius)
    start = 0
    for block in blocks:
        sketch = block.sketch(plan.bits, k)
        if sketch is None:
            dist, position = nearest_there(block, codes, 1)
            search.best.offer(search.all, dist[:, 0], position[:, 0] + start)
        else:
            search.verify(block, start, search.candidates(block, sketch, start))
        start += block.rows

    alone = np.flatnonzero(search.best.place < 0)
    if len(alone):
        search.look_at_closest(blocks, alone, k)
    return search.best.distance, search.best.place


class _SketchSearch:
    """One batch of queries on its way through the blocks."""

    def __init__(self, codes: Codes, plan: Plan, radius: int) -> None:
        self.codes = codes
        self.all = np.arange(len(codes))
        self.best = _Best(len(codes))
        self._d = 8 * codes.shape[1]
        self._bits = plan.bits
        self._radius = radius
        self._many = plan.passing * BLOCK > TOP
        self._sketches = np.ascontiguousarray(codes[:, : plan.bits // 8])
        self._closest = _Best(len(codes))  # by the sketch alone

    def candidates(self, block: Block, sketch: Codes, start: int) -> _Pairs:
        """Every row of a block that may be a query's match: its sketch lies within the limit."""
        limit = self._limits(self._bits)
        if self._many:
            return self._within(block, sketch, self.all, limit)
        dist, position = knn(self._sketches, sketch, min(TOP, block.rows))
        # If even the last of the nearest is within the limit, others may be.
        open_ = np.flatnonzero(dist.max(axis=1) <= limit) if block.rows > TOP else self.all[:0]
        if block.gone is not None:
            dist = np.where(block.gone[position], FAR, dist)
        first = dist.argmin(axis=1)
        self._closest.offer(self.all, dist[self.all, first], position[self.all, first] + start)
        near = dist <= limit[:, None]
        near[open_] = False
        query, column = np.nonzero(near)
        matches = query, position[query, column], dist[query, column]
        if not len(open_):
            return matches
        more = self._within(block, sketch, open_, limit)
        query, positions, dist = (np.concatenate([matches[i], more[i]]) for i in range(3))
        return query, positions, dist

    def verify(self, block: Block, start: int, pairs: _Pairs) -> None:
        """Compare candidates on all bits; first the closest of each query, after which most others cannot win."""
        query, position, dist = pairs
        if not len(query):
            return
        lead = _Best(len(self.codes))
        lead.offer(query, dist, position)
        leading = np.flatnonzero(lead.place >= 0)
        self._offer(block, start, leading, lead.place[leading])

        keep = (dist <= self._limits(self._bits)[query]) & (position != lead.place[query])
        query, position, dist = query[keep], position[keep], dist[keep]
        wider = self._bits + self._bits // 16 * 8
        if wider < self._d and len(query):
            # Half as many bits again, read for these rows alone, leave few of them. Done however few there are: which
            # rows are compared must follow from the query alone, not from its batch.
            more = slice(self._bits // 8, wider // 8)
            dist = dist + between(self.codes[:, more], query, block.codes[:, more], position)
            keep = dist <= self._limits(wider)[query]
            query, position = query[keep], position[keep]
        self._offer(block, start, query, position)

    def look_at_closest(self, blocks: Sequence[Block], queries: Rows, k: int) -> None:
        """Compare these queries, for which no row was within the limit, with the row closest by the sketch."""
        if self._many:
            start = 0
            for block in blocks:
                sketch = block.sketch(self._bits, k)
                if sketch is not None:
                    dist, position = knn(self._sketches[queries], sketch, min(TOP, block.rows))
                    query, column = np.nonzero(
                        np.ones(position.shape, np.bool_) if block.gone is None else ~block.gone[position]
                    )
                    self._closest.offer(queries[query], dist[query, column], position[query, column] + start)
                start += block.rows
        start = 0
        for block in blocks:
            place = self._closest.place[queries] - start
            in_block = (place >= 0) & (place < block.rows)
            self._offer(block, start, queries[in_block], place[in_block])
            start += block.rows
        left = queries[self.best.place[queries] < 0]  # all that a sketch showed of them is gone
        start = 0
        for block in blocks if len(left) else ():
            dist, position = nearest_there(block, self.codes[left], 1)
            self.best.offer(left, dist[:, 0], position[:, 0] + start)
            start += block.rows

    def _limits(self, bits: int) -> NDArray[np.int64]:
        return limits_for(self._d, self._radius, bits, self.best.distance)

    def _within(self, block: Block, sketch: Codes, queries: Rows, limit: NDArray[np.int64]) -> _Pairs:
        query, position, dist = within(self._sketches[queries], sketch, int(limit[queries].max()))
        query = queries[query]
        keep = dist <= limit[query]
        if block.gone is not None:
            keep &= ~block.gone[position]
        return query[keep], position[keep], dist[keep]

    def _offer(self, block: Block, start: int, query: Rows, position: Rows) -> None:
        self.best.offer(query, between(self.codes, query, block.codes, position), position + start)


class _Best:
    """The nearest row of each query so far; the earliest of equals."""

    def __init__(self, queries: int) -> None:
        # Distance and place in one number, so that the least is the nearest and of equals the earliest.
        self._key = np.full(queries, _NOTHING)

    @property
    def distance(self) -> NDArray[np.int64]:
        """FAR where there is none yet."""
        return self._key >> _PLACE_BITS

    @property
    def place(self) -> Rows:
        """-1 where there is none yet."""
        return np.where(self._key == _NOTHING, -1, self._key & (1 << _PLACE_BITS) - 1)

    def offer(self, query: Rows, distance: Distances, place: Rows) -> None:
        """Pairs of a query and a row; a query may come several times. A distance of FAR stands for no row."""
        np.minimum.at(self._key, query, (distance.astype(np.int64) << _PLACE_BITS) + place)
