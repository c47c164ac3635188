"""`memoir bench routing`: which edit messages get as people write them, asked through the library's own lookup."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from memoir_retrieval.editing.build_masks import build
from memoir_retrieval.editing.editor import Editor
from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.evaluation.datasets import QUESTIONS, TEXT
from memoir_retrieval.evaluation.routing_data import (
    PUBLISHED,
    Part,
    Question,
    Trial,
    chats,
    faq,
    forms,
    opposites,
    other_questions,
    plain_questions,
    published,
    siblings,
    tasks,
    unrelated,
    writings,
)
from memoir_retrieval.evaluation.scores import holds
from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.lookup.retriever import Asked, Retriever
from memoir_retrieval.store.manifest import library_version
from memoir_retrieval.store.read import EditStore, Masks
from memoir_retrieval.store.threshold import set_tau

__all__ = ["RESULT", "SETS", "RoutingRun", "Row", "Slip", "check_sets", "run_routing", "with_candidates", "with_first"]

RESULT = "routing.json"
SETS = ("edits", "siblings", "opposites", "faq", *PUBLISHED, "unrelated")
"""What can be asked. "edits", "faq" and "unrelated" are asked of trained edits, the others of masks."""
SLIPS = 5
_NO_EDIT, _NOT_STORED = -1, -2
ANSWER_TOKENS = 16
ANSWERED = ("plain", "chat", "faq", "other question")
"""Kinds of questions whose free answers are read, unless all are."""


class Slip(msgspec.Struct, frozen=True):
    """A message that got another edit than it must.

    message: the text; of a chat all of them, " / " between.
    edit: id of the edit that acted; None where none did.
    overlap: with its mask, or the nearest where none acted, in [0, 1]; None where there is none.
    """

    message: str
    edit: int | None
    overlap: float | None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Questions of one name in one part. Shares are of all of them.

    set, kind, name: what was asked.
    part: "tune" or "report".
    edits: how many the store has.
    tau: at which it was asked.
    asked: how many questions.
    found: the share that gets the edit it asks for; None where no edit may act.
    other: the share that gets an edit it does not ask for.
    exact: the share whose free answer is the target of the edit it asks for; None where no answers were read.
    answered: of those with an edit that they do not ask for, the share whose free answer has its target in it; None
    where no answers were read.
    lost: of those that do not get the edit that they ask for, how many for which reason (`Loss`); None where no edit
    may act.
    slips: examples of what went wrong.
    """

    set: str
    kind: str
    name: str
    part: Part
    edits: int
    tau: float
    asked: int
    found: float | None
    other: float
    exact: float | None = None
    answered: float | None = None
    lost: dict[str, int] | None = None
    slips: list[Slip] = []

    @property
    def matched(self) -> float:
        """The share that gets any edit."""
        return (self.found or 0.0) + self.other


class RoutingRun(msgspec.Struct, frozen=True, kw_only=True):
    """`routing.json`.

    command: that made it.
    library: version of memoir-retrieval.
    started: UTC, ISO 8601.
    model: name of the store's model.
    settings: of the store, by name.
    seconds: that the run took.
    stored: of the edits of the help page ("faq") how many training took up, and of how many; None where not asked.
    rows: what was counted.
    """

    command: str
    library: str
    started: str
    model: str
    settings: dict[str, Any]
    seconds: float
    stored: tuple[int, int] | None
    rows: list[Row]


