"""TopHash: from a prompt's activations to its mask (Eq. 3 of arXiv 2506.07899)."""

from __future__ import annotations

import math

import numpy as np
import torch

from memoir_retrieval.errors import ConfigError

__all__ = ["Fingerprint", "permutation", "top_mask"]

_NAN = "activations hold NaN, so no fingerprint can be made: check the model and its dtype"
_SAMPLE = 512  # entries of a row, at most, from which its k-th largest is guessed
_PROBES = 12  # of values, at most, until one is picked from those that are left
_ROWS = 16  # done together, so that what they take stays in the cache
_BITS = np.array([1 << bit for bit in range(8)], np.uint8)[:, None]


def permutation(d: int, seed: int) -> np.ndarray:
    """The fixed random permutation of the positions: int64 [D]. Stored with the edits, never drawn again.

    d: how many positions.
    seed: of the draw.
    """
    return np.random.Generator(np.random.PCG64(seed)).permutation(d).astype(np.int64)


def top_mask(values: torch.Tensor, k: int) -> torch.Tensor:
    """Which are the k largest entries of each row; among equals the lowest positions are.

    A stable sort has the same result; neither way of ours sorts whole rows.

    values: float [N, D].
    k: ones in each row, 0 < k <= D.

    Returns bool [N, D] on the same device. Raises ConfigError where a value is NaN: such a row has no fingerprint.
    """
    if values.device.type == "cpu":
        rows = values.detach().float().numpy()
        masks = [_top_of_rows(rows[start : start + _ROWS], k) for start in range(0, len(rows), _ROWS)]
        return torch.from_numpy(np.concatenate(masks)) if masks else torch.zeros(values.shape, dtype=torch.bool)
    if bool(torch.isnan(values).any()):
        raise ConfigError(_NAN)
    return _top_of_tensor(values, k)


def _top_of_rows(values: np.ndarray, k: int) -> np.ndarray:
    """`top_mask` of float32 [N, D], N > 0: bool [N, D].

    Where exactly k entries of a row are above some value, these are the ones. Such a value is looked for. A sample of
    the row gives a first guess, and how many entries are above that tells how far off it is.
    """
    if np.isnan(values.max()):  # a maximum passes NaN on
        raise ConfigError(_NAN)
    masks = np.empty(values.shape, np.bool_)
    samples = np.sort(values[:, :: -(-values.shape[1] // _SAMPLE)], axis=1)
    for row, sample, mask in zip(values, samples, masks, strict=True):
        _top_of_row(row, sample, k, mask)
    return masks


def _top_of_row(row: np.ndarray, sample: np.ndarray, k: int, mask: np.ndarray) -> None:
    """Set `mask` to the k largest of float32 [D]. sample: entries of it, in order."""
    d, last = len(row), len(sample) - 1
    low, many, high, few = -np.inf, d, np.inf, 0  # many > k entries are above low, few < k above high
    guess = (d - k) * (last + 1) / d
    value = sample[int(guess)]
    for _ in range(_PROBES):
        count = int(np.count_nonzero(np.greater(row, value, out=mask)))
        if count == k:
            return
        if count > k:
            low, many = value, count
        else:
            high, few = value, count
        if few and many < d:
            value = low + (high - low) * np.float32((many - k) / (many - few))
        else:  # two standard deviations are added, so that the one that is sought lies between the two
            off = (count - k) * (last + 1) / d
            guess += off + math.copysign(2 * math.sqrt(abs(off)) + 2, off)
            value = sample[min(max(int(guess), 0), last)]
        if not low < value < high:
            break
    between = row[(row <= high) & (row > low)] if many < d else row[row <= high]
    place = len(between) - (k - few)
    least = np.partition(between, place)[place]
    excess = np.count_nonzero(np.greater_equal(row, least, out=mask)) - k
    if excess:
        mask[np.flatnonzero(row == least)[-excess:]] = False


def _top_of_tensor(values: torch.Tensor, k: int) -> torch.Tensor:
    # Which of equal entries topk takes is up to the device; the least value that it takes is not.
    least = torch.topk(values, k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above, tied = values > least, values == least
    room = k - above.sum(dim=1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=1) <= room))


class Fingerprint:
    """Turns the mean activation of a question into a packed mask with exactly k ones."""

    def __init__(self, background: np.ndarray, perm: np.ndarray, k: int, device: torch.device | str = "cpu"):
        """background: float32 [D], the mean over unrelated prompts.
        perm: int64 [D].
        k: ones in a mask, 0 < k <= D.
        device: on which activations come.

        Raises ConfigError for any other k.
        """
        if not 0 < k <= len(perm):
            raise ConfigError(f"k is {k}, but the layer has D={len(perm)} inputs: choose 0 < k <= {len(perm)}")
        self.k = k
        self.d = len(perm)
        self._background = torch.as_tensor(background, dtype=torch.float32, device=device)
        # bit perm[i] of a mask stands for position i, so bit j stands for position argsort(perm)[j]
        self._position = np.argsort(np.asarray(perm))
        self._on_device = [torch.from_numpy(array).to(device) for array in (self._position, _BITS[:, 0])]

    def same_as(self, other: Fingerprint) -> bool:
        """Whether both make the same masks.

        other: any.
        """
        return (
            self.k == other.k
            and np.array_equal(self._position, other._position)
            and torch.equal(self._background, other._background)
        )

    def codes(self, means: torch.Tensor) -> np.ndarray:
        """The masks of questions: uint8 [N, D/8], little bit order.

        means: float32 [N, D] on the device of this object.
        """
        if means.device.type != "cpu":
            return self._codes_there(means)
        rows, background = means.detach().float().numpy(), self._background.numpy()
        out = np.empty((len(rows), self.d // 8), np.uint8)
        room = np.empty((min(_ROWS, len(rows)), self.d), np.float32)
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            values = np.subtract(part, background, out=room[: len(part)])
            out[start : start + _ROWS] = self._packed(_top_of_rows(np.abs(values, out=values), self.k))
        return out

    def _codes_there(self, means: torch.Tensor) -> np.ndarray:
        """Codes made on the device, which is waited for once: for what a mask has packed, an eighth of its bytes."""
        position, bits = self._on_device
        masks = _top_of_tensor((means - self._background).abs(), self.k).index_select(1, position)
        packed = (masks.view(len(means), -1, 8) * bits).sum(dim=2, dtype=torch.uint8).cpu().numpy()
        if not packed.any(axis=1).all():  # nothing is above NaN or equal to it, so such a row has no ones
            raise ConfigError(_NAN)
        return packed

    def _packed(self, masks: np.ndarray) -> np.ndarray:
        """Permute and pack bool [N, D]: uint8 [N, D/8]."""
        out = np.empty((len(masks), self.d // 8), np.uint8)
        for start in range(0, len(masks), 8):
            # Bit r of each byte is row r's, so that the permutation, the slowest step, is done once for eight rows.
            rows, shared = masks[start : start + 8], np.zeros(self.d, np.uint8)
            for mask in rows[::-1]:
                shared += shared
                shared += mask.view(np.uint8)
            out[start : start + 8] = np.packbits(shared[self._position] & _BITS[: len(rows)], axis=1, bitorder="little")
        return out
