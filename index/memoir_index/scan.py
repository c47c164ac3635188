"""FAISS' Hamming kernels on arrays of ours, copied into no FAISS index: rows may lie in a memory-mapped file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import faiss
import numpy as np
from numpy.typing import NDArray

from memoir_index.blocks import MOST_GONE, Block
from memoir_index.codes import Codes, popcount

Distances = NDArray[np.int32]
Rows = NDArray[np.int64]

# Not among the functions that FAISS declares for type checkers.
_hammings: Any = vars(faiss)["hammings"]

FAR = np.iinfo(np.int32).max
"""The distance of a row that is not there."""

# FAISS shares a search out by query: one query cannot use a second thread at all, and a few can save less
# than they lose on a busy host, where every search waits for its slowest thread.
SMALL_BATCH = 4

# A pass over more rows than the cache holds fetches them again for every query.
PASS_BYTES = 4 << 20
# Of a cache that one core has to itself.
CORE_BYTES = 512 << 10

# Rows that are looked at beyond those wanted, in a block of which some are gone.
SPARE = 8

T = TypeVar("T")


def knn(queries: Codes, rows: Codes, n: int) -> tuple[Distances, Rows]:
    """Hamming distances int32 [Q, n] and positions int64 [Q, n] of the n <= N nearest of rows [N, W], nearest first.

    FAISS walks the rows in order and replaces a kept row only by a strictly nearer one, so of equal rows the earliest
    are kept; their order within the answer is not promised.
    """
    step = len(rows) if len(queries) == 1 else max(n, PASS_BYTES // rows.shape[1])
    if step >= len(rows):
        return faiss.knn_hamming(queries, rows, n)
    return _in_passes(queries, n, ((start, rows[start : start + step]) for start in range(0, len(rows), step)))


def knn_of(queries: Codes, rows: Codes, positions: Rows, n: int) -> tuple[Distances, Rows]:
    """`knn` among the rows at some ascending positions, int64 [P], n <= P; a few megabytes of them are copied at a
    time."""
    step = max(n, PASS_BYTES // rows.shape[1])
    parts = ((start, rows[positions[start : start + step]]) for start in range(0, len(positions), step))
    distances, nearest = _in_passes(queries, n, parts)
    return distances, positions[nearest]


def _in_passes(queries: Codes, n: int, parts: Iterable[tuple[int, Codes]]) -> tuple[Distances, Rows]:
    """The n nearest rows of all parts, each of which comes with the position of its first row."""
    passes = []
    for start, part in parts:
        distances, positions = faiss.knn_hamming(queries, part, min(n, len(part)))
        passes.append((distances, positions + start))
    distances, positions = (np.concatenate(column, axis=1) for column in zip(*passes, strict=True))
    return first(distances, positions, n)


def first(distances: Distances, positions: Rows, n: int) -> tuple[Distances, Rows]:
    """The n nearest of every line of distances and positions, both [Q, M]: nearest first, of equals the earlier."""
    best = np.lexsort((positions, distances), axis=1)[:, :n]
    return np.take_along_axis(distances, best, 1), np.take_along_axis(positions, best, 1)


def nearest_there(block: Block, queries: Codes, n: int) -> tuple[Distances, Rows]:
    """`knn` among the rows of a block that are there, 1 <= n <= alive."""
    if block.gone is None:
        return knn(queries, block.codes, n)
    gone = block.rows - block.alive
    if gone > block.rows * MOST_GONE:
        return knn_of(queries, block.codes, block.positions, n)
    # Of the few rows that are gone most often fewer than these are among the nearest.
    spare = min(gone, SPARE)
    distances, positions = knn(queries, block.codes, n + spare)
    distances, positions = first(np.where(block.gone[positions], FAR, distances), positions, n)
    lacking = np.flatnonzero(distances[:, -1] == FAR)
    if len(lacking):
        distances[lacking], positions[lacking] = knn_of(queries[lacking], block.codes, block.positions, n)
    return distances, positions


def distances(queries: Codes, rows: Codes) -> Distances:
    """Hamming distance of every query to every row, int32 [Q, N]; queries [Q, W], rows [N, W], W a multiple of 8.

    On one thread. Where a processor counts the ones of 64 bytes at once, it takes half of the time of a search, which
    adds them up after every 64 bytes.
    """
    out = np.empty((len(queries), len(rows)), np.int32)
    _hammings(
        faiss.swig_ptr(queries), faiss.swig_ptr(rows), len(queries), len(rows), rows.shape[1], faiss.swig_ptr(out)
    )
    return out


def between(queries: Codes, query: Rows, rows: Codes, position: Rows) -> Distances:
    """Hamming distance of each pair of a query and a row, int32 [P]; queries [Q, W], rows [N, W]."""
    out = np.empty(len(query), np.int32)
    step = max(1, PASS_BYTES // max(1, rows.shape[1]))
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        out[part] = popcount(queries[query[part]] ^ rows[position[part]])
    return out


@contextmanager
def threads(queries: int) -> Iterator[Callable[[Callable[[int], T], Iterable[int]], Iterable[T]]]:
    """A `map` that shares its calls out among as many threads as OpenMP has; of a small batch it uses one."""
    count = faiss.omp_get_max_threads() if queries > SMALL_BATCH else 1
    if count == 1:
        yield map
        return
    with ThreadPoolExecutor(count) as pool:
        yield pool.map


@contextmanager
def threads_for(queries: int) -> Iterator[None]:
    """Run a small batch on one OpenMP thread.

    OpenMP keeps the thread count per calling thread, so this touches no other thread's searches.
    """
    if queries > SMALL_BATCH:
        yield
        return
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
