"""Exact nearest-mask lookup: the stored code of largest overlap, over FAISS' flat binary index.

Readers never lock. They work on one immutable snapshot; a writer builds the next one aside and swaps it in
with a single assignment, because FAISS may crash when an index is extended while it is searched.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from operator import index as as_int
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import ArrayLike, NDArray

from memoir_index.codes import Codes, check_codes, check_shape, hamming_radius, overlap_from_hamming
from memoir_index.errors import CodeError

Ids = NDArray[np.int64]

# FAISS shares a search out by query: one query cannot use a second thread at all, and a few can save less
# than they lose on a busy host, where every search waits for its slowest thread.
SMALL_BATCH = 4


class Hits(NamedTuple):
    """The best match of each of Q queries.

    ids: int64 [Q], the edit id, or -1 where no stored code reaches tau.
    overlaps: float64 [Q], overlap/k of the best stored code even where it misses tau; 0.0 in an empty index.
    rows: int64 [Q], the row of the matching code, or -1. Rows are those of the index at the time of the
    search: a removal moves later rows down.
    """

    ids: Ids
    overlaps: NDArray[np.float64]
    rows: Ids


class HammingIndex:
    """Packed masks of d bits with k ones, each under an edit id; an id may own several rows.

    Any number of threads may read while others write; each call sees the index wholly before or wholly after
    a write. Memory is d/8 + 8 bytes a row, and twice that while a write builds the next snapshot.
    Raises CodeError unless d is a positive multiple of 8 and 1 <= k <= d.
    """

    def __init__(self, d: int, k: int) -> None:
        self.d, self.k = check_shape(d, k)
        self._write = threading.Lock()
        self._now = _freeze(_allocate(self.d, 0), np.empty(0, dtype=np.int64))

    @classmethod
    def from_codes(cls, d: int, k: int, ids: ArrayLike, codes: Codes) -> HammingIndex:
        """An index of the given rows; arguments and errors are those of the constructor and of `add`."""
        index = cls(d, k)
        index.add(ids, codes)
        return index

    def __len__(self) -> int:
        """Number of stored rows."""
        return len(self._now.ids)

    @property
    def edits(self) -> int:
        """Number of distinct edit ids."""
        return self._now.edits

    @property
    def ids(self) -> Ids:
        """Edit id of every row, int64 [N], read-only; it stays as it is when the index changes."""
        return self._now.ids

    @property
    def codes(self) -> Codes:
        """All stored codes, uint8 [N, d/8]: a read-only view of FAISS' own memory, which it keeps alive."""
        return self._now.codes

    def code(self, row: int) -> Codes:
        """The code stored at a row, uint8 [d/8], read-only.

        Raises CodeError unless 0 <= row < len(self).
        """
        codes = self._now.codes
        if not 0 <= row < len(codes):
            raise CodeError(f"row {row} is not stored: the index has rows 0..{len(codes) - 1}")
        return codes[row]

    def add(self, ids: ArrayLike, codes: Codes) -> None:
        """Append codes, uint8 [N, d/8], under edit ids, integers >= 0 [N]; an id may be stored already.

        Raises CodeError, before anything changes, for ids or codes of the wrong dtype, shape or length, a
        negative id, or a code without exactly k ones.
        """
        new_ids = _check_ids(ids)
        codes = check_codes(codes, self.d, self.k)
        if len(new_ids) != len(codes):
            raise CodeError(f"{len(new_ids)} ids for {len(codes)} codes: pass one edit id per code")
        if not len(new_ids):
            return
        with self._write:
            old = self._now
            index = _allocate(self.d, len(old.ids) + len(new_ids))
            room = _writable(index)
            room[: len(old.ids)] = old.codes
            room[len(old.ids) :] = codes
            self._now = _freeze(index, np.concatenate([old.ids, new_ids]))

    def remove(self, ids: ArrayLike) -> int:
        """Drop every row of the given edit ids, integers >= 0 [N]; return how many rows went.

        Ids that are not stored are ignored. One call rewrites the index once: pass many ids together.
        Raises CodeError for ids of the wrong dtype or shape, or a negative id.
        """
        gone = _check_ids(ids)
        with self._write:
            old = self._now
            keep = np.flatnonzero(~np.isin(old.ids, gone))
            removed = len(old.ids) - len(keep)
            if removed:
                index = _allocate(self.d, len(keep))
                # mode="raise" would go through a second buffer of the size of the result
                np.take(old.codes, keep, axis=0, out=_writable(index), mode="clip")
                self._now = _freeze(index, old.ids[keep])
        return removed

    def search(self, codes: Codes, tau: float) -> Hits:
        """Best match with overlap/k >= tau for each query, uint8 [Q, d/8]; among equals the earliest stored.

        How tau is rounded to whole bits is told under `hamming_radius`.
        Raises CodeError for tau outside (0, 1] and for queries that `check_codes` refuses.
        """
        radius = hamming_radius(tau, self.k)
        codes = check_codes(codes, self.d, self.k)
        now = self._now
        if not len(now.ids) or not len(codes):
            none = np.full(len(codes), -1, dtype=np.int64)
            return Hits(none, np.zeros(len(codes)), none.copy())
        distances, rows = now.scan(codes, 1)
        dist, row = distances[:, 0], rows[:, 0]
        match = dist <= radius
        return Hits(
            ids=np.where(match, now.ids[row], -1),
            overlaps=overlap_from_hamming(dist, self.k),
            rows=np.where(match, row, -1),
        )

    def nearest(self, codes: Codes, n: int) -> tuple[Ids, NDArray[np.float64]]:
        """The n distinct edits of largest overlap for each query, uint8 [Q, d/8], best first.

        An edit counts with its best row; among equals the edit of the earlier row comes first. Returns ids
        int64 [Q, n] and overlaps float64 [Q, n], filled up with -1 and 0.0 where fewer edits are stored.
        Raises CodeError for n < 1 and for queries that `check_codes` refuses.
        """
        n = as_int(n)
        if n < 1:
            raise CodeError(f"n={n} asks for no edits: n must be 1 or more")
        codes = check_codes(codes, self.d, self.k)
        ids = np.full((len(codes), n), -1, dtype=np.int64)
        overlaps = np.zeros((len(codes), n))
        now = self._now
        if not len(now.ids) or not len(codes):
            return ids, overlaps
        # n - 1 edits own at most (n - 1) * most_rows rows, so one row more always reaches an n-th edit
        distances, rows = now.scan(codes, min(len(now.ids), (n - 1) * now.most_rows + 1))
        for query, (dist, row) in enumerate(zip(distances, rows, strict=True)):
            first = np.sort(np.unique(now.ids[row], return_index=True)[1])[:n]
            ids[query, : len(first)] = now.ids[row[first]]
            overlaps[query, : len(first)] = overlap_from_hamming(dist[first], self.k)
        return ids, overlaps


