"""What became of edits: stored, refused by the audit, or in contradiction to others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from memoir_retrieval.edits.record import Edit, StoredEdit, prompt_key
from memoir_retrieval.errors import EditFileError

__all__ = [
    "SAME_QUESTION",
    "Conflict",
    "Conflicting",
    "Failed",
    "Outcome",
    "Progress",
    "TrainingStep",
    "plan",
    "same_edit",
]

Conflict = Literal["refuse", "first", "last", "both"]

SAME_QUESTION = 0.85
"""Overlap from which on two prompts count as one question in other words (docs/measurements.md)."""


@dataclass(frozen=True)
class Failed:
    """An edit that was not stored, or with `keep_failed` stored although `reason` speaks against it."""

    prompt: str
    target: str
    reason: str


@dataclass(frozen=True)
class Conflicting:
    """An edit whose question an edit of the store answers otherwise, found by the overlap of their masks."""

    prompt: str
    target: str
    stored: StoredEdit
    overlap: float


@dataclass
class Outcome:
    """The end of one `Editor.add`. `skipped`: edits that the store had, or that on_conflict "first" left out."""

    stored: list[StoredEdit] = field(default_factory=list)
    skipped: int = 0
    retried: int = 0
    failed: list[Failed] = field(default_factory=list)
    conflicting: list[Conflicting] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """Told after every edit. `done` of `total` are dealt with; `edit` is the last one stored; `seconds` since the
    start."""

    done: int
    total: int
    edit: StoredEdit | None
    seconds: float


@dataclass(frozen=True)
class TrainingStep:
    """Told before every gradient step of an edit. `step` of at most `limit` are done; training ends as soon as `loss`,
    in nats a target token, is below `goal`."""

    step: int
    limit: int
    loss: float
    goal: float


def plan(
    edits: Sequence[Edit], stored: Sequence[StoredEdit], on_conflict: Conflict
) -> tuple[list[Edit], dict[str, StoredEdit]]:
    """The edits to train, and by question (`prompt_key`) the stored edits which they replace.

    Raises EditFileError where a stored prompt comes with another target and `on_conflict` does not settle it.
    """
    known = {prompt_key(edit.prompt): edit for edit in stored}
    todo: list[Edit] = []
    replaced: dict[str, StoredEdit] = {}
    for edit in edits:
        old = known.get(prompt_key(edit.prompt))
        if old is None:
            todo.append(edit)
        elif not old.trained:
            # Built with requirements, and trained from a file that says nothing of them: they still hold.
            kept = edit if edit.requires else msgspec.structs.replace(edit, requires=old.requires)
            todo.append(kept)
            replaced[prompt_key(edit.prompt)] = old
        elif same_edit(old, edit) or on_conflict == "first":
            continue
        elif on_conflict == "last":
            todo.append(edit)
            replaced[prompt_key(edit.prompt)] = old
        else:
            why = " (one question cannot keep both)" if on_conflict == "both" else ""
            what = "target" if old.target != edit.target else "requires"
            raise EditFileError(
                f"prompt {edit.prompt!r} is stored with {what} {_told(old, what)} (edit {old.id}), the file says "
                f"{_told(edit, what)}: choose with --on-conflict first (keep the stored one) or last (replace it){why}"
            )
    return todo, replaced


def same_edit(stored: StoredEdit, edit: Edit) -> bool:
    """Whether a stored edit is the given one: it has the same prompt, target and requirements."""
    same = prompt_key(stored.prompt) == prompt_key(edit.prompt)
    return same and stored.target == edit.target and stored.requires == edit.requires


def _told(edit: Edit | StoredEdit, what: str) -> str:
    value = getattr(edit, what)
    return repr(value) if isinstance(value, str) else msgspec.json.encode(value).decode()
