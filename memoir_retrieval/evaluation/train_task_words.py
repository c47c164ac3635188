"""Learning which words around a question ask for something to be done with it: for `edits.task_words`.

A logistic regression over the rows of the table, with half of a message's rows left out by chance each time, so that
no single word decides. It is a part of the judge: `evaluation.train_judge` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from memoir_retrieval.edits.task_words import PLACE, ROWS, rows_of
from memoir_retrieval.evaluation.messages import Framed, held_back, longer
from memoir_retrieval.evaluation.train_tasks import scaled

__all__ = ["LearntWords", "learn_words"]

# Chosen by messages held back, and on the part "tune" of `memoir bench routing`.
LEFT_OUT, PASSES, BATCH, RATE = 0.5, 12, 256, 5e-2
MOST = 127  # of an int8


class LearntWords(NamedTuple):
    """A table, and how it does on messages that it was not learnt from.

    table: int8 [ROWS], see `edits.task_words`.
    step: nats that a 1 in it counts.
    bias: nats that count always.
    caught: share of the tasks held back that it takes for tasks.
    lost: share of the forms held back that it takes for tasks.
    """

    table: NDArray[np.int8]
    step: float
    bias: float
    caught: float
    lost: float


def learn_words(messages: Sequence[Framed]) -> LearntWords:
    """What the words around a question count.

    messages: to learn from; of half of them also with more around them.
    """
    messages = [*messages, *longer(messages)]
    rows = [rows_of(message.text.replace(message.question, PLACE, 1)) for message in messages]
    labels = torch.tensor([message.task for message in messages])
    held = held_back(messages)
    known, kept = np.flatnonzero(~held), np.flatnonzero(held)
    weights, bias = _fit([rows[number] for number in known], labels[known])
    scores = _scores(weights, bias, [rows[number] for number in kept])
    scale, shift = scaled(scores, labels[kept])  # it is surer of what it was learnt from than of the rest
    tasks = scores * scale + shift >= 0
    weights, bias = _fit(rows, labels)
    step = float(weights.abs().max()) / MOST
    return LearntWords(
        table=(weights / step).round().to(torch.int8).numpy(),
        step=step * scale,
        bias=bias * scale + shift,
        caught=float(tasks[labels[kept]].float().mean()),
        lost=float(tasks[~labels[kept]].float().mean()),
    )


def _fit(rows: Sequence[NDArray[np.int64]], labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What each row of the table counts, float32 [ROWS], and what counts always."""
    chance = torch.Generator().manual_seed(0)
    weights, bias = torch.zeros(ROWS, requires_grad=True), torch.zeros((), requires_grad=True)
    search = torch.optim.AdamW([weights, bias], RATE, weight_decay=1e-5)
    every = [torch.tensor(of) for of in rows]
    for _ in range(PASSES):
        for batch in torch.randperm(len(rows), generator=chance).split(BATCH):
            some = []
            for number in batch.tolist():
                some.append(every[number][torch.rand(len(every[number]), generator=chance) >= LEFT_OUT])
            loss = functional.binary_cross_entropy_with_logits(_summed(weights, bias, some), labels[batch].float())
            search.zero_grad()
            loss.backward()
            search.step()
    return weights.detach(), float(bias.detach())


def _scores(weights: torch.Tensor, bias: float, rows: Sequence[NDArray[np.int64]]) -> torch.Tensor:
    """What is said of messages: float32 [M]."""
    return _summed(weights, torch.tensor(bias), [torch.tensor(of) for of in rows])


def _summed(weights: torch.Tensor, bias: torch.Tensor, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    counts = torch.tensor([len(of) for of in rows])
    starts = torch.cumsum(counts, 0) - counts
    totals = functional.embedding_bag(torch.cat(list(rows)), weights[:, None], starts, mode="sum")[:, 0]
    return bias + totals / counts.clamp_min(1).sqrt()
