"""Whether a message wants something done with a question: read off the activations of what stands around it.

"Translate this:" and "I have a question:" differ in words that no list holds all of. In the activations of the edited
layer one direction tells them apart. It is learnt once for a model and its layer (`evaluation.train_tasks`) and comes
with the library.
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

__all__ = ["TASKS", "TaskProbe", "Tasks", "around", "probe_of", "read_tasks", "shipped_tasks"]


TASKS = "tasks.json"


class Tasks(msgspec.Struct, frozen=True, kw_only=True):
    """A direction of the activations, as it is kept.

    weights: float32 [D], little-endian bytes.
    bias: what is added to the product with a mean; from about 0 on a task is likelier than none.
    """

    weights: bytes
    bias: float


class TaskProbe:
    """What `Tasks` say of messages of which several spans are pooled."""

    def __init__(self, tasks: Tasks, device: torch.device | str = "cpu") -> None:
        """tasks: of the layer.
        device: on which means come.
        """
        weights = np.frombuffer(tasks.weights, "<f4").astype(np.float32)
        self._weights = torch.from_numpy(weights).to(device)
        self._bias = tasks.bias

    def scores(self, means: torch.Tensor, weights: torch.Tensor, counts: Sequence[int]) -> NDArray[np.float32]:
        """How much what stands around each span speaks for a task, in nats: float32 [Q]; -inf where nothing does.

        means: float32 [Q, D], the mean activation of each span.
        weights: float32 [Q], what each mean counts by: its denominator.
        counts: how many of the spans are of each message, in turn, the whole of it first.
        """
        dots, sums = (column.cpu().numpy().astype(np.float64) for column in (means @ self._weights, weights))
        first = _first_of(counts)
        left = sums[first] - sums
        with np.errstate(divide="ignore", invalid="ignore"):
            rest = (sums[first] * dots[first] - sums * dots) / left + self._bias
        return np.where(left > 0, rest, -np.inf).astype(np.float32)


def around(means: torch.Tensor, weights: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """The mean activation of what stands around each span of a message: float32 [Q, D], zeros where nothing does.

    means, weights, counts: see `TaskProbe.scores`.
    """
    first = torch.from_numpy(_first_of(counts)).to(means.device)
    left = (weights[first] - weights)[:, None]
    rest = (means[first] * weights[first, None] - means * weights[:, None]) / left
    return torch.where(left > 0, rest, torch.zeros_like(rest))


@cache
def shipped_tasks() -> dict[str, Tasks]:
    """The directions that come with the library, by the digest of the layer they were learnt on (`Identity.layer`).

    Raises StoreError where their file is damaged.
    """
    return read_tasks((files("memoir_retrieval") / "data" / TASKS).read_bytes())


def read_tasks(data: bytes) -> dict[str, Tasks]:
    """What a file of directions holds.

    data: of the file.

    Raises StoreError for one that is damaged.
    """
    try:
        known = msgspec.json.decode(data, type=dict[str, Tasks])
        for tasks in known.values():
            np.frombuffer(tasks.weights, "<f4")
    except ValueError as error:  # msgspec's errors are ValueErrors, too
        raise StoreError(f"{TASKS} is damaged ({error!s:.200}): install memoir-retrieval again") from error
    return known


def probe_of(layer: str, device: torch.device | str = "cpu") -> TaskProbe | None:
    """The probe of a layer, or None where none comes with the library: then the judge goes by words.

    layer: digest of the edited layer, `Identity.layer`.
    device: on which means come.
    """
    tasks = shipped_tasks().get(layer)
    return None if tasks is None else TaskProbe(tasks, device)


def _first_of(counts: Sequence[int]) -> NDArray[np.int64]:
    """For each span the place of the first one of its message: int64 [Q]."""
    return np.repeat(np.cumsum([0, *counts[:-1]]), counts)
