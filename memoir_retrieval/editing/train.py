"""Training one edit: the smallest change of the memory that makes the model give the target.

Three things differ from the published loop (SGD on the active columns, arXiv 2506.07899, section 3) and none from what
it stores. Everything before the token from which the residual acts, and everything below the edited block, is run once
(`forward`). The change is searched in the space that the edit's own activations span, measured by what it would do to
earlier edits: with A the activations of the edit's tokens on its k active columns and C the sum of a a^T over the
tokens of earlier edits, a change U of the columns costs tr(U (C + ridge I) U^T), so that directions which earlier edits
rely on are the last to be used. Tokens of other questions about the edit's subject count there too, as if edits relied
on them, so an edit does little where it is not asked for. And the step is Polyak's, loss over squared gradient, which
needs no learning rate; nearer to the answer, where cross entropy falls off exponentially, it is Newton's on the
logarithm of the loss, up to twice as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from memoir_retrieval.editing.outcome import TrainingStep
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.model.forward import (
    Before,
    FrozenPast,
    first_block,
    frozen_run,
    frozen_states,
    right_pad,
    run_with_added,
    span_mean,
)
from memoir_retrieval.question.span import Span
from memoir_retrieval.store.settings import Training

IGNORED = -100  # what cross entropy leaves out
NEAR = 5.0  # nats below which longer steps were measured to do no harm (docs)

__all__ = ["EditRows", "Frozen", "Lesson", "Trained", "Use", "Wording", "answered", "freeze", "train_edits"]


class Trained(NamedTuple):
    """The memory's columns after the edit.

    columns: int64 [n], which.
    weights: float32 [H, n], what they hold.
    loss: nats per target token, over all wordings.
    steps: of the gradient.
    lead: by how much, in nats, the right token is ahead of every other where it is least so, in the wordings that have
        masks of their own; below 0 where it is not the first choice.
    """

    columns: torch.Tensor
    weights: torch.Tensor
    loss: float
    steps: int
    lead: float

    @property
    def finite(self) -> bool:
        """Whether training gave numbers that a store may hold."""
        return math.isfinite(self.loss) and bool(self.weights.isfinite().all())


class Wording(NamedTuple):
    """A row that an edit is trained on.

    context: which one stands before it.
    ids: from the question's first token to the end of the prompt.
    acts: the position among them from which on the residual acts.
    answer: what follows; its last token is predicted and never read.
    """

    context: int
    ids: list[int]
    acts: int
    answer: list[int]


@dataclass(frozen=True)
class Frozen:
    """B rows, each a question and its answer, run as far as an edit cannot change them.

    What follows is of the T tokens on which the residual acts.

    ids: int64 [B, T].
    lengths: int64 [B], without padding.
    before: what stands before them in each row.
    hidden: [B, T, H], what enters `first_block`.
    activations: [B, T, D], what enters the edited projection.
    labels: int64 [B, T], the token that each position must predict, or -100.
    masks: bool [B, D], each row's own, all ones until `masked`.
    pooled: so many of the rows, the first ones, have masks of their own.
    other: so many, the last ones, have an answer in another form, such as in JSON.
    spared: [S, D], what enters the edited projection at tokens where the edit should do little.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    before: list[Before]
    hidden: torch.Tensor
    activations: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor
    pooled: int = 0
    other: int = 0
    spared: torch.Tensor | None = None

    def masked(self, masks: torch.Tensor) -> Frozen:
        """The same rows with masks.

        masks: bool [B, D].
        """
        return replace(self, masks=masks)

    def with_shared(self, shared: FrozenPast, own: FrozenPast) -> Frozen:
        """The same rows, which hold of the contexts those of all edits, and this edit's own for itself.

        shared: the first of the contexts that they were run after.
        own: the one behind these.
        """
        n = len(shared.lengths)
        before = [
            row._replace(past=own, context=row.context - n, own=True) if row.context >= n else row._replace(past=shared)
            for row in self.before
        ]
        return replace(self, before=before)

    @property
    def real(self) -> torch.Tensor:
        """Which tokens are none of the padding: bool [B, T]."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    @property
    def rows(self) -> EditRows:
        """Those that are asked again later, which have masks of their own, and those that answer in another form."""
        others = range(len(self.lengths) - self.other, len(self.lengths))
        return EditRows([self._lesson(row) for row in range(self.pooled)], [self._use(row) for row in others])

    def _use(self, row: int) -> Use:
        columns = self.masks[row].nonzero()[:, 0]
        return Use(columns, self.activations[row, : int(self.lengths[row]), columns].float())

    def _lesson(self, row: int) -> Lesson:
        n = int(self.lengths[row])
        use = self._use(row)
        states = [(keys.clone(), values.clone()) for keys, values in self.before[row].states]
        return Lesson(
            ids=self.ids[row, :n].clone(),
            labels=self.labels[row, :n].clone(),
            hidden=self.hidden[row, :n].clone(),
            columns=use.columns,
            activations=use.activations,
            before=self.before[row]._replace(states=states),
        )


class Use(NamedTuple):
    """What one row of an edit uses of a memory.

    columns: int64 [k], the mask's positions.
    activations: float32 [T, k], on these columns.
    """

    columns: torch.Tensor
    activations: torch.Tensor


class Lesson(NamedTuple):
    """One row of an edit: what is needed to ask it again without running what is frozen.

    ids, labels: int64 [T], see `Frozen`.
    hidden: [T, H].
    columns: int64 [k], the mask's positions.
    activations: float32 [T, k], on these columns.
    before: see `Before`.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    hidden: torch.Tensor
    columns: torch.Tensor
    activations: torch.Tensor
    before: Before


