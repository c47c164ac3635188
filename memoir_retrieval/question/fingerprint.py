"""TopHash: from a prompt's activations to its mask (Eq. 3 of arXiv 2506.07899)."""

from __future__ import annotations

import numpy as np
import torch

from memoir_retrieval.errors import ConfigError

__all__ = ["Fingerprint", "permutation", "top_mask"]

_NAN = "activations hold NaN, so no fingerprint can be made: check the model and its dtype"
_SAMPLE = 512  # entries of a row, at most, from which its k-th largest is guessed
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
    """`top_mask` of float32 [N, D], N > 0: bool [N, D]."""
    if np.isnan(values.max()):  # a maximum passes NaN on
        raise ConfigError(_NAN)
    least = _kth_largest(values, k)[:, None]
    masks = values >= least
    for row, mask in enumerate(masks):
        excess = np.count_nonzero(mask) - k
        if excess:
            mask[np.flatnonzero(values[row] == least[row])[-excess:]] = False
    return masks


def _kth_largest(values: np.ndarray, k: int) -> np.ndarray:
    """The k-th largest entry of each row of float32 [N, D]: float32 [N].

    A sample of the row gives a first guess; how many entries lie above that tells how far off it is, so a second
    entry of the sample brackets the one that is sought. Of the few in between, the right one is picked. Where the
    bracket does not hold it, as among many equal entries, it is picked from the whole row.
    """
    n, d = values.shape
    sample = np.sort(values[:, :: -(-d // _SAMPLE)], axis=1)
    size = sample.shape[1]
    guess = (d - k) * size // d
    above = values > sample[:, guess, None]
    beyond = _counts(above)
    off = (beyond - k) * (size / d)  # in entries of the sample; two standard deviations are added
    bound = (guess + off + np.copysign(2 * np.sqrt(np.abs(off)) + 2, off)).astype(np.int64)
    end = sample[np.arange(n), np.minimum(np.maximum(bound, 0), size - 1)]
    past_end = values > end[:, None]
    beyond_end = _counts(past_end)
    between = values.reshape(-1)[np.flatnonzero(above ^ past_end)]
    least = np.empty(n, np.float32)
    start = 0
    for row, (above_guess, above_bound) in enumerate(zip(beyond.tolist(), beyond_end.tolist(), strict=True)):
        bracket, rank = between[start : start + abs(above_guess - above_bound)], k - min(above_guess, above_bound)
        start += len(bracket)
        if not 0 < rank <= len(bracket):
            bracket, rank = values[row], k
        place = len(bracket) - rank
        least[row] = np.partition(bracket, place)[place]
    return least


def _counts(masks: np.ndarray) -> np.ndarray:
    return np.array([np.count_nonzero(mask) for mask in masks])


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
