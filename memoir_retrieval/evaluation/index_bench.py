"""How fast masks are made and looked up on this machine, beside every other way of doing the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from statistics import median
from typing import TypeVar

import faiss
import numpy as np
import torch

from memoir_index import HammingIndex, hamming_radius, unpack
from memoir_index.synthetic import MaskSource
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.question.fingerprint import Fingerprint, permutation
from memoir_retrieval.store.threshold import CANDIDATES

__all__ = ["IndexTiming", "bench_fingerprint", "bench_lookup", "free_bytes", "k_of"]

Note = Callable[[str], None]
Method = Callable[[np.ndarray], "tuple[np.ndarray, np.ndarray] | None"]

T = TypeVar("T")

FLAT = "IndexBinaryFlat"
_ROUNDS = 15


@dataclass(frozen=True)
class IndexTiming:
    """One line of the table. None stands for what was not measured or means nothing there.

    d: bits of a mask.
    n: rows of the index; 0 where nothing is looked up.
    batch: queries at once.
    method: what was timed.
    ms: median milliseconds per batch.
    vs_flat: how many times faster than `IndexBinaryFlat`, the median over rounds in which both ran.
    recall: share of queries with the right answer, an edit of largest overlap or none.
    """

    d: int
    n: int
    batch: int
    method: str
    ms: float
    vs_flat: float | None = None
    recall: float | None = None


@dataclass
class _Timing:
    ms: list[float] = field(default_factory=list)
    vs_flat: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)


def k_of(d: int) -> int:
    """Ones of a mask in the published proportion, 4096 of 14336.

    d: bits of the mask.
    """
    return {1536: 438}.get(d, d * 2 // 7)


def free_bytes(root: Path = Path("/")) -> int:
    """Memory that can be had without swapping, in bytes: of the machine, or of the container if that has less.

    root: where /proc and /sys lie.

    Raises ConfigError where neither is known.
    """
    known = [*_free_of_machine(root), *_free_of_groups(root)]
    if not known:
        raise ConfigError("how much memory is free is not known on this machine: say how much may be used, --memory 4")
    return max(0, min(known))


def _free_of_machine(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    yield from (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _free_of_groups(root: Path) -> Iterator[int]:
    """What is left of the memory limit of each control group that this process is in, of either version."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, limit, used, cache = (
            ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
        )
        # In a container the name may be that of the host, of which only the root can be seen.
        group = PurePosixPath(name.lstrip("/"))
        for folder in {root / base / part for part in (group, *group.parents)}:
            try:
                most = int((folder / limit).read_text(encoding="ascii"))
                spent = int((folder / used).read_text(encoding="ascii"))
                stat = dict(row.split() for row in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            except (OSError, ValueError):  # no such group, or "max"
                continue
            yield most - spent + int(stat.get(cache, 0))


def bench_lookup(
    d: int,
    sizes: Sequence[int],
    batches: Sequence[int],
    *,
    tau: float,
    seconds: float,
    memory: int,
    clock: Callable[[], float],
    note: Note,
) -> Iterator[IndexTiming]:
    """Rows of one mask width.

    A batch of queries is one half variants of stored masks that overlap by tau to .9, and one half unrelated masks;
    batches of a single query are either in turn.

    d: bits of a mask.
    sizes: rows of each index.
    batches: queries at once.
    tau: the least overlap that matches.
    seconds: time for each size and batch, beyond one turn of every method.
    memory: bytes that may be used; methods that need more are left out with a note.
    clock: gives seconds.
    note: called with each note.
    """
    k = k_of(d)
    source = MaskSource(d, k)
    for n in sizes:
        need = 2 * n * d // 8
        if need > memory:
            note(f"d={d} n={n} is left out: it takes {need >> 20} MiB of memory, {memory >> 20} may be used")
            continue
        stored = source.masks(n)
        index = HammingIndex.from_codes(d, k, np.arange(n), stored, copy=False, checked=True)
        note(f"d={d} n={n}: {index.plan(tau).kind}, {index.plan(tau).why}")
        methods = dict(_methods(index, stored, tau, memory - need, note))
        for batch in batches:
            queries = [_queries(source, stored, batch, tau, turn) for turn in range(4)]
            yield from _compare(methods, queries, d, n, batch, tau, seconds, clock)
        yield from _writes(index, source, clock)


def bench_fingerprint(d: int, batches: Sequence[int], clock: Callable[[], float]) -> Iterator[IndexTiming]:
    """From mean activations to packed masks: ours, and the plain chain topk, permutation, scatter, packbits.

    d: bits of a mask.
    batches: fingerprints at once.
    clock: gives seconds.
    """
    k = k_of(d)
    perm = permutation(d, 0)
    positions = torch.as_tensor(perm)
    make = Fingerprint(np.zeros(d, np.float32), perm, k)

    def packed(chosen: torch.Tensor) -> np.ndarray:
        bits = torch.zeros((len(chosen), d), dtype=torch.bool).scatter_(1, positions[chosen], True)
        return np.packbits(bits.numpy(), axis=1, bitorder="little")

    ways: dict[str, Callable[[torch.Tensor], np.ndarray]] = {
        "TopHash": make.codes,
        "TopHash by topk": lambda means: packed(torch.topk(means.abs(), k, dim=1).indices),
        "TopHash by stable sort": lambda means: packed(
            torch.sort(means.abs(), dim=1, descending=True, stable=True).indices[:, :k]
        ),
    }
    for batch in batches:
        means = torch.randn(batch, d, generator=torch.Generator().manual_seed(0))
        right = ways["TopHash by stable sort"](means)
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(_ROUNDS):
            for name, way in ways.items():
                way(means)  # what the way before it left in the cache is not to be measured
                spent[name].append(_milliseconds(clock, way, means)[0])
        for name, way in ways.items():
            same = float((way(means) == right).all(axis=1).mean())
            yield IndexTiming(d, 0, batch, name, median(spent[name]), None, same)


def _methods(
    index: HammingIndex, stored: np.ndarray, tau: float, memory: int, note: Note
) -> Iterator[tuple[str, Method]]:
    """Each gives distances and rows, int [Q], for packed queries."""
    d, k, n = index.d, index.k, len(stored)
    words = stored.view(np.uint64).ravel()

    def ours(exact: bool, edits: int = 1) -> Method:
        def search(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            if edits > 1:
                hits, _ = index.search_edits(codes, tau, edits, exact=exact)
            else:
                hits = index.search(codes, tau, exact=exact)
            return np.rint(2 * k * (1 - hits.overlaps)).astype(np.int64), hits.rows

        return search

    flat = faiss.IndexBinaryFlat(d)
    flat.add(stored)

    def scan(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        distances, rows = flat.search(codes, 1)
        return distances[:, 0], rows[:, 0]

    def read(codes: np.ndarray) -> None:
        np.bitwise_or.reduce(words)

    yield FLAT, scan
    yield "memoir", ours(False)
    yield "memoir, full scan", ours(True)
    # As a store with a judge looks up. Behind a full scan like "memoir", which leaves no sketch in the cache.
    yield f"memoir, {CANDIDATES} edits", ours(False, CANDIDATES)
    yield "one read of all codes", read

    def best(overlaps: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        most, rows = overlaps.max(dim=1)
        return 2 * (k - most.long().numpy()), rows.numpy()

    def bits(codes: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(unpack(codes, d).view(np.int8))

    if n * d > memory:
        note(f"d={d} n={n}: no matmuls, they take {n * d >> 20} MiB or more, {memory >> 20} may be used")
        return
    ones = torch.empty((n, d), dtype=torch.int8)
    for start in range(0, n, 4096):
        ones[start : start + 4096] = bits(stored[start : start + 4096])
    yield "int8 matmul", lambda codes: best(torch._int_mm(bits(codes), ones.T))
    if 5 * n * d > memory:
        note(f"d={d} n={n}: no float32 matmuls, they take {5 * n * d >> 20} MiB, {memory >> 20} may be used")
        return
    floats = ones.float()
    yield "float32 matmul", lambda codes: best(bits(codes).float() @ floats.T)
    if 9 * n * d > memory:  # it holds a second copy in float32 while it runs
        note(f"d={d} n={n}: not the published code, it takes {9 * n * d >> 20} MiB, {memory >> 20} may be used")
        return

    def published(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = [best((ones.float() @ query)[None]) for query in bits(codes).float()]
        return np.concatenate([f[0] for f in parts]), np.concatenate([f[1] for f in parts])

    yield "published, cast per query", published


def _queries(source: MaskSource, stored: np.ndarray, batch: int, tau: float, turn: int) -> np.ndarray:
    rng, k = source.rng, source.k
    matching = (batch + (turn % 2 == 0)) // 2
    overlaps = np.ceil(rng.uniform(tau, max(tau, 0.9), matching) * k).astype(np.int64)
    variants = source.variants(stored[rng.integers(len(stored), size=matching)], overlaps)
    return np.concatenate([variants, source.masks(batch - matching)])


def _compare(
    methods: dict[str, Method],
    queries: list[np.ndarray],
    d: int,
    n: int,
    batch: int,
    tau: float,
    seconds: float,
    clock: Callable[[], float],
) -> Iterator[IndexTiming]:
    """Every method once a round, so that each has its neighbour in time to be compared with."""
    radius = hamming_radius(tau, k_of(d))
    timings = {name: _Timing() for name in methods}
    started = time.monotonic()
    share = seconds / len(methods)
    names = list(methods)
    for turn in range(_ROUNDS + 1):
        codes = queries[turn % len(queries)]
        spent: dict[str, float] = {}
        results: dict[str, tuple[np.ndarray, np.ndarray] | None] = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # none always follows the same one
            if turn < 2 or sum(timings[name].ms) < 1000 * share or name == FLAT:
                spent[name], results[name] = _milliseconds(clock, methods[name], codes)
        true = results[FLAT]
        for name, took in spent.items():
            if turn == 0 and took < 1000 * share:
                continue  # to warm up; but what takes longest is not run just for that
            timings[name].ms.append(took)
            timings[name].vs_flat.append(spent[FLAT] / took)
            result = results[name]
            if result is not None and true is not None:
                # without a match the distance may be another's; that there is none must be seen
                right = np.where(true[0] <= radius, result[0] == true[0], result[0] > radius)
                timings[name].right.append(float(right.mean()))
        if turn and time.monotonic() - started > seconds:
            break
    for name, timing in timings.items():
        recall = float(np.mean(timing.right)) if timing.right else None
        yield IndexTiming(d, n, batch, name, median(timing.ms), median(timing.vs_flat), recall)


def _writes(index: HammingIndex, source: MaskSource, clock: Callable[[], float]) -> Iterator[IndexTiming]:
    n = len(index)
    codes = source.masks(50)
    gone = source.rng.permutation(n)[:50].tolist()
    adding = [_milliseconds(clock, index.add, [n + i], codes[i : i + 1])[0] for i in range(50)]
    removing = [_milliseconds(clock, index.remove, [edit])[0] for edit in gone]
    yield IndexTiming(index.d, n, 1, "append one", median(adding))
    yield IndexTiming(index.d, n, 1, "remove one", median(removing))


def _milliseconds(clock: Callable[[], float], act: Callable[..., T], *arguments: object) -> tuple[float, T]:
    start = clock()
    result = act(*arguments)
    return 1000 * (clock() - start), result
