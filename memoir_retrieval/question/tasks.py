"""Whether a message wants something done with a question: read off the activations of what stands around it.

"Translate this:" and "I have a question:" differ in words that no list holds all of. The activations of the edited
layer tell them apart: the mean over what stands around the question, and that over the template's tokens which lead to
the answer, where the model has read the whole message. Of each the signed square roots count, brought to length 1, so
that a few strong activations do not outweigh the rest. A network with one hidden layer makes one number of both. From
about 0 on a task is likelier than none.

The network is learnt once for a model and its layer (`evaluation.train_tasks`) and kept in the store, one row for each
of its K hidden units: float32 [K, 2 D + 2], the weights of the two means, what is added to their products, and what the
unit counts where it is above 0. The network of the embedded model comes with the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load
from torch.nn import functional

from memoir_retrieval.errors import StoreError
from memoir_retrieval.question.span import Span

__all__ = [
    "TASKS",
    "Pooled",
    "TaskProbe",
    "around",
    "pooled_spans",
    "read_tasks",
    "roots",
    "shipped_tasks",
    "with_leads",
]


TASKS = "tasks.safetensors"


class Pooled(NamedTuple):
    """What is pooled of C spans of M messages.

    means: float32 [C, D].
    weights: float32 [C], what each mean was divided by.
    leads: float32 [M, D], the mean of what leads to the answer of each message, 0 where nothing does; None where it was
        not asked for.
    """

    means: torch.Tensor
    weights: torch.Tensor
    leads: torch.Tensor | None = None

    def sound(self, counts: Sequence[int]) -> tuple[list[int], list[int]]:
        """The messages all of whose numbers are finite, and the places of their spans.

        A model may overflow on a strange prompt. Such a message is not looked up.

        counts: how many of the spans are of each message, in turn.
        """
        finite = torch.isfinite(self.means).all(dim=1).cpu()
        leads = torch.isfinite(self.leads).all(dim=1).tolist() if self.leads is not None else [True] * len(counts)
        ends = np.cumsum(counts).tolist()
        spans = [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
        messages = [m for m, of in enumerate(spans) if leads[m] and finite[of.start : of.stop].all()]
        return messages, [place for m in messages for place in spans[m]]

    def taken(self, spans: Sequence[int], messages: Sequence[int]) -> Pooled:
        """That of some messages alone; itself where that is all of them.

        spans: the places of theirs, in turn.
        messages: their own places, in turn.
        """
        if len(spans) == len(self.means):
            return self
        index, of = (torch.tensor(places, device=self.means.device) for places in (spans, messages))
        return Pooled(self.means[index], self.weights[index], None if self.leads is None else self.leads[of])


def pooled_spans(parts: Sequence[Span]) -> list[Span]:
    """What must be pooled of a message for its parts to be judged: these, and behind them its lead.

    parts: of the message, the whole of it first. There is no lead where it has no other, since nothing stands around
        the whole, or where the rule spares no tokens.
    """
    return [*parts, parts[0].lead] if len(parts) > 1 and parts[0].behind else [*parts]


def with_leads(pooled: Pooled, messages: Sequence[Sequence[Span]]) -> Pooled:
    """Parts and leads apart.

    pooled: of `pooled_spans` of each message, one after another.
    messages: the parts of each.
    """
    own: list[int] = []
    leads: dict[int, int] = {}
    first = 0
    for number, parts in enumerate(messages):
        end = first + len(parts)
        own += range(first, end)
        first += len(pooled_spans(parts))
        if first > end:
            leads[number] = end
    if not leads:
        return pooled
    index, of, at = (torch.tensor(places, device=pooled.means.device) for places in (own, [*leads], [*leads.values()]))
    means = torch.zeros_like(pooled.means[: len(messages)])
    return Pooled(pooled.means[index], pooled.weights[index], means.index_copy(0, of, pooled.means[at]))


class TaskProbe:
    """What a layer's network says of messages of which several spans are pooled."""

    def __init__(self, tasks: NDArray[np.float32], device: torch.device | str = "cpu") -> None:
        """tasks: float32 [K, 2 D + 2], of the layer; copied.
        device: on which means come.
        """
        units = torch.tensor(tasks, device=device)
        self._around, self._lead = units[:, :-2].chunk(2, dim=1)
        self._bias, self._counts = units[:, -2], units[:, -1]

    def scores(self, pooled: Pooled, counts: Sequence[int]) -> NDArray[np.float32]:
        """How much what stands around each span speaks for a task, in nats: float32 [C]; -inf where nothing does.

        pooled: of the spans, with the leads of their messages.
        counts: how many of the spans are of each message, in turn, the whole of it first.
        """
        rest = roots(around(pooled, counts))
        units = rest @ self._around.T + self._bias
        if pooled.leads is not None:
            messages = np.repeat(np.arange(len(counts)), counts)
            units += (roots(pooled.leads) @ self._lead.T)[torch.from_numpy(messages).to(units.device)]
        nats = functional.relu(units) @ self._counts
        nats = torch.where(rest.any(dim=1), nats, -torch.inf)
        return nats.cpu().numpy().astype(np.float32)


def roots(means: torch.Tensor) -> torch.Tensor:
    """The signed square roots of mean activations, as rows of length 1, or 0: float32 [C, D].

    means: float32 [C, D].
    """
    return functional.normalize(means.sign() * means.abs().sqrt())


def around(pooled: Pooled, counts: Sequence[int]) -> torch.Tensor:
    """The mean activation of what stands around each span of a message: float32 [C, D], zeros where nothing does.

    pooled, counts: see `TaskProbe.scores`.
    """
    means, weights = pooled.means, pooled.weights
    first = torch.from_numpy(_first_of(counts)).to(means.device)
    left = (weights[first] - weights)[:, None]
    rest = (means[first] * weights[first, None] - means * weights[:, None]) / left
    return torch.where(left > 0, rest, torch.zeros_like(rest))


def shipped_tasks(layer: str) -> NDArray[np.float32]:
    """The network that comes with the library: float32 [K, 2 D + 2], or [0, 0] where there is none.

    layer: digest of the edited layer, `Identity.layer`.

    Raises StoreError where the file of networks is damaged.
    """
    return _shipped().get(layer, np.zeros((0, 0), np.float32))


@cache
def _shipped() -> dict[str, NDArray[np.float32]]:
    return read_tasks((files("memoir_retrieval") / "data" / TASKS).read_bytes())


def read_tasks(data: bytes) -> dict[str, NDArray[np.float32]]:
    """The networks that a file holds, by the digest of the layer: float16 there, float32 [K, 2 D + 2] here.

    data: of the file, in safetensors' format.

    Raises StoreError for one that is damaged.
    """
    try:
        known = {layer: tasks.astype(np.float32) for layer, tasks in load(data).items()}
        for tasks in known.values():
            if tasks.ndim != 2 or tasks.shape[1] < 4 or tasks.shape[1] % 2 or not np.isfinite(tasks).all():
                raise ValueError(f"a network of shape {tasks.shape}")
    except (ValueError, SafetensorError) as error:
        raise StoreError(f"{TASKS} is damaged ({error!s:.200}): install memoir-retrieval again") from error
    return known


def _first_of(counts: Sequence[int]) -> NDArray[np.int64]:
    """For each span the place of the first one of its message: int64 [C]."""
    return np.repeat(np.cumsum([0, *counts[:-1]]), counts)
