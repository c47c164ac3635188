"""What became of edits: stored, refused by the audit, or in contradiction to others; and how far a run is."""

from __future__ import annotations

from dataclasses import dataclass, field

from memoir_retrieval.editing.conflicts import Conflicting
from memoir_retrieval.edits.record import StoredEdit

__all__ = ["Failed", "Outcome", "Progress", "TrainingStep"]


@dataclass(frozen=True)
class Failed:
    """An edit that was not stored, or that is stored although it is not answered: with `keep_failed`, or because later
    edits have overwritten it for good.

    prompt, target: of the edit.
    reason: what speaks against it.
    """

    prompt: str
    target: str
    reason: str


@dataclass
class Outcome:
    """What came of one `Editor.add` or `Editor.compact`.

    stored: the new edits, with those that a later one of the same run has replaced.
    skipped: how many the store had, came twice, or on_conflict "first" left out.
    retried: how many took a second try.
    failed: those that the audit refused, and stored ones that later edits have overwritten for good.
    conflicting: those whose question is stored in other words with another target, each with the nearest such edit, or
        with on_conflict "last" once for each that it has replaced.
    renewed: ids of stored edits that later ones had overwritten, and that were trained again.
    """

    stored: list[StoredEdit] = field(default_factory=list)
    skipped: int = 0
    retried: int = 0
    failed: list[Failed] = field(default_factory=list)
    conflicting: list[Conflicting] = field(default_factory=list)
    renewed: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """How far a run is, after every edit.

    done: edits that are dealt with.
    total: of so many.
    edit: the last one, where it was stored.
    seconds: since the start.
    """

    done: int
    total: int
    edit: StoredEdit | None
    seconds: float


@dataclass(frozen=True)
class TrainingStep:
    """How far an edit is, before every gradient step.

    step: steps that are done.
    limit: at most so many.
    loss: in nats per target token.
    goal: training ends as soon as the loss is below it.
    """

    step: int
    limit: int
    loss: float
    goal: float
