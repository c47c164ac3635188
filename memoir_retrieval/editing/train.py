"""Training one edit: the smallest change of the memory that makes the model give the target.

Three things differ from the published loop (SGD on the active columns, arXiv 2506.07899, section 3) and none from
what it stores. Everything before the question and below the edited block is run once (`forward`). The change is
searched in the space that the edit's own activations span, measured by what it would do to earlier edits: with A
the activations of the edit's tokens on its k active columns and C the sum of a a^T over the tokens of earlier
edits, a change U of the columns costs tr(U (C + ridge I) U^T), so that directions which earlier edits rely on are
the last to be used. And the step is Polyak's, loss over squared gradient, which needs no learning rate; nearer to the
answer, where cross entropy falls off exponentially, it is Newton's on the logarithm of the loss, up to twice as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from memoir_retrieval.editing.outcome import TrainingStep
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.model.forward import FrozenPast, frozen_run, right_pad, run_from_block

IGNORED = -100  # what cross entropy leaves out
NEAR = 5.0  # nats below which longer steps were measured to do no harm (docs)

__all__ = ["Frozen", "Lesson", "Trained", "Training", "answered", "freeze", "train_edits"]


@dataclass(frozen=True)
class Training:
    """How edits are trained.

    An edit is trained on the bare prompt, after each of `contexts` contexts (see the module of that name), and on
    `variants` of the prompt in which each question token is replaced by a random one with probability `noise`: a
    stand-in for rephrasings. What the edit requires (see `names`) stands in all of them.
    context_masks: after so many of the contexts a question has a mask of its own, which finds the edit in chats that
    have begun; none for raw prompts and under the span rule "all", where what is pooled is not the question alone.
    max_steps, stop_loss: training ends at the step limit or below this mean loss (nats per target token).
    ridge: what a direction costs that no earlier edit uses; small values keep earlier edits more exactly.
    edits_per_memory: a new residual memory is opened after so many; 0 leaves it to the editor.
    """

    contexts: int = 1
    context_masks: int = 1
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

    ids: int64 [B, T]. lengths: int64 [B], without padding. contexts: which context of `past` stands before each row.
    acts: int64 [B], the position in each row from which on the residual acts. hidden: [B, T, H], what enters the edited
    block; activations: [B, T, D], what enters its projection. labels: int64 [B, T], the token that each position must
    predict, or -100. masks: bool [B, D], each row's own, all ones until `masked`.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    past: FrozenPast
    contexts: list[int]
    acts: torch.Tensor
    hidden: torch.Tensor
    activations: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor

    def masked(self, masks: torch.Tensor) -> Frozen:
        """The same rows with masks: bool [B, D]."""
        return replace(self, masks=masks)

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model is called with."""
        return self.past.take(self.contexts).inputs(self.ids)

    @property
    def acting(self) -> torch.Tensor:
        """On which tokens the residual acts, none of the padding: bool [B, T]."""
        positions = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (positions >= self.acts[:, None]) & (positions < self.lengths[:, None])

    def lesson(self, row: int, answer: Sequence[int]) -> Lesson:
        """A row to be asked again later."""
        n = int(self.lengths[row])
        columns = self.masks[row].nonzero()[:, 0]
        ids = self.ids[row, :n].tolist()
        activations = self.activations[row, :n, columns].float() * self.acting[row, :n, None]
        return Lesson(
            ids, list(answer), self.hidden[row, :n].clone(), columns, activations, self.past, self.contexts[row]
        )


class Lesson(NamedTuple):
    """One row of an edit: what is needed to ask it again without running what is frozen.

    ids: question and answer without its end; answer: with it. hidden: [T, H]. columns: int64 [k], the mask's
    positions. activations: float32 [T, k], on these columns, 0 before the residual acts. past, context: the context
    before the question.
    """

    ids: list[int]
    answer: list[int]
    hidden: torch.Tensor
    columns: torch.Tensor
    activations: torch.Tensor
    past: FrozenPast
    context: int


