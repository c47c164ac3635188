"""Sketch, then verify: the same answer as a full scan for a fraction of its reading. `plan` tells why it holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from memoir_index.blocks import Block
from memoir_index.codes import Codes
from memoir_index.plan import limits_for
from memoir_index.scan import FAR, Distances, Rows, between, knn, nearest_there, within

TOP = 8
"""Rows of a block that a sketch search keeps for each query; most often they hold all that could match."""


def search_sketch(
    blocks: Sequence[Block], codes: Codes, bits: int, k: int, radius: int
) -> tuple[NDArray[np.int64], Rows]:
    """The nearest row of each query, uint8 [Q, d/8], where it differs in at most radius bits; the earliest of equals.

    Returns distances int64 [Q] and places int64 [Q], positions counted over all blocks. Where no row is that near,
    those of the nearest row that was looked at, at least one.
    """
    d = 8 * codes.shape[1]
    best = _Best(len(codes))
    starts = np.cumsum([0, *(block.rows for block in blocks)]).tolist()
    asked = np.ascontiguousarray(codes[:, : bits // 8])
    everyone = np.arange(len(codes))

    tops: dict[int, tuple[Codes, Distances, Rows, Distances]] = {}
    for number, block in enumerate(blocks):
        sketch = block.sketch(bits, k)
        if sketch is None:
            dist, at = nearest_there(block, codes, 1)
            best.offer(everyone, dist[:, 0], at[:, 0] + starts[number])
            continue
        dist, at = knn(asked, sketch, min(TOP, block.rows))
        farthest = dist.max(axis=1) if block.rows > TOP else np.full(len(codes), FAR)
        if block.gone is not None:
            dist = np.where(block.gone[at], FAR, dist)
        tops[number] = sketch, dist, at, farthest

    # The row nearest by its sketch, most often the match itself, tells how near another must be to matter.
    if tops:
        nearest = {number: dist.min(axis=1) for number, (_, dist, _, _) in tops.items()}
        home = np.array(list(nearest))[np.argmin(list(nearest.values()), axis=0)]
        for number in np.unique(home).tolist():
            _, dist, at, _ = tops[number]
            mine = np.flatnonzero((home == number) & (nearest[number] < FAR))
            at = at[mine, dist[mine].argmin(axis=1)]
            best.offer(mine, between(codes, mine, blocks[number].codes, at), at + starts[number])

    for number, (sketch, dist, at, farthest) in tops.items():
        block, limit = blocks[number], limits_for(d, radius, bits, best.distance)
        query, column = np.nonzero(dist <= limit[:, None])
        at = at[query, column]
        best.offer(query, between(codes, query, block.codes, at), at + starts[number])

        # Rows beyond the nearest TOP may be within the limit too: look at every one that is.
        limit = limits_for(d, radius, bits, best.distance)
        open_ = np.flatnonzero(farthest <= limit)
        if len(open_):
            query, at = _all_within(block, sketch, codes, asked, open_, limit, bits, radius, best.distance)
            best.offer(query, between(codes, query, block.codes, at), at + starts[number])
    return best.distance, best.place


def _all_within(
    block: Block,
    sketch: Codes,
    codes: Codes,
    asked: Codes,
    open_: Rows,
    limit: NDArray[np.int64],
    bits: int,
    radius: int,
    nearest: NDArray[np.int64],
) -> tuple[Rows, Rows]:
    """Query and position of each row whose sketch lies within the limit of one of the queries `open_`.

    A second sketch of half the bits, read for these rows alone, leaves few of them.
    """
    query, at, dist = within(asked[open_], sketch, int(limit[open_].max()))
    query = open_[query]
    keep = dist <= limit[query]
    if block.gone is not None:
        keep &= ~block.gone[at]
    query, at, dist = query[keep], at[keep], dist[keep]
    wider = bits + bits // 16 * 8
    d = 8 * codes.shape[1]
    if wider < d and len(query):
        more = slice(bits // 8, wider // 8)
        dist = dist + between(np.ascontiguousarray(codes[:, more]), query, block.codes[:, more], at)
        keep = dist <= limits_for(d, radius, wider, nearest)[query]
        query, at = query[keep], at[keep]
    return query, at


class _Best:
    """The nearest row of each query so far; the earliest of equals."""

    def __init__(self, queries: int) -> None:
        self.distance = np.full(queries, FAR, np.int64)
        self.place = np.full(queries, -1, np.int64)

    def offer(self, query: Rows, distance: Distances, place: Rows) -> None:
        """Pairs of a query and a row; a query may come several times."""
        if not len(query):
            return
        order = np.lexsort((place, distance, query))
        query, distance, place = query[order], distance[order].astype(np.int64), place[order]
        head = np.append(True, query[1:] != query[:-1])
        query, distance, place = query[head], distance[head], place[head]
        nearer = (distance < self.distance[query]) | ((distance == self.distance[query]) & (place < self.place[query]))
        query = query[nearer]
        self.distance[query], self.place[query] = distance[nearer], place[nearer]
