"""Exact nearest-mask lookup: the stored code of largest overlap, by FAISS' Hamming kernels.

Readers never wait for a writer. They work on one immutable snapshot, which a writer swaps for the next with a single
assignment; FAISS itself may crash when an index is extended while it is searched.
"""

from __future__ import annotations

import threading
from operator import index as as_int
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memoir_index import blocks as storage
from memoir_index.blocks import Ids
from memoir_index.codes import (
    Codes,
    check_codes,
    check_layout,
    check_shape,
    hamming_radius,
    overlap_from_hamming,
    popcount,
)
from memoir_index.errors import CodeError
from memoir_index.plan import Plan, check_bits, choose_plan, sketch_bits
from memoir_index.scan import Rows, threads_for
from memoir_index.sketch import Neighbours, search_blocks
from memoir_index.snapshot import Snapshot

ROWS_PER_EDIT = 4
"""Rows that are looked for at first for every edit that is wanted; more for those queries alone that need more."""


class Hits(NamedTuple):
    """The best match of each of Q queries.

    ids: int64 [Q], the edit id, or -1 where no stored code reaches tau.
    overlaps: float64 [Q], overlap/k of the match. Where nothing matches: of the nearest row that was looked at, which
        is the nearest of all after a full scan, and may be a little less than that after a sketch; 0.0 in an empty
        index.
    rows: int64 [Q], the row of the matching code, or -1. Rows are those of the index at the time of the search: a
        removal moves later rows down.
    """

    ids: Ids
    overlaps: NDArray[np.float64]
    rows: Ids


