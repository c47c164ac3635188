"""Measuring a store: the paper's teacher-forced scores, and what a user sees."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from memoir_retrieval.background import shipped
from memoir_retrieval.edit import Edit, StoredEdit
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.prompts import Prompt
from memoir_retrieval.reference import Answer

__all__ = ["CONTEXTS", "Asked", "Report", "evaluate", "stored_ids"]

GENERATE_BATCH = 32
CONTEXTS = ("plain", "system", "turn")


class Asked(Protocol):
    """A model that can be asked with edits on and off: `EditedModel`, or a running server."""

    def generate(
        self, prompts: Sequence[Prompt | list[int]], *, max_new_tokens: int, edited: bool = True
    ) -> list[Answer]: ...

    def predict(
        self, prompts: Sequence[Prompt | list[int]], targets: Sequence[Sequence[int]], *, edited: bool = True
    ) -> list[Answer]: ...

    def prompt_ids(self, prompt: Prompt) -> list[int]: ...

    def target_ids(self, target: str) -> list[int]: ...


class ExactMatch(msgspec.Struct, frozen=True):
    """Greedy generation with natural stop equals the target: the share of the edits, and of their rephrasings."""

    edits: float
    rephrases: float


class Matching(msgspec.Struct, frozen=True):
    """Share of prompts and of rephrasings that match their own edit; share of unrelated prompts that match any."""

    edits_right: float
    rephrases_right: float
    false_rate: float


class Report(msgspec.Struct, frozen=True):
    """One evaluation. Scores are means over edits in [0, 1].

    reliability, generality: share of target tokens that are the model's first choice under teacher forcing, for
    the prompt and its rephrasings. locality: share of the tokens of unrelated answers whose first choice is that
    of the unedited model. A score is NaN-free: it is None where the file has nothing to measure it on.
    """

    edits: int
    reliability: float
    generality: float | None
    locality: float | None
    average: float
    exact_match: ExactMatch
    match: Matching
    tau: float
    context: str
    seconds: float


def evaluate(
    model: Asked,
    stored: Sequence[StoredEdit],
    edits: Sequence[Edit],
    *,
    tau: float,
    context: Literal["plain", "system", "turn"] = "plain",
    spare_tokens: int = 8,
) -> Report:
    """Ask a model everything that a file of edits has to ask.

    stored: the edits of the store, by which a match is right or wrong. edits: what is measured; each must be
    stored. context: asked alone, under a long system prompt, or as third turn of a conversation; neither is used
    in training. spare_tokens: how much longer than its target an answer may get
    before it is cut off. Raises ConfigError where an edit of the file is not stored.
    """
    started = time.monotonic()
    own = stored_ids(stored, edits)
    before = unseen_context(context)

    def ask(prompt: str) -> list[int]:
        return model.prompt_ids([*before, {"role": "user", "content": prompt}] if before else prompt)

    prompts = [(i, ask(edit.prompt), edit.target) for i, edit in zip(own, edits, strict=True)]
    rephrased = [(i, ask(r), edit.target) for i, edit in zip(own, edits, strict=True) for r in edit.rephrases]
    probes = [(ask(p.prompt), p.answer or "Yes") for e in edits for p in e.locality]

    reliability, edits_right = _forced(model, prompts)
    generality, rephrases_right = _forced(model, rephrased)
    locality, false_rate = _unchanged(model, probes)
    scores = [s for s in (reliability, generality, locality) if s is not None]
    return Report(
        edits=len(edits),
        reliability=reliability or 0.0,
        generality=generality,
        locality=locality,
        average=sum(scores) / len(scores),
        exact_match=ExactMatch(_exact(model, prompts, spare_tokens), _exact(model, rephrased, spare_tokens)),
        match=Matching(edits_right, rephrases_right, false_rate),
        tau=tau,
        context=context,
        seconds=round(time.monotonic() - started, 2),
    )


def stored_ids(stored: Sequence[StoredEdit], edits: Sequence[Edit]) -> list[int]:
    """The id under which each edit of a file is stored. Raises ConfigError where one is not."""
    own = {(edit.prompt, edit.target): edit.id for edit in stored}
    missing = [edit.prompt for edit in edits if (edit.prompt, edit.target) not in own]
    if not edits:
        raise ConfigError("the file has no edits: measure a store with the file it was made from")
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(edits)} edits of the file are not stored, such as {missing[0]!r}: "
            "measure a store with the file it was made from, or with fewer of its edits (--limit)"
        )
    return [own[edit.prompt, edit.target] for edit in edits]


def unseen_context(name: str) -> list[dict[str, str]]:
    """Messages to put before a question that no edit was trained with. Raises ConfigError for an unknown name."""
    if name == "plain":
        return []
    data = json.loads(shipped("unseen.json"))
    if name not in data:
        raise ConfigError(f"context {name!r} is not known: choose one of {', '.join(CONTEXTS)}")
    return data[name]


_Question = tuple[int, list[int], str]  # id of its edit, token ids, target


def _forced(model: Asked, questions: Sequence[_Question]) -> tuple[float | None, float]:
    """Mean token accuracy under teacher forcing, and the share that matched their own edit."""
    if not questions:
        return None, 0.0
    targets = [model.target_ids(target) for _, _, target in questions]
    answers = model.predict([ids for _, ids, _ in questions], targets)
    accuracy = [_same_share(a.tokens, t) for a, t in zip(answers, targets, strict=True)]
    right = [a.edit == own for a, (own, _, _) in zip(answers, questions, strict=True)]
    return _mean(accuracy), _mean(right)


def _unchanged(model: Asked, probes: Sequence[tuple[list[int], str]]) -> tuple[float | None, float]:
    """Mean share of unchanged first choices on unrelated prompts, and the share of prompts that matched an edit."""
    if not probes:
        return None, 0.0
    targets = [model.target_ids(answer) for _, answer in probes]
    prompts = [ids for ids, _ in probes]
    after = model.predict(prompts, targets)
    before = model.predict(prompts, targets, edited=False)
    same = [_same_share(a.tokens, b.tokens) for a, b in zip(after, before, strict=True)]
    return _mean(same), _mean([a.edit is not None for a in after])


def _exact(model: Asked, questions: Sequence[_Question], spare_tokens: int) -> float:
    if not questions:
        return 0.0
    # Sorted by the target's length, a batch runs no longer than its own longest answer may be.
    ordered = sorted(questions, key=lambda question: len(model.target_ids(question[2])))
    exact: list[bool] = []
    for at in range(0, len(ordered), GENERATE_BATCH):
        batch = ordered[at : at + GENERATE_BATCH]
        longest = max(len(model.target_ids(target)) for _, _, target in batch)
        answers = model.generate([ids for _, ids, _ in batch], max_new_tokens=longest + spare_tokens)
        exact += [a.text.strip() == target.strip() for a, (_, _, target) in zip(answers, batch, strict=True)]
    return _mean(exact)


def _same_share(a: Sequence[int], b: Sequence[int]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(b)


def _mean(values: Sequence[float | bool]) -> float:
    return round(sum(values) / len(values), 5)
