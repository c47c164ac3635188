"""Sketch, then verify: the same answer as a full scan for a fraction of its reading. `plan` tells why it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memoir_index.blocks import Block
from memoir_index.codes import Codes
from memoir_index.plan import limits_for, sketch_bytes
from memoir_index.scan import CORE_BYTES, FAR, Distances, Rows, between, distances, nearest_there, threads

MOST_NEAR = 1 / 16
"""Where a larger share of a block passes the sketch, all of it is compared: to fetch single rows takes as long."""

FEW_LEFT = 1 / 4
"""Of a block of which less is left the sketches of those rows alone are read."""

GROUP = 64
"""Queries that pass over the blocks at a time, which bounds the memory for what passes the sketch."""

_PLACE_BITS = 32
_NOTHING = np.int64(FAR) << _PLACE_BITS

Share = Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]]

_Pairs = tuple[Rows, Rows, Distances]
"""Numbers of queries, positions of rows in a block, and their distances in the sketch; all [P]."""


class Neighbours(NamedTuple):
    """Pairs of a query and a row: numbers of queries, places, and distances on all bits; int64 [P].

    Ordered by query; of each the nearest first, and of equals the earliest.
    """

    query: Rows
    place: Rows
    distance: NDArray[np.int64]


class Nearest(NamedTuple):
    """What a search has for each of Q queries.

    distance, place: of the nearest row, int64 [Q].
    near: the rows within the radius, where several are wanted.
    """

    distance: NDArray[np.int64]
    place: Rows
    near: Neighbours


def search_blocks(blocks: Sequence[Block], codes: Codes, bits: int, k: int, radius: int, rows: int = 1) -> Nearest:
    """The nearest row of each query, uint8 [Q, d/8], where it differs in at most radius bits; the earliest of equals.

    bits: of the sketch; 0 compares every row on all bits.
    rows: how many of the nearest rows within the radius are wanted of each query.

    Places are positions counted over all blocks. Where no row is that near, distance and place are those of the
    nearest row that was looked at, at least one. `near` has as many rows of each query as are wanted, or all that are
    within the radius; none at all where one is wanted.
    """
    parts = []
    with threads(len(codes)) as share:
        for first in range(0, len(codes), GROUP):
            search = _SketchSearch(codes[first : first + GROUP], bits, radius, rows)
            start = 0
            for block in blocks:
                sketch = block.sketch(bits, k) if bits else None
                if sketch is None:
                    search.scan(block, start, search.all)
                else:
                    search.verify(block, start, search.candidates(block, sketch, start, share))
                start += block.rows
            search.look_at_closest(blocks)
            query, place, dist = search.near.pairs
            parts.append((search.best.distance, search.best.place, query + first, place, dist))
    nearest, place, *near = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Nearest(nearest, place, Neighbours(*near))


class _SketchSearch:
    """One group of queries on its way through the blocks."""

    def __init__(self, codes: Codes, bits: int, radius: int, rows: int) -> None:
        self.codes = codes
        self.all = np.arange(len(codes))
        self.best = _Best(len(codes))
        self.near = _Near(len(codes), radius, rows)
        self._d = 8 * codes.shape[1]
        self._bits = bits
        self._radius = radius
        self._sketches = np.zeros((len(codes), sketch_bytes(bits)), np.uint8)
        self._sketches[:, : bits // 8] = codes[:, : bits // 8]
        self._closest = _Best(len(codes))  # by the sketch alone
        self._rows = rows

    def scan(self, block: Block, start: int, queries: Rows) -> None:
        """Compare all rows of a block with some of the queries."""
        dist, position = nearest_there(block, self.codes[queries], min(self._rows, block.alive))
        self._take(np.repeat(queries, dist.shape[1]), dist.ravel(), position.ravel() + start)

    def candidates(self, block: Block, sketch: Codes, start: int, share: Share) -> _Pairs:
        """Every row of a block that may be a query's match: its sketch lies within the limit."""
        limit = self._limits(self._bits).astype(np.int32)  # as distances are: else all of them are converted
        # So many rows that they and the distances to them stay in the cache while every query passes over them.
        step = CORE_BYTES // (sketch.shape[1] + 4 * len(limit)) + 1 if len(limit) > 1 else block.rows
        few = block.alive < FEW_LEFT * block.rows
        rows = block.positions if few else np.arange(block.rows)

        def look(first: int) -> tuple[NDArray[np.int64], _Pairs]:
            part = slice(first, first + step)
            dist = distances(self._sketches, sketch[rows[part]] if few else sketch[part])
            if block.gone is not None and not few:
                dist[:, block.gone[part]] = FAR
            closest = dist.argmin(axis=1)
            least = dist[self.all, closest]
            some = np.flatnonzero(least <= limit)
            near = dist if len(some) == len(limit) else dist[some]
            flat = np.flatnonzero(near <= limit[some, None])
            counts = np.diff(np.searchsorted(flat, np.arange(len(some) + 1) * dist.shape[1]))
            position = flat - np.repeat(np.arange(len(some)) * dist.shape[1], counts)
            pairs = np.repeat(some, counts), rows[position + first], near.ravel()[flat]
            return _keys(least, rows[closest + first] + start), pairs

        pairs = []
        for closest, near in share(look, range(0, len(rows), step)):
            self._closest.offer_all(closest)
            pairs.append(near)
        query, position, dist = (np.concatenate(column) for column in zip(*pairs, strict=True))
        return query, position, dist

    def verify(self, block: Block, start: int, pairs: _Pairs) -> None:
        """Compare candidates on all bits; first the closest of each query, after which most others cannot win.

        Whether a block is scanned for a query must follow from the query alone, too, not from its batch.
        """
        query, position, dist = pairs
        if not len(query):
            return
        lead = _Best(len(self.codes))
        lead.offer(query, dist, position)
        leading = np.flatnonzero(lead.place >= 0)
        self._offer(block, start, leading, lead.place[leading])

        keep = (dist <= self._limits(self._bits)[query]) & (position != lead.place[query])
        many = np.bincount(query[keep], minlength=len(self.codes)) > MOST_NEAR * block.alive
        if many.any():
            self.scan(block, start, np.flatnonzero(many))
            keep &= ~many[query]
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

    def look_at_closest(self, blocks: Sequence[Block]) -> None:
        """Compare each query for which no row was within the limit with the row closest by the sketch."""
        alone = np.flatnonzero(self.best.place < 0)
        start = 0
        for block in blocks if len(alone) else ():
            place = self._closest.place[alone] - start
            in_block = (place >= 0) & (place < block.rows)
            self._offer(block, start, alone[in_block], place[in_block])
            start += block.rows

    def _limits(self, bits: int) -> NDArray[np.int64]:
        # Where more than the nearest row is wanted, only as many near ones rule out another.
        far = self.best.distance if self._rows == 1 else self.near.last
        return limits_for(self._d, self._radius, bits, far)

    def _offer(self, block: Block, start: int, query: Rows, position: Rows) -> None:
        self._take(query, between(self.codes, query, block.codes, position), position + start)

    def _take(self, query: Rows, dist: Distances, place: Rows) -> None:
        self.best.offer(query, dist, place)
        if self._rows > 1:
            self.near.offer(query, dist, place)


