"""TopHash: from a prompt's activations to its mask (Eq. 3 of arXiv 2506.07899)."""

from __future__ import annotations

import numpy as np
import torch

from memoir_retrieval.errors import ConfigError

__all__ = ["Fingerprint", "permutation", "top_positions"]


def permutation(d: int, seed: int) -> np.ndarray:
    """The fixed random permutation pi of the D positions: int64 [D]. Stored with the edits, never drawn again."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(d).astype(np.int64)


def top_positions(values: torch.Tensor, k: int) -> torch.Tensor:
    """Positions of the k largest entries of each row, the lowest position first among equals.

    values: float [N, D], any device. Returns int64 [N, k] on the same device, in no defined order.
    A stable sort is the one selection whose ties are defined on every device.
    Raises ConfigError where a value is NaN: such a row has no fingerprint.
    """
    if bool(torch.isnan(values).any()):
        raise ConfigError("activations hold NaN, so no fingerprint can be made: check the model and its dtype")
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :k]


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
        self._perm = torch.as_tensor(perm, dtype=torch.int64, device=device)

    def codes(self, means: torch.Tensor) -> np.ndarray:
        """means: float32 [N, D] on the device of this object. Returns uint8 [N, D/8], little bit order."""
        chosen = top_positions((means - self._background).abs(), self.k)
        bits = torch.zeros(means.shape, dtype=torch.bool, device=means.device)
        bits.scatter_(1, self._perm[chosen], True)
        return np.packbits(bits.cpu().numpy(), axis=1, bitorder="little")