def run_routing(
    retriever: Retriever,
    *,
    sets: Sequence[str],
    part: Part | None,
    data: Path,
    most: int,
    each: int | None,
    prompts: int,
    answers: Literal["none", "some", "all"],
    only: Sequence[str],
    first: Sequence[int],
    keep_tau: bool,
    about: int | None,
    command: str,
    tell: Callable[[str], None],
) -> RoutingRun:
    """Ask everything and count.

    retriever: of the store that "edits" and "unrelated" are asked of; the other sets get stores with its settings, in a
    temporary folder.
    sets: names out of `SETS`.
    part: only this one; None asks both.
    data: folder of the data sets.
    most: edits of each published set, at most.
    each: questions of a row, at most, but for unrelated prompts; None asks all.
    prompts: how many unrelated ones, at most.
    answers: which free answers are read; "some": those of `ANSWERED`.
    only: ask no other rows than those of these kinds or names; empty asks all.
    first: ask "edits" and "unrelated" of so many first edits of the store, one after another; empty asks all of it.
    keep_tau: see `with_first`.
    about: ask "edits" about no more than so many first ones of each store.
    command: noted in the result.
    tell: called with a line on each set before it is asked, and on each file that it lacks.
    Raises ConfigError for a set that `data` does not have, and for more first edits than there are.
    """
    check_sets(sets, data)
    parts_of_store = [with_first(retriever, n, keep_tau=keep_tau) for n in first] or [retriever]
    began, started = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    stored: tuple[int, int] | None = None
    rows: list[Row] = []

    known: dict[str, Asked] = {}

    def ask(name: str, of: Retriever, questions: Iterable[Question], trained: bool) -> None:
        wanted = [question for question in questions if part in (None, question.part)]
        chosen = _spread([q for q in wanted if not only or {q.kind, q.name} & set(only)], each)
        tell(f"{name}: {len(chosen)} questions of {len(of.store.edits)} edits, tau {of.tau:.2f}")
        rows.extend(_rows(name, of, chosen, answers if trained else "none", known))

    for name in sets:
        if name == "edits":
            for of in parts_of_store:
                ask(name, of, _of_edits(of, of.store.edits[:about], each, only), bool(of.store.edits) and _trained(of))
        elif name == "unrelated":
            for path in (data / QUESTIONS, data / TEXT):
                if not path.is_file():
                    tell(f"{name}: without {path}, which is not there")
            for of in parts_of_store:
                ask(name, of, unrelated(data, prompts, retriever.store.edits), False)
        else:
            trial = _trial(name, data, most)
            with tempfile.TemporaryDirectory() as folder:
                editor = _editor(retriever, Path(folder) / name)
                if name == "faq":
                    of, trial = _train(editor, trial, retriever)
                    stored = len(of.store.edits), len(trial.edits)
                else:
                    with editor:
                        build(editor, trial.edits)
                    of = _opened(editor.path, retriever)
                ask(name, of, trial.questions, name == "faq")
    manifest = retriever.store.manifest
    return RoutingRun(
        command=command,
        library=library_version(),
        started=started,
        model=manifest.model,
        settings={"edits": len(retriever.store.edits), "tau": retriever.tau, "candidates": manifest.span.candidates}
        | {
            name: msgspec.to_builtins(getattr(manifest, name))
            for name in ("chat", "k", "layer", "dtype", "seed", "training")
        },
        seconds=round(time.monotonic() - began, 1),
        stored=stored,
        rows=rows,
    )


def _row(question: Question) -> tuple[str, str, Part]:
    """What the questions of one row have in common."""
    return question.kind, question.name, question.part


