"""Whether a message wants something done with a question: read off the activations of what stands around it.

"Translate this:" and "I have a question:" differ in words that no list holds all of. In the activations of the edited
layer two directions tell them apart: of the mean over what stands around the question, and of that over the template's
tokens which lead to the answer, where the model has read the whole message. Of each the signed square roots count,
brought to length 1, so that a few strong activations do not outweigh the rest. The directions are learnt once for a
model and its layer (`evaluation.train_tasks`) and kept in the store: float32 [2 D + 1], the two of them and then what
is added to their products. From about 0 on a task is likelier than none. Those of the embedded model come with the
library.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
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


TASKS = "tasks.json"


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
        """That of some messages alone.

        spans: the places of theirs.
        messages: their own places.
        """
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
    """What a layer's directions say of messages of which several spans are pooled."""

    def __init__(self, tasks: NDArray[np.float32], device: torch.device | str = "cpu") -> None:
        """tasks: float32 [2 D + 1], of the layer; copied.
        device: on which means come.
        """
        self._around, self._lead = torch.tensor(tasks[:-1], device=device).chunk(2)
        self._bias = float(tasks[-1])

    def scores(self, pooled: Pooled, counts: Sequence[int]) -> NDArray[np.float32]:
        """How much what stands around each span speaks for a task, in nats: float32 [C]; -inf where nothing does.

        pooled: of the spans, with the leads of their messages.
        counts: how many of the spans are of each message, in turn, the whole of it first.
        """
        rest = roots(around(pooled, counts))
        nats = rest @ self._around + self._bias
        if pooled.leads is not None:
            messages = np.repeat(np.arange(len(counts)), counts)
            nats += (roots(pooled.leads) @ self._lead)[torch.from_numpy(messages).to(nats.device)]
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
    """The directions that come with the library: float32 [2 D + 1], or [0] where there are none.

    layer: digest of the edited layer, `Identity.layer`.

    Raises StoreError where the file of directions is damaged.
    """
    tasks = _shipped().get(layer)
    return np.frombuffer(tasks or b"", "<f4").astype(np.float32)


@cache
def _shipped() -> dict[str, bytes]:
    return read_tasks((files("memoir_retrieval") / "data" / TASKS).read_bytes())


def read_tasks(data: bytes) -> dict[str, bytes]:
    """What a file of directions holds: float32 [2 D + 1] each, little-endian, by the digest of the layer.

    data: of the file.

    Raises StoreError for one that is damaged.
    """
    try:
        known = msgspec.json.decode(data, type=dict[str, bytes])
        for tasks in known.values():
            if (count := len(np.frombuffer(tasks, "<f4"))) < 3 or count % 2 == 0:
                raise ValueError(f"two directions have {len(tasks)} bytes")
    except ValueError as error:  # msgspec's errors are ValueErrors, too
        raise StoreError(f"{TASKS} is damaged ({error!s:.200}): install memoir-retrieval again") from error
    return known


def _first_of(counts: Sequence[int]) -> NDArray[np.int64]:
    """For each span the place of the first one of its message: int64 [C]."""
    return np.repeat(np.cumsum([0, *counts[:-1]]), counts)
