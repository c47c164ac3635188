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


def top_mask(values: torch.Tensor, k: int) -> np.ndarray | torch.Tensor:
    """Which are the k largest entries of each row; among equals the lowest positions are.

    values: float [N, D], 0 < k <= D. Returns bool [N, D] with k ones a row: of numpy for values on the CPU, else on
    their device. A stable sort has the same result; neither way sorts.
    Raises ConfigError where a value is NaN: such a row has no fingerprint.
    """
    if values.device.type == "cpu":
        rows = values.detach().float().numpy()
        if len(rows) and np.isnan(rows.max()):  # a maximum passes NaN on
            raise ConfigError(_NAN)
        return _top_of_array(rows, k)
    if bool(torch.isnan(values).any()):
        raise ConfigError(_NAN)
    return _top_of_tensor(values, k)


def _top_of_array(values: np.ndarray, k: int) -> np.ndarray:
    least = _kth_largest(values, k)
    mask = values >= least[:, None]
    excess = np.count_nonzero(mask, axis=1) - k
    for row in np.flatnonzero(excess).tolist():
        tied = np.flatnonzero(values[row] == least[row])
        mask[row, tied[-excess[row] :]] = False
    return mask


def _kth_largest(values: np.ndarray, k: int) -> np.ndarray:
    """The k-th largest entry of each row of float32 [N, D]: float32 [N].

    A sample brackets it, so that only the entries within the bracket are partitioned; a row whose k-th largest is
    outside is partitioned whole.
    """
    d = values.shape[1]
    sample = values[:, :: max(1, d // _SAMPLE)]
    size = sample.shape[1]
    middle, spread = size * (d - k) / d, 3 * (size * k * (d - k)) ** 0.5 / d + 1
    low, high = max(0, int(middle - spread)), min(size - 1, int(middle + spread))
    edges = np.partition(sample, (low, high), axis=1)[:, (low, high)]
    out = np.empty(len(values), values.dtype)
    for row, (at, above) in enumerate(edges.tolist()):
        whole = values[row]
        beyond = np.count_nonzero(whole > above)
        band = whole[np.flatnonzero((whole >= at) & (whole <= above))]
        if beyond < k <= beyond + len(band):
            out[row] = np.partition(band, len(band) - (k - beyond))[len(band) - (k - beyond)]
        else:
            out[row] = np.partition(whole, d - k)[d - k]
    return out


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
        values = (means - self._background).abs()
        mask = top_mask(values, self.k)
        if isinstance(mask, torch.Tensor):
            mask = mask.cpu().numpy()
        return np.packbits(np.take(mask, self._position, axis=1), axis=1, bitorder="little")
