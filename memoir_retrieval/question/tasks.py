"""Whether a message wants something done with a question: read off the activations of what stands around it.

"Translate this:" and "I have a question:" differ in words that no list holds all of. In the activations of the edited
layer one direction tells them apart: of a mean activation it matters where it points to, not how long it is. The
direction is learnt once for a model and its layer (`evaluation.train_tasks`) and kept in the store: float32 [D + 1],
the direction and then what is added to the product with a mean of length 1. From about 0 on a task is likelier than
none. The embedded model's direction comes with the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from memoir_retrieval.errors import StoreError

__all__ = ["TASKS", "TaskProbe", "around", "read_tasks", "shipped_tasks"]


TASKS = "tasks.json"


class TaskProbe:
    """What a direction says of messages of which several spans are pooled."""

    def __init__(self, tasks: NDArray[np.float32], device: torch.device | str = "cpu") -> None:
        """tasks: float32 [D + 1], of the layer; copied.
        device: on which means come.
        """
        self._weights = torch.tensor(tasks[:-1], device=device)
        self._bias = float(tasks[-1])

    def scores(self, means: torch.Tensor, weights: torch.Tensor, counts: Sequence[int]) -> NDArray[np.float32]:
        """How much what stands around each span speaks for a task, in nats: float32 [Q]; -inf where nothing does.

        means: float32 [Q, D], the mean activation of each span.
        weights: float32 [Q], what each mean counts by: its denominator.
        counts: how many of the spans are of each message, in turn, the whole of it first.
        """
        rest = around(means, weights, counts)
        lengths = rest.norm(dim=1)
        nats = torch.where(lengths > 0, rest @ self._weights / lengths + self._bias, -torch.inf)
        return nats.cpu().numpy().astype(np.float32)


def around(means: torch.Tensor, weights: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """The mean activation of what stands around each span of a message: float32 [Q, D], zeros where nothing does.

    means, weights, counts: see `TaskProbe.scores`.
    """
    first = torch.from_numpy(_first_of(counts)).to(means.device)
    left = (weights[first] - weights)[:, None]
    rest = (means[first] * weights[first, None] - means * weights[:, None]) / left
    return torch.where(left > 0, rest, torch.zeros_like(rest))


def shipped_tasks(layer: str) -> NDArray[np.float32]:
    """The direction that comes with the library: float32 [D + 1], or [0] where there is none.

    layer: digest of the edited layer, `Identity.layer`.

    Raises StoreError where the file of directions is damaged.
    """
    tasks = _shipped().get(layer)
    return np.frombuffer(tasks or b"", "<f4").astype(np.float32)


@cache
def _shipped() -> dict[str, bytes]:
    return read_tasks((files("memoir_retrieval") / "data" / TASKS).read_bytes())


def read_tasks(data: bytes) -> dict[str, bytes]:
    """What a file of directions holds: float32 [D + 1] each, little-endian, by the digest of the layer.

    data: of the file.

    Raises StoreError for one that is damaged.
    """
    try:
        known = msgspec.json.decode(data, type=dict[str, bytes])
        for tasks in known.values():
            if len(np.frombuffer(tasks, "<f4")) < 2:
                raise ValueError(f"a direction has {len(tasks)} bytes")
    except ValueError as error:  # msgspec's errors are ValueErrors, too
        raise StoreError(f"{TASKS} is damaged ({error!s:.200}): install memoir-retrieval again") from error
    return known


def _first_of(counts: Sequence[int]) -> NDArray[np.int64]:
    """For each span the place of the first one of its message: int64 [Q]."""
    return np.repeat(np.cumsum([0, *counts[:-1]]), counts)