def freeze(
    base: BaseModel,
    past: FrozenPast,
    contexts: Sequence[int],
    questions: Sequence[Sequence[int]],
    acts: Sequence[int],
    answer: Sequence[int],
    exact: int = 1,
    quick: AbstractContextManager[Any] | None = None,
) -> Frozen:
    """Run questions, each after the context of `past` that `contexts` names, and the answer up to the edited block.

    questions: token ids from the question's first token to the end of the prompt. acts: the position in each from which
    on the residual acts. answer: target ids and the end
    token, which is predicted, never read. exact: rows at the front whose activations make fingerprints; each is run
    alone, so that it is the same whatever it is trained with. quick: entered while the others are run.
    """
    ids, lengths = right_pad([[*question, *answer[:-1]] for question in questions], base.device)
    alone = [past.take([contexts[i]]).inputs(ids[i : i + 1, : int(lengths[i])]) for i in range(exact)]
    parts = [frozen_run(base, inputs) for inputs in alone]
    if len(questions) > exact:
        with quick or nullcontext():
            parts.append(frozen_run(base, past.take(contexts[exact:]).inputs(ids[exact:])))
    hidden, activations = (torch.cat([_longer(part[i], ids.shape[1]) for part in parts]) for i in (0, 1))
    labels = _labels(ids, [len(question) for question in questions], [answer] * len(questions))
    masks = torch.ones(len(questions), base.d, dtype=torch.bool, device=base.device)
    first = torch.tensor(list(acts), device=base.device)
    return Frozen(ids, lengths, past, list(contexts), first, hidden, activations, labels, masks)


def train_edits(
    base: BaseModel,
    edits: Sequence[tuple[Frozen, torch.Tensor, torch.Tensor]],
    training: Training,
    watch: Callable[[TrainingStep], None] = lambda _: None,
) -> list[Trained]:
    """Train edits of as many memories side by side: each as if alone but for rounding, in fewer, larger products.

    edits: of each the rows it is trained on, its memory, float32 [H, D], and that memory's C, float32 [D, D]. One that
    has learnt enough leaves the others. watch: told of each step, with the largest loss.
    """
    searches = [_ChangeSearch(*edit, training.ridge) for edit in edits]
    left, steps = searches, 0
    while left:
        together = _side_by_side([one.frozen for one in left])
        wanted = together.labels != IGNORED
        labels, inputs = together.labels[wanted], together.inputs
        counts = [int((one.frozen.labels != IGNORED).sum()) for one in left]

        def delta(a: torch.Tensor, left: list[_ChangeSearch] = left) -> torch.Tensor:
            return torch.cat([_longer(one.added(), a.shape[1]) for one in left]).to(a.dtype)

        with run_from_block(base, together.hidden, delta, wanted) as model, torch.enable_grad():
            while all(one.steps < 0 for one in left):
                losses = functional.cross_entropy(model(**inputs).logits[0].float(), labels, reduction="none")
                means = torch.stack([part.mean() for part in losses.split(counts)])
                watch(TrainingStep(steps, training.max_steps, means.max().item(), training.stop_loss))
                for one, value in zip(left, means.tolist(), strict=True):
                    one.loss = value
                    if value < training.stop_loss or steps == training.max_steps:
                        one.steps = steps
                going = [one for one in left if one.steps < 0]
                if going:
                    gradients = torch.autograd.grad(means.sum(), [one.change for one in going])
                    for one, gradient in zip(going, gradients, strict=True):
                        one.step(gradient, training.stop_loss)
                steps += 1
        left = going
    return [one.trained() for one in searches]


