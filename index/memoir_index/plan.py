"""Which lookup is used, and how a sample of the bits proves that no match was overlooked.

A sketch is the first `bits` of the d bits of a mask. Masks went through one fixed random permutation of their positions
(TopHash), so these are a random sample: of the h bits in which two masks differ, the sketch shows a hypergeometric
number. A stored row that differs in at most h bits therefore differs by more than `limit(h)` in the sketch with
probability at most MISS, and a search that has looked at every row within `limit(h)` has found it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from memoir_index.codes import check_shape, hamming_radius
from memoir_index.errors import CodeError

MISS = 5e-13
"""Bound on the probability of each of the two tests that a match must pass, so at most 1e-12 for a lookup."""

ODD = 1e-15
"""A mask whose share of ones in the sketch is less likely than this did not go through a random permutation."""

# Sizes (docs/explanation/lookup.md): where a sketch begins to pay, and the overlap beyond chance that unrelated masks
# have.
FEWEST_ROWS = 4096
MOST_BITS = 2048
UNRELATED_EXCESS = 0.06
MOST_PASSING = 1 / 16
LEAST_TAU = 0.5
_STEP = 64


@dataclass(frozen=True)
class Plan:
    """How a lookup is done.

    kind: "scan" reads every row, "sketch" a part of each first.
    bits: of the sketch, 0 for a full scan.
    why: one line for people.
    """

    kind: Literal["scan", "sketch"]
    bits: int
    why: str


def sketch_bits(d: int) -> int:
    """Bits of the sketch of a mask, a multiple of 512; 0 where a sketch would be too small to tell rows apart.

    d: bits of the mask.

    The bound keeps codes, sketch and ids together below 1.2 * d/8 bytes a row.
    """
    return min(MOST_BITS, (d // 5 - 64) // 512 * 512) if d > 64 * 5 else 0


def choose_plan(n: int, d: int, k: int, tau: float, bits: int | None = None) -> Plan:
    """The plan for a lookup.

    A pure function, and one of the store alone: the size of a batch must not change an answer.

    n: rows.
    d: bits of a mask.
    k: its ones.
    tau: the least overlap that matches, in (0, 1].
    bits: of the sketch, 0 for none (default: `sketch_bits(d)`).

    Raises CodeError for a d, k or tau that the index refuses.
    """
    d, k = check_shape(d, k)
    radius = hamming_radius(tau, k)
    bits = sketch_bits(d) if bits is None else check_bits(bits, d)
    if not bits:
        return Plan("scan", 0, f"masks of {d} bits are too short for a sketch")
    if n < FEWEST_ROWS:
        return Plan("scan", 0, f"below {FEWEST_ROWS} masks a full scan is as fast")
    if tau < LEAST_TAU:
        return Plan("scan", 0, f"below tau={LEAST_TAU} too many masks pass a sketch")
    passing = _passing(d, k, radius, bits)
    if passing > MOST_PASSING:
        return Plan("scan", 0, f"at tau={tau:g} about {passing:.0%} of unrelated masks pass a sketch of {bits} bits")
    why = f"{bits} of {d} bits separate all but {passing:.2%} of unrelated masks from a match"
    return Plan("sketch", bits, why)


def check_bits(bits: int, d: int) -> int:
    """Return bits. Raises CodeError unless it is 0 (no sketch) or a multiple of 8 below d."""
    if bits % 8 or not 0 <= bits < d:
        raise CodeError(f"a sketch of {bits} bits of a mask of {d} is refused: pass 0 or a multiple of 8 below {d}")
    return bits


def sketch_bytes(bits: int) -> int:
    """Bytes of a sketch: whole words of 64 bits, the last one filled up with zeros."""
    return -(-bits // 64) * 8


@lru_cache(maxsize=64)
def _passing(d: int, k: int, radius: int, bits: int) -> float:
    """Share of unrelated rows whose sketch lies within the limit of a row at the radius."""
    unrelated = 2 * (k - round(k * min(1.0, k / d + UNRELATED_EXCESS)))
    return 1 - float(_tail(d, unrelated, bits)[limit(d, radius, bits, MISS) + 1])


@lru_cache(maxsize=64)
def limits(d: int, radius: int, bits: int) -> NDArray[np.int64]:
    """At [i]: `limit` for rows that differ in min(64 * i, radius) bits, for every i up to radius / 64 rounded up."""
    steps = [limit(d, min(step * _STEP, radius), bits, MISS) for step in range(-(-radius // _STEP) + 1)]
    table = np.array(steps, dtype=np.int64)
    table.flags.writeable = False
    return table


def limits_for(d: int, radius: int, bits: int, distances: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sketch distance up to which rows as near as these distances (or radius, if that is less) must be looked at.

    Distances are rounded up to the next step of the table, which errs on the safe side.
    """
    nearest = np.minimum(distances, radius)
    return limits(d, radius, bits)[-(-nearest // _STEP)]


@lru_cache(maxsize=64)
def usual_ones(d: int, k: int, bits: int) -> tuple[int, int]:
    """Least and most ones that a sketch of a mask with k ones has, but for a chance of ODD each."""
    return bits - limit(d, d - k, bits, ODD), limit(d, k, bits, ODD)


def limit(d: int, differing: int, bits: int, miss: float) -> int:
    """Least t such that a random sample of `bits` of d positions, of which some are `differing`, has more than t of
    these with a probability of at most miss."""
    return int(np.argmax(_tail(d, differing, bits)[1:] <= miss))


def _tail(d: int, differing: int, bits: int) -> NDArray[np.float64]:
    """At [x]: the probability that such a sample has x or more of the differing positions, x = 0..bits + 1."""
    fact = _log_factorials(d)
    x = np.arange(max(0, differing + bits - d), min(differing, bits) + 1)
    logs = fact[differing] - fact[x] - fact[differing - x] + fact[d - differing] - fact[bits - x]
    logs = logs - fact[d - differing - bits + x] - (fact[d] - fact[bits] - fact[d - bits])
    share = np.zeros(bits + 2)
    share[x] = np.exp(logs)
    return np.minimum(np.cumsum(share[::-1])[::-1], 1.0)  # small terms first


@lru_cache(maxsize=8)
def _log_factorials(d: int) -> NDArray[np.float64]:
    return np.array([math.lgamma(i + 1) for i in range(d + 1)])