class EditRows(NamedTuple):
    """What a memory must leave alone of an edit.

    lessons: rows that are asked again.
    uses: of rows that are not.
    """

    lessons: list[Lesson]
    uses: Sequence[Use] = ()

    @property
    def nbytes(self) -> int:
        """What its own tensors take, which excludes contexts that other edits share."""
        own = [tensor for lesson in self.lessons for pair in lesson.before.states for tensor in pair]
        own += [tensor for row in (*self.lessons, *self.uses) for tensor in row if isinstance(tensor, torch.Tensor)]
        pasts = {id(before.past): before.past for before in (row.before for row in self.lessons) if before.own}
        return sum(tensor.nbytes for tensor in own) + sum(past.nbytes for past in pasts.values())


def freeze(
    base: BaseModel,
    past: FrozenPast,
    wordings: Sequence[Wording],
    pooled: Sequence[Span] = (),
    other: int = 0,
    quick: AbstractContextManager[Any] | None = None,
    spared: Sequence[Wording] = (),
) -> tuple[Frozen, list[torch.Tensor]]:
    """Run questions and answers up to the edited block, and above it what stands before the residual acts.

    base: the model.
    past: the contexts that the wordings name.
    wordings: the rows.
    pooled: spans of the first wordings, whose means make fingerprints. These are run apart from the others, those of
        one question in different contexts together, so that a mean is the same whatever it is trained with.
    other: see `Frozen`.
    quick: entered while those without spans are run.
    spared: prompts on which the residual should do little; they have no answers.

    Returns the rows and the means, float32 [D] each.
    """
    rows: list[_Row] = []
    for _, group in groupby(wordings[: len(pooled)], key=lambda wording: wording.ids):
        rows += _run_rows(base, past, list(group))
    means = [span_mean(row.activations, span) for row, span in zip(rows, pooled, strict=True)]
    with quick or nullcontext():
        if others := [*wordings[len(pooled) :], *spared]:
            rows += _run_rows(base, past, others)
        rows, beside = rows[: len(wordings)], rows[len(wordings) :]
        states = _states(base, past, wordings, [row.hidden for row in rows])
    acting = [row.activations[wording.acts :] for wording, row in zip(spared, beside, strict=True)]
    ids, lengths = right_pad(
        [[*wording.ids[wording.acts :], *wording.answer[:-1]] for wording in wordings], base.device
    )
    hidden, activations = (
        pad_sequence([part[wording.acts :] for wording, part in zip(wordings, parts, strict=True)], batch_first=True)
        for parts in ([row.hidden for row in rows], [row.activations for row in rows])
    )
    return Frozen(
        ids=ids,
        lengths=lengths,
        before=[Before(past, wording.context, part) for wording, part in zip(wordings, states, strict=True)],
        hidden=hidden,
        activations=activations,
        labels=_labels(ids, wordings),
        masks=torch.ones(len(wordings), base.d, dtype=torch.bool, device=base.device),
        pooled=len(pooled),
        other=other,
        spared=torch.cat(acting) if acting else None,
    ), means


class _Row(NamedTuple):
    """Of the tokens of one row what enters `first_block`, [T, H], and the edited projection, [T, D]."""

    hidden: torch.Tensor
    activations: torch.Tensor


def _run_rows(base: BaseModel, past: FrozenPast, wordings: Sequence[Wording]) -> list[_Row]:
    ids, lengths = right_pad([[*wording.ids, *wording.answer[:-1]] for wording in wordings], base.device)
    before = past.take([wording.context for wording in wordings])
    hidden, activations = frozen_run(base, before.inputs(ids), above=first_block(base) > base.layer)
    return [_Row(hidden[i, :n], activations[i, :n]) for i, n in enumerate(lengths.tolist())]