class _Near:
    """The nearest rows of each query within the radius so far, as many as are wanted."""

    def __init__(self, queries: int, radius: int, rows: int) -> None:
        self.last = np.full(queries, np.int64(FAR))
        """The distance of the last row of each query that has as many as are wanted; else FAR. int64 [Q]."""
        self._radius = radius
        self._rows = rows
        self._query = np.empty(0, np.int64)
        self._key = np.empty(0, np.int64)

    @property
    def pairs(self) -> Neighbours:
        return Neighbours(self._query, self._key & (1 << _PLACE_BITS) - 1, self._key >> _PLACE_BITS)

    def offer(self, query: Rows, distance: Distances, place: Rows) -> None:
        """Pairs of a query and a row; a pair may come twice."""
        near = np.flatnonzero(distance <= self._radius)
        if not len(near):
            return
        query = np.concatenate([self._query, query[near]])
        key = np.concatenate([self._key, _keys(distance[near], place[near])])
        order = np.lexsort((key, query))
        query, key = query[order], key[order]
        again = (query[1:] == query[:-1]) & (key[1:] == key[:-1])  # the closest row of a block that is scanned
        query, key = query[np.r_[True, ~again]], key[np.r_[True, ~again]]
        first = np.searchsorted(query, np.arange(len(self.last) + 1))
        rank = np.arange(len(query)) - first[query]
        full = np.flatnonzero(np.diff(first) >= self._rows)
        self.last[full] = key[first[full] + self._rows - 1] >> _PLACE_BITS
        kept = rank < self._rows
        self._query, self._key = query[kept], key[kept]


class _Best:
    """The nearest row of each query so far; the earliest of equals."""

    def __init__(self, queries: int) -> None:
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
        np.minimum.at(self._key, query, _keys(distance, place))

    def offer_all(self, keys: NDArray[np.int64]) -> None:
        """A row for every query; see `_keys`."""
        np.minimum(self._key, keys, out=self._key)


def _keys(distance: Distances, place: Rows) -> NDArray[np.int64]:
    """Distance and place in one number, so that the least is the nearest and of equals the earliest."""
    return (distance.astype(np.int64) << _PLACE_BITS) + place