class _ChangeSearch:
    """The change of one memory that an edit is looking for."""

    def __init__(self, frozen: Frozen, weight: torch.Tensor, used: torch.Tensor, ridge: float):
        self.frozen = frozen
        self.steps, self.loss = -1, float("inf")  # steps: below 0 until the search has ended
        self.columns = frozen.masks.any(0).nonzero()[:, 0]
        self._weights = weight[:, self.columns]
        # Each row acts on the columns of its own mask; what does not act spans no direction.
        self._acting = frozen.acting
        rows = (frozen.activations[..., self.columns].float() * frozen.masks[:, None, self.columns])[self._acting]
        self._basis = _basis(rows, used[self.columns[:, None], self.columns], ridge)
        self._features = rows @ self._basis.T
        self._before = rows @ self._weights.T
        self.change = torch.zeros(len(self._basis), len(weight), device=weight.device, requires_grad=True)

    def added(self) -> torch.Tensor:
        """What the memory as it is now adds to the projection's output: float32 [B, T, H]."""
        acting = self._before + self._features @ self.change
        return acting.new_zeros(*self._acting.shape, acting.shape[1]).masked_scatter(self._acting[..., None], acting)

    @torch.no_grad()
    def step(self, gradient: torch.Tensor, stop_loss: float) -> None:
        length = self.loss / gradient.square().sum().clamp_min(1e-20)
        if self.loss < NEAR:
            length *= min(2.0, max(1.0, math.log(self.loss / (0.85 * stop_loss))))
        self.change -= length * gradient

    def trained(self) -> Trained:
        weights = self._weights + self.change.detach().T @ self._basis
        return Trained(self.columns, weights, self.loss, self.steps)


def _side_by_side(parts: Sequence[Frozen]) -> Frozen:
    """The rows of several edits as one batch. Its masks and activations are not needed."""
    if len(parts) == 1:
        return parts[0]
    t = max(part.ids.shape[1] for part in parts)
    past, contexts = parts[0].past, [context for part in parts for context in part.contexts]
    if any(part.past is not past for part in parts):
        past, contexts = (
            reduce(FrozenPast.beside, [part.past.take(part.contexts) for part in parts]),
            [*range(len(contexts))],
        )
    return replace(
        parts[0],
        past=past,
        contexts=contexts,
        ids=torch.cat([functional.pad(part.ids, (0, t - part.ids.shape[1])) for part in parts]),
        lengths=torch.cat([part.lengths for part in parts]),
        hidden=torch.cat([_longer(part.hidden, t) for part in parts]),
        labels=torch.cat([functional.pad(part.labels, (0, t - part.ids.shape[1]), value=IGNORED) for part in parts]),
    )


@torch.no_grad()
def answered(base: BaseModel, asked: Sequence[tuple[Lesson, torch.Tensor]]) -> list[bool]:
    """Whether each lesson's answer is the model's first choice at every token of it.

    asked: lessons, each with the memory that answers it, float32 [H, D]. Those after the same contexts share a pass.
    """
    together: dict[int, list[int]] = {}
    for i, (one, _) in enumerate(asked):
        together.setdefault(id(one.past), []).append(i)
    right = [False] * len(asked)
    for group in together.values():
        for i, found in zip(group, _answered(base, [asked[i] for i in group]), strict=True):
            right[i] = found
    return right


def _answered(base: BaseModel, asked: Sequence[tuple[Lesson, torch.Tensor]]) -> list[bool]:
    lessons = [one for one, _ in asked]
    ids, _ = right_pad([one.ids for one in lessons], base.device)
    labels = _labels(ids, [len(one.ids) - len(one.answer) + 1 for one in lessons], [one.answer for one in lessons])
    wanted = labels != IGNORED

    def padded(rows: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([_longer(row[None], ids.shape[1]) for row in rows])

    hidden = padded([one.hidden for one in lessons])
    added = padded([one.activations @ weight[:, one.columns].T for one, weight in asked])
    inputs = lessons[0].past.take([one.context for one in lessons]).inputs(ids)
    with run_from_block(base, hidden, lambda a: added.to(a.dtype), wanted) as model:
        right = model(**inputs).logits[0].argmax(-1) == labels[wanted]
    return [bool(part.all()) for part in right.split([len(one.answer) for one in lessons])]


def _labels(ids: torch.Tensor, lengths: Sequence[int], answers: Sequence[Sequence[int]]) -> torch.Tensor:
    """What each position must predict, or -100: int64 [B, T]. lengths: tokens of each question, before its answer."""
    labels = torch.full_like(ids, IGNORED)
    for row, (n, answer) in enumerate(zip(lengths, answers, strict=True)):
        labels[row, n - 1 :][: len(answer)] = torch.tensor(list(answer), device=ids.device)
    return labels


def _longer(rows: torch.Tensor, t: int) -> torch.Tensor:
    """Rows [B, T, ...] padded with zeros to t tokens."""
    return functional.pad(rows, (0, 0, 0, t - rows.shape[1]))


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