def _states(
    base: BaseModel, past: FrozenPast, wordings: Sequence[Wording], hidden: Sequence[torch.Tensor]
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Of each row the `states` of `Before`."""
    if not any(wording.acts for wording in wordings):
        return [[] for _ in wordings]
    # The same question may be answered in several forms.
    questions = [(wording.context, tuple(wording.ids[: wording.acts])) for wording in wordings]
    first = {question: row for row, question in reversed([*enumerate(questions)])}
    rows = sorted(first.values())
    ids, _ = right_pad([wordings[row].ids[: wordings[row].acts] for row in rows], base.device)
    inputs = pad_sequence([hidden[row][: wordings[row].acts] for row in rows], batch_first=True)
    layers = frozen_states(base, past.take([wordings[row].context for row in rows]), ids, inputs)
    place = {question: rows.index(row) for question, row in first.items()}
    return [
        [(keys[i, :, : wording.acts], values[i, :, : wording.acts]) for keys, values in layers] if wording.acts else []
        for wording, i in zip(wordings, (place[question] for question in questions), strict=True)
    ]


def train_edits(
    base: BaseModel,
    edits: Sequence[tuple[Frozen, torch.Tensor, torch.Tensor]],
    training: Training,
    watch: Callable[[TrainingStep], None] = lambda _: None,
) -> list[Trained]:
    """Train edits of as many memories side by side: each as if alone but for rounding, in fewer, larger products.

    base: the model.
    edits: of each the rows it is trained on, its memory, float32 [H, D], and that memory's C, float32 [D, D]. One that
        has learnt enough leaves the others.
    training: how.
    watch: called at each step, with the largest loss.

    An edit whose numbers overflow ends there; see `Trained.finite`.
    """
    searches = [_ChangeSearch(*edit, training.ridge) for edit in edits]
    left, steps = [search for search in searches if search.steps < 0], 0
    while left:
        together = _side_by_side([search.frozen for search in left])
        wanted = together.labels != IGNORED
        labels, before = together.labels[wanted], Before.side_by_side(together.before, first_block(base))
        counts = [int((search.frozen.labels != IGNORED).sum()) for search in left]

        with run_with_added(base, before, together.ids, together.hidden, wanted) as logits, torch.enable_grad():
            while all(search.steps < 0 for search in left):
                added = torch.cat([_longer(search.added(), together.ids.shape[1]) for search in left])
                scores = logits(added).float()
                losses = functional.cross_entropy(scores, labels, reduction="none")
                means = torch.stack([part.mean() for part in losses.split(counts)])
                watch(TrainingStep(steps, training.max_steps, means.max().item(), training.stop_loss))
                parts = zip(scores.detach().split(counts), labels.split(counts), strict=True)
                for search, value, part in zip(left, means.tolist(), parts, strict=True):
                    search.loss = value
                    if value < training.stop_loss or steps == training.max_steps or not math.isfinite(value):
                        search.end(steps, *part)
                going = [search for search in left if search.steps < 0]
                if going:
                    gradients = torch.autograd.grad(means.sum(), [search.change for search in going])
                    for search, gradient in zip(going, gradients, strict=True):
                        search.step(gradient, training.stop_loss)
                steps += 1
        left = going
    return [search.trained() for search in searches]


class _ChangeSearch:
    """The change of one memory that an edit is looking for."""

    def __init__(self, frozen: Frozen, weight: torch.Tensor, used: torch.Tensor, ridge: float):
        self.frozen = frozen
        self.steps, self.loss, self._lead = -1, math.inf, -math.inf  # steps: below 0 until the search has ended
        self.columns = frozen.masks.any(0).nonzero()[:, 0]
        self._weights = weight[:, self.columns]
        # Each row acts on the columns of its own mask; the padding must span no direction.
        self._real = frozen.real
        rows = (frozen.activations[..., self.columns].float() * frozen.masks[:, None, self.columns])[self._real]
        used = used[self.columns[:, None], self.columns]
        if frozen.spared is not None:
            spared = frozen.spared[:, self.columns].float() * frozen.masks[0, self.columns]
            used = used + spared.T @ spared
        basis = _basis(rows, used, ridge)
        if basis is None:
            self.steps, self.loss, basis = 0, math.nan, rows[:0]
        self._basis = basis
        self._features = rows @ self._basis.T
        self._before = rows @ self._weights.T
        self.change = torch.zeros(len(self._basis), len(weight), device=weight.device, requires_grad=True)

    def added(self) -> torch.Tensor:
        """What the memory as it is now adds to the projection's output: float32 [B, T, H]."""
        rows = self._before + self._features @ self.change
        return rows.new_zeros(*self._real.shape, rows.shape[1]).masked_scatter(self._real[..., None], rows)

    @torch.no_grad()
    def step(self, gradient: torch.Tensor, stop_loss: float) -> None:
        length = self.loss / gradient.square().sum().clamp_min(1e-20)
        if self.loss < NEAR:
            length *= min(2.0, max(1.0, math.log(self.loss / (0.85 * stop_loss))))
        self.change -= length * gradient

    def end(self, steps: int, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """scores: float32 [n, V], the logits of what the n labels say."""
        self.steps = steps
        if n := int((self.frozen.labels[: self.frozen.pooled] != IGNORED).sum()):
            right = scores[:n].gather(1, labels[:n, None])
            others = scores[:n].scatter(1, labels[:n, None], -math.inf).amax(1, keepdim=True)
            self._lead = float((right - others).min())

    def trained(self) -> Trained:
        weights = self._weights + self.change.detach().T @ self._basis
        return Trained(self.columns, weights, self.loss, self.steps, self._lead)


def _side_by_side(parts: Sequence[Frozen]) -> Frozen:
    """The rows of several edits as one batch. Its masks and activations are not needed."""
    if len(parts) == 1:
        return parts[0]
    t = max(part.ids.shape[1] for part in parts)
    return replace(
        parts[0],
        ids=torch.cat([functional.pad(part.ids, (0, t - part.ids.shape[1])) for part in parts]),
        lengths=torch.cat([part.lengths for part in parts]),
        before=[row for part in parts for row in part.before],
        hidden=torch.cat([_longer(part.hidden, t) for part in parts]),
        labels=torch.cat([functional.pad(part.labels, (0, t - part.ids.shape[1]), value=IGNORED) for part in parts]),
    )


@torch.no_grad()
def answered(base: BaseModel, lessons: Sequence[tuple[Lesson, torch.Tensor]]) -> list[bool]:
    """Whether each lesson's answer is the model's first choice at every token of it.

    base: the model.
    lessons: each with the memory that answers it, float32 [H, D].
    """
    if not lessons:
        return []
    rows = [row for row, _ in lessons]
    ids, labels, hidden, added = (
        pad_sequence(parts, batch_first=True, padding_value=padding)
        for parts, padding in (
            ([row.ids for row in rows], 0),
            ([row.labels for row in rows], IGNORED),
            ([row.hidden for row in rows], 0),
            ([row.activations @ weight[:, row.columns].T for row, weight in lessons], 0),
        )
    )
    wanted = labels != IGNORED
    before = Before.side_by_side([row.before for row in rows], first_block(base))
    with run_with_added(base, before, ids, hidden, wanted) as logits:
        right = logits(added).argmax(-1) == labels[wanted]
    return [bool(part.all()) for part in right.split(wanted.sum(1).tolist())]


def _labels(ids: torch.Tensor, wordings: Sequence[Wording]) -> torch.Tensor:
    """What each position must predict, or -100: int64 [B, T]. ids: those on which the residual acts, padded."""
    labels = torch.full_like(ids, IGNORED)
    for row, wording in enumerate(wordings):
        first = len(wording.ids) - wording.acts - 1
        labels[row, first:][: len(wording.answer)] = torch.tensor(wording.answer, device=ids.device)
    return labels


def _longer(rows: torch.Tensor, t: int) -> torch.Tensor:
    """Rows [B, T, ...] padded with zeros to t tokens."""
    return functional.pad(rows, (0, 0, 0, t - rows.shape[1]))


def _basis(rows: torch.Tensor, used: torch.Tensor, ridge: float) -> torch.Tensor | None:
    """Directions [r, k] that span what `rows` [n, k] can reach, each of unit cost under (used + ridge I) / ridge.

    A change with coefficients S in this basis costs |S|^2, so plain gradient steps on S are steepest descent in
    the metric of the module's docstring.

    None where activations overflow, or are so large beside the ridge that rounding hides it.
    """
    eye = torch.eye(len(used), device=used.device)
    factor, failed = torch.linalg.cholesky_ex(used / ridge + eye)
    preconditioned = torch.cholesky_solve(rows.T, factor).T
    gram = rows @ preconditioned.T
    if failed or not gram.isfinite().all():
        return None
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    strong = values > values[-1] * 1e-5
    return (vectors[:, strong] * values[strong].rsqrt()).T @ preconditioned
