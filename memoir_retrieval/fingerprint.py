"""TopHash: from a prompt's activations to its mask (Eq. 3 of arXiv 2506.07899)."""

from __future__ import annotations

import numpy as np
import torch

from memoir_retrieval.errors import ConfigError

__all__ = ["Fingerprint", "permutation", "top_mask"]

_NAN = "activations hold NaN, so no fingerprint can be made: check the model and its dtype"
_SAMPLE = 512  # entries of a row from which its k-th largest is guessed


def permutation(d: int, seed: int) -> np.ndarray:
    """The fixed random permutation pi of the D positions: int64 [D]. Stored with the edits, never drawn again."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(d).astype(np.int64)


def top_mask(values: torch.Tensor, k: int) -> torch.Tensor:
    """Which are the k largest entries of each row; among equals the lowest positions are.

    values: float [N, D], 0 < k <= D. Returns bool [N, D] with k ones a row on the same device. A stable sort has the
    same result; neither way of ours sorts.
    Raises ConfigError where a value is NaN: such a row has no fingerprint.
    """
    if values.device.type == "cpu":
        rows = [_top_of_row(row, k) for row in values.detach().float().numpy()]
        return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(values.shape, dtype=torch.bool)
    if bool(torch.isnan(values).any()):
        raise ConfigError(_NAN)
    return _top_of_tensor(values, k)


def _top_of_row(values: np.ndarray, k: int) -> np.ndarray:
    """`top_mask` of float32 [D]: bool [D]."""
    if np.isnan(values.max()):  # a maximum passes NaN on
        raise ConfigError(_NAN)
    least = _kth_largest(values, k)
    mask = values >= least
    excess = np.count_nonzero(mask) - k
    if excess:
        mask[np.flatnonzero(values == least)[-excess:]] = False
    return mask


def _kth_largest(values: np.ndarray, k: int) -> np.float32:
    """The k-th largest entry of float32 [D].

    A sample brackets it, so that only the entries within the bracket are partitioned; all are where it is outside.
    """
    d = len(values)
    sample = values[:: max(1, d // _SAMPLE)]
    size = len(sample)
    middle, spread = size * (d - k) / d, 3 * (size * k * (d - k)) ** 0.5 / d + 1
    low, high = max(0, int(middle - spread)), min(size - 1, int(middle + spread))
    ordered = np.partition(sample, (low, high))
    beyond = int(np.count_nonzero(values > ordered[high]))
    band = values[np.flatnonzero((values >= ordered[low]) & (values <= ordered[high]))]
    if not beyond < k <= beyond + len(band):
        band, beyond = values, 0
    place = len(band) - (k - beyond)
    return np.partition(band, place)[place]


def _top_of_tensor(values: torch.Tensor, k: int) -> torch.Tensor:
    # Which of equal entries topk takes is up to the device; the least value that it takes is not.
    least = torch.topk(values, k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above, tied = values > least, values == least
    room = k - above.sum(dim=1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=1) <= room))


class Fingerprint:
    """Turns the mean activation of a question into a packed mask with exactly k ones.

    background: float32 [D], the mean over unrelated prompts. perm: int64 [D]. k: active bits, 0 < k <= D.
    """

    def __init__(self, background: np.ndarray, perm: np.ndarray, k: int, device: torch.device | str = "cpu"):
        if not 0 < k <= len(perm):
            raise ConfigError(f"k is {k}, but the layer has D={len(perm)} inputs: choose 0 < k <= {len(perm)}")
        self.k = k
        self.d = len(perm)
        self._background = torch.as_tensor(background, dtype=torch.float32, device=device)
        # bit perm[i] of a mask stands for position i, so bit j stands for position argsort(perm)[j]
        self._position = np.argsort(np.asarray(perm))

    def codes(self, means: torch.Tensor) -> np.ndarray:
        """means: float32 [N, D] on the device of this object. Returns uint8 [N, D/8], little bit order."""
        out = np.empty((len(means), self.d // 8), np.uint8)
        if means.device.type == "cpu":
            # Row by row: what a row takes stays in the cache, and fresh memory for a batch costs as much as the rest.
            background = self._background.numpy()
            for row, values in enumerate(means.detach().float().numpy()):
                mask = _top_of_row(np.abs(values - background), self.k)
                out[row] = np.packbits(mask[self._position], bitorder="little")
            return out
        masks = top_mask((means - self._background).abs(), self.k).cpu().numpy()
        return np.packbits(np.take(masks, self._position, axis=1), axis=1, bitorder="little")
