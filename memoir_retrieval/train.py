"""Training one edit: the smallest change of the memory that makes the model give the target.

Three things differ from the published loop (SGD on the active columns, arXiv 2506.07899, section 3) and none from
what it stores. Everything before the question and below the edited block is run once (`forward`). The change is
searched in the space that the edit's own activations span, measured by what it would do to earlier edits: with A
the activations of the edit's tokens on its k active columns and C the sum of a a^T over the tokens of earlier
edits, a change U of the columns costs tr(U (C + ridge I) U^T), so that directions which earlier edits rely on are
the last to be used. And the step is Polyak's, loss over squared gradient, which needs no learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from memoir_retrieval.forward import FrozenPast, frozen_run, right_pad, run_from_block
from memoir_retrieval.model import BaseModel

IGNORED = -100  # what cross entropy leaves out

__all__ = ["Trained", "Training", "edit_activations", "train_edit"]


@dataclass(frozen=True)
class Training:
    """How edits are trained.

    An edit is trained on the bare prompt, after each of `contexts` contexts (see the module of that name), and on
    `variants` of the prompt in which each question token is replaced by a random one with probability `noise`: a
    stand-in for rephrasings.
    max_steps, stop_loss: training ends at the step limit or below this mean loss (nats per target token).
    ridge: what a direction costs that no earlier edit uses; small values keep earlier edits more exactly.
    """

    contexts: int = 1
    variants: int = 2
    noise: float = 0.25
    max_steps: int = 60
    stop_loss: float = 0.02
    ridge: float = 1.0


class Trained(NamedTuple):
    """columns: float32 [H, k], the memory's active columns after the edit. activations: float32 [T, k], the edit's
    masked activations in the bare prompt, to be remembered for later edits. loss: nats per target token."""

    columns: torch.Tensor
    activations: torch.Tensor
    loss: float
    steps: int


def train_edit(
    base: BaseModel,
    past: FrozenPast,
    questions: Sequence[Sequence[int]],
    answer: Sequence[int],
    columns: torch.Tensor,
    weights: torch.Tensor,
    used: torch.Tensor,
    training: Training,
) -> Trained:
    """Train one edit, each of B questions after its own context of `past`.

    questions: for each context the token ids from the question's first token to the end of the prompt; the first is
    the prompt as it is. answer: target ids and the end token. columns: int64 [k], the mask's
    positions. weights: float32 [H, k], the memory's columns there. used: float32 [k, k], C on those columns.
    """
    inputs, lengths = _inputs(base, past, questions, answer)
    hidden, activations = frozen_run(base, inputs)
    kept, labels = _labels(questions, answer, base.device)
    real = torch.arange(int(lengths.max()), device=base.device) < lengths[:, None]
    seen = activations[..., columns].float() * real[..., None]  # the padding must span no direction
    rows = seen.flatten(0, 1)
    basis = _basis(rows, used, training.ridge)
    features = rows @ basis.T
    before = rows @ weights.T
    change = torch.zeros(len(basis), base.h, device=base.device, requires_grad=True)

    def delta(a: torch.Tensor) -> torch.Tensor:
        return (before + features @ change).view(*a.shape[:2], -1).to(a.dtype)

    steps, value = 0, float("inf")
    with run_from_block(base, hidden, delta) as model, torch.enable_grad():
        for steps in range(training.max_steps + 1):
            logits = model(**inputs, logits_to_keep=kept).logits
            loss = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
            value = loss.item()
            if value < training.stop_loss or steps == training.max_steps:
                break
            (gradient,) = torch.autograd.grad(loss, change)
            with torch.no_grad():
                change -= value / gradient.square().sum().clamp_min(1e-20) * gradient
    return Trained(weights + change.detach().T @ basis, seen[0, : lengths[0]], value, steps)


def edit_activations(
    base: BaseModel, past: FrozenPast, question: Sequence[int], answer: Sequence[int], columns: torch.Tensor
) -> torch.Tensor:
    """The activations that `train_edit` returned for this edit: float32 [T, k]."""
    _, activations = frozen_run(base, _inputs(base, past.first(), [question], answer)[0])
    return activations[0][:, columns].float()


def _inputs(
    base: BaseModel, past: FrozenPast, questions: Sequence[Sequence[int]], answer: Sequence[int]
) -> tuple[dict[str, Any], torch.Tensor]:
    """Model inputs for the questions and the answer, padded on the right, and the rows' lengths int64 [B].

    The last answer token is predicted, never read.
    """
    ids, lengths = right_pad([[*question, *answer[:-1]] for question in questions], base.device)
    return past.inputs(ids), lengths


def _labels(
    questions: Sequence[Sequence[int]], answer: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions whose logits are needed, int64 [P], and what they must predict in each row, int64 [B, P]."""
    ends = [len(question) - 1 for question in questions]
    kept = torch.arange(min(ends), max(ends) + len(answer), device=device)
    labels = torch.full((len(ends), len(kept)), IGNORED, device=device)
    for row, end in enumerate(ends):
        labels[row, end - min(ends) :][: len(answer)] = torch.tensor(list(answer), device=device)
    return kept, labels


def _basis(rows: torch.Tensor, used: torch.Tensor, ridge: float) -> torch.Tensor:
    """Directions [r, k] that span what `rows` [n, k] can reach, each of unit cost under (used + ridge I) / ridge.

    A change with coefficients S in this basis costs |S|^2, so plain gradient steps on S are steepest descent in
    the metric of the module's docstring.
    """
    eye = torch.eye(len(used), device=used.device)
    preconditioned = torch.linalg.solve(used / ridge + eye, rows.T).T
    gram = rows @ preconditioned.T
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    strong = values > values[-1] * 1e-5
    return (vectors[:, strong] * values[strong].rsqrt()).T @ preconditioned
