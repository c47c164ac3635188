"""Training one edit: the smallest change of the memory that makes the model give the target.

Three things differ from the published loop (SGD on the active columns, arXiv 2506.07899, section 3) and none from
what it stores. Everything before the question and below the edited block is run once (`forward`). The change is
searched in the space that the edit's own activations span, measured by what it would do to earlier edits: with A
the activations of the edit's tokens on its k active columns and C the sum of a a^T over the tokens of earlier
edits, a change U of the columns costs tr(U (C + ridge I) U^T), so that directions which earlier edits rely on are
the last to be used. And the step is Polyak's, loss over squared gradient, which needs no learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from memoir_retrieval.forward import FrozenPast, frozen_run, right_pad, run_from_block
from memoir_retrieval.model import BaseModel
from memoir_retrieval.outcome import Step

IGNORED = -100  # what cross entropy leaves out

__all__ = ["Frozen", "Lesson", "Trained", "Training", "answered", "freeze", "train_edit"]


@dataclass(frozen=True)
class Training:
    """How edits are trained.

    An edit is trained on the bare prompt, after each of `contexts` contexts (see the module of that name), and on
    `variants` of the prompt in which each question token is replaced by a random one with probability `noise`: a
    stand-in for rephrasings.
    max_steps, stop_loss: training ends at the step limit or below this mean loss (nats per target token).
    ridge: what a direction costs that no earlier edit uses; small values keep earlier edits more exactly.
    edits_per_memory: a new residual memory is opened after so many; 0 leaves it to the editor.
    """

    contexts: int = 1
    variants: int = 2
    noise: float = 0.25
    max_steps: int = 60
    stop_loss: float = 0.02
    ridge: float = 1.0
    edits_per_memory: int = 0


class Trained(NamedTuple):
    """The memory's columns after the edit: `columns` int64 [n] says which, `weights` float32 [H, n] what they hold.

    loss: nats per target token, over all wordings.
    """

    columns: torch.Tensor
    weights: torch.Tensor
    loss: float
    steps: int


@dataclass(frozen=True)
class Frozen:
    """B rows of T tokens, each a question and its answer, run up to the edited block.

    inputs: what the model is called with. lengths: int64 [B], without padding. hidden: [B, T, H], what enters the
    edited block; activations: [B, T, D], what enters its projection. kept: int64 [P], the positions whose logits are
    needed; labels: int64 [B, P], the token that each must predict, or -100. masks: bool [B, D], each row's own, all
    ones until `masked`.
    """

    inputs: dict[str, Any]
    lengths: torch.Tensor
    hidden: torch.Tensor
    activations: torch.Tensor
    kept: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor

    def masked(self, masks: torch.Tensor) -> Frozen:
        """The same rows with masks: bool [B, D]."""
        return replace(self, masks=masks)

    @property
    def real(self) -> torch.Tensor:
        """Which tokens are none of the padding: bool [B, T]."""
        return torch.arange(self.hidden.shape[1], device=self.hidden.device) < self.lengths[:, None]

    def lesson(self, row: int, answer: Sequence[int], past: FrozenPast) -> Lesson:
        """A row to be asked again later."""
        n = int(self.lengths[row])
        columns = self.masks[row].nonzero()[:, 0]
        ids = self.inputs["input_ids"][row, :n].tolist()
        activations = self.activations[row, :n, columns].float()
        return Lesson(ids, list(answer), self.hidden[row, :n].clone(), columns, activations, past)


class Lesson(NamedTuple):
    """One row of an edit: what is needed to ask it again without running what is frozen.

    ids: question and answer without its end; answer: with it. hidden: [T, H]. columns: int64 [k], the mask's
    positions. activations: float32 [T, k], on these columns. past: the one context before the question.
    """

    ids: list[int]
    answer: list[int]
    hidden: torch.Tensor
    columns: torch.Tensor
    activations: torch.Tensor
    past: FrozenPast


def freeze(
    base: BaseModel,
    past: FrozenPast,
    questions: Sequence[Sequence[int]],
    answer: Sequence[int],
    exact: int = 1,
    quick: AbstractContextManager[Any] | None = None,
) -> Frozen:
    """Run questions, each after its own context of `past`, and the answer up to the edited block.

    questions: token ids from the question's first token to the end of the prompt. answer: target ids and the end
    token, which is predicted, never read. exact: rows at the front whose activations make fingerprints; each is run
    alone, so that it is the same whatever it is trained with. quick: entered while the others are run.
    """
    ids, lengths = right_pad([[*question, *answer[:-1]] for question in questions], base.device)
    parts = [frozen_run(base, past.take([i]).inputs(ids[i : i + 1, : int(lengths[i])])) for i in range(exact)]
    if len(questions) > exact:
        with quick or nullcontext():
            parts.append(frozen_run(base, past.take(range(exact, len(questions))).inputs(ids[exact:])))
    hidden, activations = (
        torch.cat([functional.pad(part[i], (0, 0, 0, ids.shape[1] - part[i].shape[1])) for part in parts])
        for i in (0, 1)
    )
    kept, labels = _labels([len(question) for question in questions], [answer] * len(questions), base.device)
    masks = torch.ones(len(questions), base.d, dtype=torch.bool, device=base.device)
    return Frozen(past.inputs(ids), lengths, hidden, activations, kept, labels, masks)


def train_edit(
    base: BaseModel,
    frozen: Frozen,
    weight: torch.Tensor,
    used: torch.Tensor,
    training: Training,
    watch: Callable[[Step], None] = lambda _: None,
) -> Trained:
    """Train one edit on all rows of `frozen`.

    weight: float32 [H, D], the memory. used: float32 [D, D], C. watch: told of each step.
    """
    columns = frozen.masks.any(0).nonzero()[:, 0]
    # Each row acts on the columns of its own mask; the padding must span no direction.
    seen = frozen.activations[..., columns].float() * frozen.masks[:, None, columns] * frozen.real[..., None]
    rows = seen.flatten(0, 1)
    basis = _basis(rows, used[columns[:, None], columns], training.ridge)
    features = rows @ basis.T
    before = rows @ weight[:, columns].T
    change = torch.zeros(len(basis), base.h, device=base.device, requires_grad=True)

    def delta(a: torch.Tensor) -> torch.Tensor:
        return (before + features @ change).view(*a.shape[:2], -1).to(a.dtype)

    steps, value = 0, float("inf")
    with run_from_block(base, frozen.hidden, delta) as model, torch.enable_grad():
        for steps in range(training.max_steps + 1):
            logits = model(**frozen.inputs, logits_to_keep=frozen.kept).logits
            loss = functional.cross_entropy(logits.float().flatten(0, 1), frozen.labels.flatten())
            value = loss.item()
            watch(Step(steps, training.max_steps, value, training.stop_loss))
            if value < training.stop_loss or steps == training.max_steps:
                break
            (gradient,) = torch.autograd.grad(loss, change)
            with torch.no_grad():
                change -= value / gradient.square().sum().clamp_min(1e-20) * gradient
    return Trained(columns, weight[:, columns] + change.detach().T @ basis, value, steps)


@torch.no_grad()
def answered(base: BaseModel, lessons: Sequence[Lesson], weight: torch.Tensor) -> list[bool]:
    """Whether each lesson's answer is the model's first choice at every token of it.

    weight: float32 [H, D], the memory. Lessons after the same context share a pass.
    """
    together: dict[int, list[int]] = {}
    for i, one in enumerate(lessons):
        together.setdefault(id(one.past), []).append(i)
    right = [False] * len(lessons)
    for group in together.values():
        for i, found in zip(group, _answered(base, [lessons[i] for i in group], weight), strict=True):
            right[i] = found
    return right


def _answered(base: BaseModel, lessons: Sequence[Lesson], weight: torch.Tensor) -> list[bool]:
    ids, _ = right_pad([one.ids for one in lessons], base.device)
    questions = [len(one.ids) - len(one.answer) + 1 for one in lessons]
    kept, labels = _labels(questions, [one.answer for one in lessons], base.device)

    def padded(rows: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([functional.pad(row, (0, 0, 0, ids.shape[1] - len(row))) for row in rows])

    hidden = padded([one.hidden for one in lessons])
    added = padded([one.activations @ weight[:, one.columns].T for one in lessons])
    inputs = lessons[0].past.take([0] * len(lessons)).inputs(ids)
    with run_from_block(base, hidden, lambda a: added.to(a.dtype)) as model:
        chosen = model(**inputs, logits_to_keep=kept).logits.argmax(-1)
    return ((chosen == labels) | (labels == IGNORED)).all(1).tolist()


def _labels(
    lengths: Sequence[int], answers: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions whose logits are needed, int64 [P], and what they must predict in each row, int64 [B, P].

    lengths: tokens of each question, which its answer follows.
    """
    first = min(lengths) - 1
    last = max(n - 1 + len(answer) for n, answer in zip(lengths, answers, strict=True))
    labels = torch.full((len(lengths), last - first), IGNORED, device=device)
    for row, (n, answer) in enumerate(zip(lengths, answers, strict=True)):
        labels[row, n - 1 - first :][: len(answer)] = torch.tensor(list(answer), device=device)
    return torch.arange(first, last, device=device), labels


def _basis(rows: torch.Tensor, used: torch.Tensor, ridge: float) -> torch.Tensor:
    """Directions [r, k] that span what `rows` [n, k] can reach, each of unit cost under (used + ridge I) / ridge.

    A change with coefficients S in this basis costs |S|^2, so plain gradient steps on S are steepest descent in
    the metric of the module's docstring.
    """
    eye = torch.eye(len(used), device=used.device)
    factor = torch.linalg.cholesky(used / ridge + eye)
    preconditioned = torch.cholesky_solve(rows.T, factor).T
    gram = rows @ preconditioned.T
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    strong = values > values[-1] * 1e-5
    return (vectors[:, strong] * values[strong].rsqrt()).T @ preconditioned
