"""Random masks and the exhaustive lookup that the index is compared with."""

import numpy as np

from memoir_index import Hits, pack, unpack


def random_masks(rng: np.random.Generator, n: int, d: int, k: int) -> np.ndarray:
    """Bool [n, d] with exactly k ones a row."""
    return rng.permuted(np.arange(d) < np.full((n, 1), k), axis=1)


def random_codes(rng: np.random.Generator, n: int, d: int, k: int) -> np.ndarray:
    return pack(random_masks(rng, n, d, k))


def with_overlap(mask: np.ndarray, shared: int) -> np.ndarray:
    """A mask of as many ones as `mask`, bool [d], that has exactly `shared` of them in common."""
    ones, zeros = np.flatnonzero(mask), np.flatnonzero(~mask)
    other = np.zeros_like(mask)
    other[ones[:shared]] = True
    other[zeros[: len(ones) - shared]] = True
    return other


def shared_bits(queries: np.ndarray, stored: np.ndarray, d: int) -> np.ndarray:
    """int64 [Q, N]: number of common ones of every pair, from the unpacked masks."""
    return unpack(queries, d).astype(np.int64) @ unpack(stored, d).astype(np.int64).T


def oracle_search(queries, ids, stored, d: int, k: int, needed: int) -> Hits:
    """Best row per query by exhaustive comparison; `needed` is the least number of common ones."""
    q = len(queries)
    if not len(ids):
        return Hits(np.full(q, -1), np.zeros(q), np.full(q, -1))
    bits = shared_bits(queries, stored, d)
    row = bits.argmax(axis=1)  # the first of equals
    best = bits[np.arange(q), row]
    match = best >= needed
    return Hits(np.where(match, np.asarray(ids)[row], -1), best / k, np.where(match, row, -1))


def oracle_nearest(queries, ids, stored, d: int, k: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    out_ids, out = np.full((len(queries), n), -1), np.zeros((len(queries), n))
    for q, bits in enumerate(shared_bits(queries, stored, d)):
        seen: list[int] = []
        for row in np.argsort(-bits, kind="stable"):
            if ids[row] not in seen and len(seen) < n:
                out_ids[q, len(seen)], out[q, len(seen)] = ids[row], bits[row] / k
                seen.append(ids[row])
    return out_ids, out