@dataclass(frozen=True, eq=False)
class _Snapshot:
    """What one reader works on; no field is ever changed."""

    index: Any  # faiss.IndexBinaryFlat
    ids: Ids
    codes: Codes

    @cached_property
    def _rows_per_edit(self) -> Ids:
        return np.unique(self.ids, return_counts=True)[1].astype(np.int64)

    @property
    def edits(self) -> int:
        return len(self._rows_per_edit)

    @property
    def most_rows(self) -> int:
        return int(self._rows_per_edit.max())

    def scan(self, codes: Codes, n: int) -> tuple[NDArray[np.int32], Ids]:
        """Hamming distances int32 [Q, n] and rows int64 [Q, n] of the n <= N nearest rows, earlier row first.

        FAISS walks the rows in order and replaces a kept row only by a strictly nearer one, so of equal rows
        the earliest are kept; their order within the answer is not promised, hence the sort.
        """
        with _threads_for(len(codes)):
            distances, rows = self.index.search(codes, n)
        if n > 1:
            order = np.lexsort((rows, distances), axis=1)
            distances, rows = np.take_along_axis(distances, order, 1), np.take_along_axis(rows, order, 1)
        return distances, rows


class _Memory:
    """Lends FAISS' storage to numpy and keeps the index alive for as long as an array looks at it."""

    def __init__(self, index: Any) -> None:
        self.index = index
        room = _writable(index)
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": room.shape,
            "data": (room.ctypes.data, True),  # True: read-only
        }


def _allocate(d: int, rows: int) -> Any:
    """A flat index of the given number of unwritten rows.

    `add` on top of older rows would copy them twice and reserve up to twice the memory.
    """
    index: Any = faiss.IndexBinaryFlat(d)
    index.xb.resize(rows * (d // 8))
    index.ntotal = rows
    return index


def _writable(index: Any) -> Codes:
    """The storage of a flat index, uint8 [N, d/8], valid only while the caller holds the index."""
    if not index.ntotal:
        return np.empty((0, index.code_size), dtype=np.uint8)
    flat = faiss.rev_swig_ptr(index.xb.data(), index.ntotal * index.code_size)
    return flat.reshape(index.ntotal, index.code_size)


def _freeze(index: Any, ids: Ids) -> _Snapshot:
    ids.flags.writeable = False
    return _Snapshot(index, ids, np.asarray(_Memory(index)))


@contextmanager
def _threads_for(queries: int) -> Iterator[None]:
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


def _check_ids(ids: ArrayLike) -> Ids:
    given = np.asarray(ids)
    if given.ndim != 1:
        raise CodeError(f"ids have shape {given.shape}, not [N]: pass one edit id per code")
    if given.size and given.dtype.kind not in "iu":
        raise CodeError(f"ids have dtype {given.dtype}, not int64: pass whole numbers")
    out_of_range = np.flatnonzero((given < 0) | (given > np.iinfo(np.int64).max))
    if out_of_range.size:
        worst = given[out_of_range[0]]
        raise CodeError(f"edit id {worst} at position {out_of_range[0]} is refused: ids lie in 0..2**63-1")
    return given.astype(np.int64)