def _spread(questions: Sequence[Question], each: int | None) -> list[Question]:
    """At most so many questions of a row, spread over it."""
    rows: dict[tuple[str, str, Part], list[Question]] = {}
    for question in questions:
        rows.setdefault(_row(question), []).append(question)
    chosen: list[Question] = []
    for row in rows.values():
        n = len(row) if each is None or row[0].kind == "unrelated" else min(len(row), each)
        chosen += [row[i * len(row) // n] for i in range(n)]
    return chosen


def _trained(retriever: Retriever) -> bool:
    return all(edit.trained for edit in retriever.store.edits)


def check_sets(sets: Sequence[str], data: Path) -> None:
    """Raise ConfigError where the folder of the data sets lacks one of these.

    sets: names out of `SETS`.
    data: the folder.
    """
    for name in sets:
        if name in PUBLISHED and not (data / PUBLISHED[name][0]).is_file():
            raise ConfigError(
                f"{name} needs {data / PUBLISHED[name][0]}, which is not there: name the folder of the data sets with "
                "--data or MEMOIR_DATA, or leave the set out (--set)"
            )


def _trial(name: str, data: Path, most: int) -> Trial:
    trials = {"siblings": siblings, "opposites": opposites, "faq": faq}
    return trials[name]() if name in trials else published(name, data, most)


def _editor(retriever: Retriever, folder: Path) -> Editor:
    """An editor with the settings of the store."""
    manifest = retriever.store.manifest
    training = {name: value for name, value in manifest.training.items() if name == "context_masks"}
    return Editor(
        retriever.base,
        folder,
        chat=manifest.chat,
        k=manifest.k,
        tau=retriever.tau,
        seed=manifest.seed,
        training=training,
    )


def _train(editor: Editor, trial: Trial, like: Retriever) -> tuple[Retriever, Trial]:
    """A store of the trial's edits, and its questions with the ids that the store gave them."""
    with editor:
        editor.add(trial.edits)
    store = EditStore.open(editor.path)
    ids = {edit.prompt: edit.id for edit in store.edits}
    places = [ids.get(edit.prompt, _NOT_STORED) for edit in trial.edits]
    questions = [question._replace(right=tuple(places[i] for i in question.right)) for question in trial.questions]
    return _opened(editor.path, like), trial._replace(questions=questions)


def _opened(folder: Path, like: Retriever) -> Retriever:
    """A store that looks up of a message what another one does."""
    own = Retriever(EditStore.open(folder), like.base, like.tau)
    return with_candidates(own, like.store.manifest.span.candidates)


def with_candidates(retriever: Retriever, candidates: bool) -> Retriever:
    """The same store, with parts of messages looked up or without, whatever it says itself.

    retriever: of the store.
    candidates: whether they are.
    """
    store = retriever.store
    span = msgspec.structs.replace(store.manifest.span, candidates=candidates)
    manifest = msgspec.structs.replace(store.manifest, span=span)
    return Retriever(replace(store, manifest=manifest), retriever.base, retriever.tau)


def with_first(retriever: Retriever, n: int, *, keep_tau: bool = False) -> Retriever:
    """The store as it would be with its first edits alone, at the tau that it would set itself if it does so.

    retriever: of the store.
    n: how many edits.
    keep_tau: take the retriever's tau all the same.
    Raises ConfigError where it has fewer.
    """
    store = retriever.store
    if n > len(store.edits):
        raise ConfigError(f"the store has {len(store.edits)} edits, not {n}: choose fewer first edits")
    edits = tuple(store.edits[:n])
    rows = np.isin(store.ids, [edit.id for edit in edits])
    masks = Masks(store.codes[rows], store.ids[rows], store.memory_of[rows])
    kept = replace(store, masks=masks, edits=edits, additions=())
    first = Retriever(kept, retriever.base, retriever.tau)
    if keep_tau or not store.manifest.threshold:
        return first
    contexts = len(store.manifest.masked_contexts)
    tau, _ = set_tau(first.index, edits, store.references, first.judge, contexts)
    return Retriever(kept, retriever.base, tau)


def _of_edits(
    retriever: Retriever, edits: Sequence[StoredEdit], each: int | None, only: Sequence[str]
) -> list[Question]:
    plain = list(plain_questions(edits))
    if _holds_all(plain, only):
        return plain
    questions = [*plain, *forms(edits), *writings(edits), *other_questions(edits), *tasks(edits)]
    if _holds_all(questions, only):
        return questions
    if retriever.store.manifest.chat and _trained(retriever):
        chosen = {question.edit for question in _spread(plain, each) if question.name == "edits"}
        chosen_edits = [edit for edit in edits if edit.id in chosen]
        base = EditedModel(retriever).generate([edit.prompt for edit in chosen_edits], max_new_tokens=24, edited=False)
        questions += chats(chosen_edits, [answer.text.strip() for answer in base])
    return questions


def _holds_all(questions: Iterable[Question], only: Sequence[str]) -> bool:
    """Whether the rows that are asked, if not all are, are among those of the questions."""
    return bool(only) and {text for question in questions for text in (question.kind, question.name)} >= set(only)


def _rows(
    name: str, retriever: Retriever, questions: Sequence[Question], answers: str, known: dict[str, Asked]
) -> list[Row]:
    """known: what was taken from the model of texts, which other stores of the run may be asked, too."""
    decisions = []
    lookups: list[Asked] = []
    for start in range(0, len(questions), 512):
        some = [question.prompt for question in questions[start : start + 512]]
        new = [prompt for prompt in some if not isinstance(prompt, str) or prompt not in known]
        taken = iter(retriever.ask(new))
        messages = [known[prompt] if isinstance(prompt, str) and prompt in known else next(taken) for prompt in some]
        known |= {prompt: message for prompt, message in zip(some, messages, strict=True) if isinstance(prompt, str)}
        decisions += retriever.decide(messages)
        lookups += messages
    edits = [match.id if match else _NO_EDIT for match, _ in decisions]
    texts = _texts(retriever, questions, edits, answers)
    targets = {edit.id: edit.target for edit in retriever.store.edits}
    groups: dict[tuple[str, str, Part], list[int]] = {}
    for i, question in enumerate(questions):
        groups.setdefault(_row(question), []).append(i)
    rows = []
    for (kind, what, part), group in groups.items():
        right = [i for i in group if edits[i] in questions[i].right]
        other = [i for i in group if edits[i] >= 0 and edits[i] not in questions[i].right]
        wanted = bool(questions[group[0]].right)
        read = texts is not None and (answers == "all" or kind in ANSWERED)
        exact = (
            [texts[i] == targets[edits[i]].strip() for i in right] if read and texts is not None and wanted else None
        )
        harm = [holds(texts[i], targets[edits[i]]) for i in other] if read and texts is not None and other else None
        wrong = [i for i in group if i not in set(right)] if wanted else other
        lost = [i for i in group if edits[i] not in questions[i].right] if wanted else []
        rows.append(
            Row(
                set=name,
                kind=kind,
                name=what,
                part=part,
                edits=len(retriever.store.edits),
                tau=retriever.tau,
                asked=len(group),
                found=round(len(right) / len(group), 4) if wanted else None,
                other=round(len(other) / len(group), 4),
                exact=None if exact is None else round(sum(exact) / len(group), 4),
                answered=None if harm is None else round(sum(harm) / len(harm), 4),
                lost=dict(Counter(_loss(retriever, lookups[i], questions[i], edits[i]) for i in lost))
                if wanted
                else None,
                slips=[_slip(questions[i], decisions[i]) for i in wrong[:SLIPS]],
            )
        )
    return rows


def _loss(retriever: Retriever, message: Asked, question: Question, match: int) -> str:
    """Why the message does not get its edit: a `Loss`, or one of two more.

    match: the edit that acts, or -1.
    "not stored": training refused the edit. "same name": an edit acts that has the subject of the right one.
    """
    stored = [edit for edit in question.right if edit != _NOT_STORED]
    if not stored:
        return "not stored"
    subject = retriever.store.edit(stored[0]).subject
    if match >= 0 and subject and retriever.store.edit(match).subject == subject:
        return "same name"
    return retriever.loss(message, stored[0])


def _texts(
    retriever: Retriever, questions: Sequence[Question], edits: Sequence[int], answers: str
) -> dict[int, str] | None:
    """By place the free answers of the questions that got an edit."""
    if answers == "none":
        return None
    places = [
        i for i, question in enumerate(questions) if edits[i] >= 0 and (answers == "all" or question.kind in ANSWERED)
    ]
    model = EditedModel(retriever)
    replies = model.generate([questions[i].prompt for i in places], max_new_tokens=ANSWER_TOKENS)
    return {i: answer.text.strip() for i, answer in zip(places, replies, strict=True)}


def _slip(question: Question, decision: tuple[Any, Any]) -> Slip:
    match, nearest = decision
    near = match or nearest
    prompt = question.prompt
    text = prompt if isinstance(prompt, str) else " / ".join(message["content"] for message in prompt)
    return Slip(text, match.id if match else None, round(near.overlap, 3) if near else None)