class HammingIndex:
    """Packed masks of d bits with k ones, each under an edit id; an id may have several rows.

    Any number of threads may read while others write; each call sees the index wholly before or wholly after
    a write. Memory is d/8 + 8 bytes per row, and sketch/8 more once a search used the sketch.

    >>> import numpy as np
    >>> from memoir_index import HammingIndex, pack
    >>> masks = np.zeros((2, 16), dtype=bool)
    >>> masks[0, :4] = masks[1, 4:8] = True
    >>> index = HammingIndex(d=16, k=4)
    >>> index.add([7, 9], pack(masks))
    >>> index.search(pack(masks[:1]), tau=0.5).ids
    array([7])
    """

    def __init__(self, d: int, k: int, *, sketch: int | None = None) -> None:
        """Make an empty index.

        d: bits of a mask, a multiple of 8.
        k: ones of every mask, 1 to d.
        sketch: bits of the sketch that searches at a high tau try first, a multiple of 8 below d, or 0 for none
            (default: by d, see `memoir_index.plan`). It presumes masks whose positions were permuted at random, as
            TopHash does: then a search overlooks a match with a probability of at most 1e-12. Where stored rows
            contradict that, they are scanned in full.

        Raises CodeError for any other d, k or sketch.
        """
        self.d, self.k = check_shape(d, k)
        self.sketch = sketch_bits(self.d) if sketch is None else check_bits(as_int(sketch), self.d)
        self._write = threading.Lock()
        self._now = Snapshot(())
        self._recheck = False

    @classmethod
    def from_codes(
        cls,
        d: int,
        k: int,
        ids: ArrayLike,
        codes: Codes,
        *,
        sketch: int | None = None,
        copy: bool = True,
        checked: bool = False,
    ) -> HammingIndex:
        """An index that holds rows from the start.

        d, k, sketch: as for the constructor.
        ids: integers >= 0 [N], the edit of each row.
        codes: uint8 [N, d/8].
        copy: False looks at `codes` where they are, C-contiguous, for instance a read-only `numpy.memmap`, and keeps
            them alive. Nobody may change them afterwards. Later additions go to memory of the index itself.
        checked: True does not count the ones of every row now, which reads all of them: the caller vouches that each
            has k. A row that a search returns is then counted at that time, and CodeError names it if it is damaged.

        Raises CodeError as the constructor and `add` do, and for codes that cannot be used in place.
        """
        index = cls(d, k, sketch=sketch)
        new_ids = _check_ids(ids)
        if not copy and not np.asarray(codes).flags.c_contiguous:
            raise CodeError("codes are not C-contiguous, so they cannot be used in place: pass copy=True")
        codes = check_layout(codes, index.d)
        if checked:
            index._recheck = True
        else:
            for start in range(0, len(codes), storage.BLOCK):
                check_codes(codes[start : start + storage.BLOCK], index.d, index.k, first_row=start)
        _check_lengths(new_ids, codes)
        index._now = Snapshot(storage.append((), new_ids, codes) if copy else storage.lend(new_ids, codes))
        return index

    def __len__(self) -> int:
        """Number of stored rows."""
        return self._now.alive

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
        """All stored codes, uint8 [N, d/8], read-only: a view of up to 16384 rows, a copy of more."""
        now = self._now
        if len(now.blocks) == 1 and now.blocks[0].gone is None:
            return now.blocks[0].codes
        parts = [block.codes[block.positions] for block in now.blocks]
        copy = np.concatenate(parts) if parts else np.empty((0, self.d // 8), np.uint8)
        copy.flags.writeable = False
        return copy

    def code(self, row: int) -> Codes:
        """The code stored at a row, uint8 [d/8], read-only.

        row: 0 to len(self) - 1.

        Raises CodeError for any other row.
        """
        now, row = self._now, as_int(row)
        if not 0 <= row < now.alive:
            raise _no_row(row, now)
        return now.code(row)

    def take(self, rows: ArrayLike) -> Codes:
        """The codes stored at many rows, uint8 [N, d/8], a copy.

        rows: integers [N].

        Raises CodeError for rows of the wrong dtype or shape, for a number that is no row, and for a row that is
        damaged where codes were taken unchecked.
        """
        now = self._now
        positions = _check_rows(rows, now)
        if not positions.size:
            return np.empty((0, self.d // 8), np.uint8)
        codes = now.take(positions)
        if self._recheck:
            self._check_taken(codes, positions)
        return codes

    def only(self, rows: ArrayLike) -> HammingIndex:
        """An index of some rows, in the same memory: row i of it is what rows[i] is here now.

        rows: integers [N], ascending, none twice.

        What is written to one of the two afterwards, the other does not have. Raises CodeError for rows that `take`
        refuses or that do not ascend.
        """
        with self._write:
            now = self._now
            numbers = _check_rows(rows, now)
            if (np.diff(numbers) <= 0).any():
                raise CodeError("rows do not ascend: pass them in order, each once")
            index = HammingIndex(self.d, self.k, sketch=self.sketch)
            index._write, index._recheck = self._write, self._recheck  # they may append to the same block
            index._now = Snapshot(storage.only(now.blocks, numbers))
        return index

    def plan(self, tau: float) -> Plan:
        """How `search` would look for matches now.

        tau: the least overlap that matches, in (0, 1].

        Raises CodeError for any other tau.
        """
        return choose_plan(len(self), self.d, self.k, tau, self.sketch)

    def prepare(self, tau: float) -> None:
        """Make now what the first search would make: the sketch, which reads every row once.

        tau: the least overlap that matches, in (0, 1].

        Raises CodeError for any other tau.
        """
        bits = self.plan(tau).bits
        if bits:
            for block in self._now.blocks:
                block.sketch(bits, self.k)

    def add(self, ids: ArrayLike, codes: Codes) -> None:
        """Append rows.

        ids: integers >= 0 [N], the edit of each row; an id may be stored already.
        codes: uint8 [N, d/8].

        Raises CodeError, before anything changes, for ids or codes of the wrong dtype, shape or length, a
        negative id, or a code without exactly k ones.
        """
        new_ids, codes = _check_ids(ids), check_codes(codes, self.d, self.k)
        _check_lengths(new_ids, codes)
        with self._write:
            self._now = Snapshot(storage.append(self._now.blocks, new_ids, codes))

    def remove(self, ids: ArrayLike) -> int:
        """Drop every row of some edits. Returns how many rows went.

        ids: integers >= 0 [N]; those that are not stored are ignored.

        Raises CodeError for ids of the wrong dtype or shape, or a negative id.
        """
        gone = _check_ids(ids)
        with self._write:
            left = Snapshot(storage.remove(self._now.blocks, gone) if len(gone) else self._now.blocks)
            removed = self._now.alive - left.alive
            if removed:
                self._now = left
        return removed

    def search(self, codes: Codes, tau: float, *, exact: bool = False) -> Hits:
        """The stored row of largest overlap for each query, if that is at least tau; among equals the earliest stored.

        codes: uint8 [Q, d/8], the queries.
        tau: the least overlap/k that matches, in (0, 1]; `hamming_radius` says how it is rounded to whole bits.
        exact: scan every row whatever `plan` says. The overlaps of queries without a match are then those of the
            nearest row.

        Raises CodeError for tau outside (0, 1] and for queries that `check_codes` refuses.
        """
        return self._search(self._now, codes, tau, 1, exact)[0]

    def search_edits(self, codes: Codes, tau: float, n: int, *, exact: bool = False) -> tuple[Hits, list[list[int]]]:
        """What `search` returns, and of each query the n nearest distinct edits that reach tau, best first.

        An edit counts with its best row; among equals the edit of the earlier row comes first. So the first of them is
        the match. Fewer where fewer reach tau.

        codes, tau, exact: as in `search`, and so are the errors.
        n: how many edits, 1 or more.

        Raises CodeError for n < 1, too.
        """
        n, now = _check_n(n), self._now
        rows = _rows_for(n)
        hits, near = self._search(now, codes, tau, rows, exact)
        if n == 1:
            return hits, [[edit] if edit >= 0 else [] for edit in hits.ids.tolist()]
        codes = np.asarray(codes)
        edits: list[list[int]] = [[] for _ in range(len(codes))]
        open_queries = np.arange(len(codes))
        while True:
            owners = now.resolve(near.place)[1]
            ends = np.searchsorted(near.query, np.arange(len(open_queries) + 1))
            lacking = []
            for query, first, end in zip(open_queries.tolist(), ends.tolist(), ends[1:].tolist(), strict=False):
                edits[query] = owners[first:end][_first_distinct(owners[first:end], n)].tolist()
                if len(edits[query]) < n and end - first == rows:
                    lacking.append(query)
            if not lacking:
                return hits, edits
            open_queries, rows = np.array(lacking), rows * 2
            near = self._search(now, codes[open_queries], tau, rows, exact)[1]

    def _search(self, now: Snapshot, codes: Codes, tau: float, rows: int, exact: bool) -> tuple[Hits, Neighbours]:
        """The matches, and of each query so many of the nearest rows that reach tau, if that is more than one."""
        radius = hamming_radius(tau, self.k)
        codes = check_codes(codes, self.d, self.k)
        if not now.alive or not len(codes):
            none = np.full(len(codes), -1, dtype=np.int64)
            return Hits(none, np.zeros(len(codes)), none.copy()), Neighbours(*np.empty((3, 0), np.int64))
        plan = choose_plan(now.alive, self.d, self.k, tau, self.sketch)
        with threads_for(len(codes)):
            best = search_blocks(now.blocks, codes, 0 if exact else plan.bits, self.k, radius, rows)
        match = best.distance <= radius
        numbers, ids = now.resolve(np.where(match, best.place, -1))
        if self._recheck:
            self._check_returned(now, numbers)
        return Hits(ids=ids, overlaps=overlap_from_hamming(best.distance, self.k), rows=numbers), best.near

    def nearest(self, codes: Codes, n: int) -> tuple[Ids, NDArray[np.float64]]:
        """The n distinct edits of largest overlap for each query, best first; always a full scan.

        An edit counts with its best row; among equals the edit of the earlier row comes first. Returns ids
        int64 [Q, n] and overlaps float64 [Q, n], filled up with -1 and 0.0 where fewer edits are stored.

        codes: uint8 [Q, d/8], the queries.
        n: how many edits, 1 or more.

        Raises CodeError for n < 1 and for queries that `check_codes` refuses.
        """
        n = _check_n(n)
        codes = check_codes(codes, self.d, self.k)
        ids = np.full((len(codes), n), -1, dtype=np.int64)
        overlaps = np.zeros((len(codes), n))
        now = self._now
        open_queries = np.arange(len(codes) if now.alive else 0)
        wanted = _rows_for(n)
        while len(open_queries):
            with threads_for(len(open_queries)):
                distances, places = now.nearest(codes[open_queries], min(now.alive, wanted))
            lacking = []
            for query, dist, line in zip(open_queries.tolist(), distances, places, strict=True):
                rows, owners = now.resolve(line)
                best = _first_distinct(owners, n)
                if len(best) < n and wanted < now.alive:
                    lacking.append(query)
                    continue
                if self._recheck:
                    self._check_returned(now, rows[best])
                ids[query, : len(best)] = owners[best]
                overlaps[query, : len(best)] = overlap_from_hamming(dist[best], self.k)
            open_queries, wanted = np.array(lacking, np.int64), wanted * 2
        return ids, overlaps

    def _check_returned(self, now: Snapshot, rows: Rows) -> None:
        for row in np.unique(rows[rows >= 0]).tolist():
            check_codes(now.code(row)[None], self.d, self.k, first_row=row)

    def _check_taken(self, codes: Codes, rows: Rows) -> None:
        wrong = np.flatnonzero(popcount(codes) != self.k)[:1]
        if wrong.size:
            check_codes(codes[wrong], self.d, self.k, first_row=int(rows[wrong[0]]))


def _rows_for(n: int) -> int:
    return 1 if n == 1 else ROWS_PER_EDIT * n


def _first_distinct(owners: Ids, n: int) -> Ids:
    """Where each of the first n distinct ids stands for the first time, int64, ascending."""
    return np.sort(np.unique(owners, return_index=True)[1])[:n]


def _check_n(n: int) -> int:
    n = as_int(n)
    if n < 1:
        raise CodeError(f"n={n} asks for no edits: n must be 1 or more")
    return n


def _no_row(row: int, now: Snapshot) -> CodeError:
    rows = f"the index has rows 0..{now.alive - 1}" if now.alive else "the index is empty"
    return CodeError(f"row {row} is not stored: {rows}")


def _check_rows(rows: ArrayLike, now: Snapshot) -> Rows:
    numbers = np.asarray(rows)
    if numbers.ndim != 1:
        raise CodeError(f"rows have shape {numbers.shape}, not [N]: pass a list of row numbers")
    if numbers.size and numbers.dtype.kind not in "iu":
        raise CodeError(f"rows have dtype {numbers.dtype}, not int64: pass whole numbers")
    wrong = numbers[(numbers < 0) | (numbers >= now.alive)]
    if wrong.size:
        raise _no_row(int(wrong[0]), now)
    return numbers.astype(np.int64)


def _check_lengths(ids: Ids, codes: Codes) -> None:
    if len(ids) != len(codes):
        raise CodeError(f"{len(ids)} ids for {len(codes)} codes: pass one edit id per code")


def _check_ids(ids: ArrayLike) -> Ids:
    numbers = np.asarray(ids)
    if numbers.ndim != 1:
        raise CodeError(f"ids have shape {numbers.shape}, not [N]: pass one edit id per code")
    if numbers.size and numbers.dtype.kind not in "iu":
        raise CodeError(f"ids have dtype {numbers.dtype}, not int64: pass whole numbers")
    out_of_range = np.flatnonzero((numbers < 0) | (numbers > np.iinfo(np.int64).max))
    if out_of_range.size:
        worst = numbers[out_of_range[0]]
        raise CodeError(f"edit id {worst} at position {out_of_range[0]} is refused: ids lie in 0..2**63-1")
    return numbers.astype(np.int64)
