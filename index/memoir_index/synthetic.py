"""Made-up masks whose overlaps are those of a language model's: for measuring lookups at sizes nobody has edited to."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memoir_index.codes import Codes, check_shape, pack, unpack

TOPICS = 64
# How much positions differ in how often they are on: for all prompts, and between topics. At D=14336 (1536) two random
# masks then overlap by .34 (.33) on average, and the nearest of 20,000 unrelated ones by .41 (.46) at most.
SHARED, OWN = 0.66, 0.62
_ROWS = 2048


class MaskSource:
    """An endless source of masks of d bits with k ones, reproducible by its seed."""

    def __init__(self, d: int, k: int, seed: int = 0) -> None:
        self.d, self.k = check_shape(d, k)
        self.rng = np.random.default_rng(seed)
        shared = SHARED * self.rng.standard_normal(d)
        self._chance = np.stack([_chances(shared + OWN * self.rng.standard_normal(d), k) for _ in range(TOPICS)])

    def masks(self, n: int) -> Codes:
        """n new masks of random topics, uint8 [n, d/8]."""
        codes = np.empty((n, self.d // 8), np.uint8)
        topics = self.rng.integers(len(self._chance), size=n)
        for start in range(0, n, _ROWS):
            part = slice(start, start + _ROWS)
            threshold = np.minimum(self._chance * 256, 255).astype(np.uint8)[topics[part]]
            on = np.frombuffer(self.rng.bytes(threshold.size), np.uint8).reshape(threshold.shape) < threshold
            for row, excess in zip(on, (on.sum(axis=1) - self.k).tolist(), strict=True):
                if excess:
                    row[self._some(np.flatnonzero(row == (excess > 0)), abs(excess))] = excess < 0
            codes[part] = pack(on)
        return codes

    def variants(self, codes: Codes, shared: NDArray[np.int64]) -> Codes:
        """For each code, uint8 [N, d/8], a mask that has exactly `shared` ones, int64 [N], in common with it."""
        on = unpack(codes, self.d).copy()
        for row, common in zip(on, shared.tolist(), strict=True):
            ones, zeros = np.flatnonzero(row), np.flatnonzero(~row)
            row[self._some(ones, self.k - common)] = False
            row[self._some(zeros, self.k - common)] = True
        return pack(on)

    def _some(self, positions: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        return self.rng.permutation(positions)[:n]


def _chances(logits: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Probabilities of a one at each position that sum to k: the logistic function of logits less a constant."""
    low, high = logits.min() - 40.0, logits.max() + 40.0
    for _ in range(60):
        middle = (low + high) / 2
        if (1 / (1 + np.exp(middle - logits))).sum() > k:
            low = middle
        else:
            high = middle
    return 1 / (1 + np.exp(low - logits))
