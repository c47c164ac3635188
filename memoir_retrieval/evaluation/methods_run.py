"""Editing methods on the same edits: made one after another, then all asked, as in the papers and freely."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from memoir_retrieval.background import control_prompts
from memoir_retrieval.edits.record import Edit
from memoir_retrieval.errors import ConfigError, Reason
from memoir_retrieval.evaluation.methods import METHODS, open_method
from memoir_retrieval.evaluation.methods.method import Method, Unedited
from memoir_retrieval.evaluation.scores import holds, mean, same_share
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.question.prompts import end_token, prompt_ids, target_ids
from memoir_retrieval.store.files import publish
from memoir_retrieval.store.manifest import library_version

__all__ = [
    "TOKENS",
    "ChangedShares",
    "CurvePoint",
    "FreeShares",
    "MethodScores",
    "known_scores",
    "method_file",
    "run_method",
    "unedited_answers",
]

TOKENS = 32
"""The most tokens of a free answer. It ends before where the model ends it, or the line."""

WATCHED = 16  # control prompts whose likelihood is watched between edits
CLOSELY = 10  # so many first edits are watched one by one, later ones in tens: watching can take longer than an edit
DIVERGED = 10.0  # so many times the perplexity of the base model
MOST = round(math.exp(100.0), 5)  # of a ratio of perplexities: JSON has no word for infinity
ASKED = tuple(10**n for n in range(7))  # after so many edits a method is asked on the way, too


class FreeShares(msgspec.Struct, frozen=True):
    """Shares of free answers.

    edits: of the edits' prompts.
    rephrases: of their rephrasings, None where there are none.
    """

    edits: float
    rephrases: float | None


class ChangedShares(msgspec.Struct, frozen=True):
    """Shares of unrelated prompts whose free answer is not that of the base model.

    questions: of the edits' own unrelated questions, None where there are none.
    controls: of the library's prompts. Stores set tau by these, so memoir and reading may do better on them than
        elsewhere. Of those behind the first 100, WISE was trained on some.
    """

    questions: float | None
    controls: float | None


class CurvePoint(msgspec.Struct, frozen=True, kw_only=True):
    """What a method answers after some edits, asked of all that were made so far.

    edits: how many.
    reliability, generality, locality, average: teacher-forced, as `Scores` has them.
    exact: free answers that equal the target, capitals and a full stop at the end aside.
    contains: free answers in which the target stands as words.
    perplexity: of prompts of the library, over that of the base model; e^100 where it is more, or no number. Stores set
        tau by these prompts, so that of memoir and of reading is 1, or hardly more.
    """

    edits: int
    reliability: float
    generality: float | None
    locality: float | None
    average: float
    exact: FreeShares
    contains: FreeShares
    perplexity: float


class MethodScores(CurvePoint, frozen=True, kw_only=True):
    """One method on some edits, asked after the last; `NAME.json` of a run. It begins with the fields of `CurvePoint`.

    method: its name.
    library: the version that measured it.
    data: a digest of the edits, the model, the corpus and what else the figures depend on.
    end: whether the token that ends an answer was trained.
    settings: hyper-parameters.
    controls: how many unrelated prompts of each kind were answered freely, at most.
    changed: how many of those answers are not those of the base model.
    diverged: the number of the first edit after which the perplexity was seen above 10 or no number; None: of no edit.
        It is looked at after each of the first ten edits, after each tenth, and after the last.
    edit_seconds: mean for an edit.
    edit_megabytes: mean for an edit, of what is kept beside the base model; 10^6 bytes.
    seconds: of everything.
    curve: the same after 1, 10, 100 ... edits before the last, where the method can be asked there.
    """

    method: str
    library: str = "unknown"
    data: str
    end: bool
    settings: dict[str, Any]
    controls: int
    changed: ChangedShares
    diverged: int | None
    edit_seconds: float
    edit_megabytes: float
    seconds: float
    curve: tuple[CurvePoint, ...] = ()


class BaseAnswers(msgspec.Struct, frozen=True):
    """What the base model says, which no method may change; `unedited.json` of a run.

    data: a digest of the edits, the model and what else the answers depend on.
    probes: first choices at each unrelated answer.
    questions: free answers to the first of the edits' unrelated questions, as token ids.
    controls: free answers to the library's unrelated prompts, as token ids.
    loss: of the watched prompts, nats per token.
    """

    data: str
    probes: list[list[int]]
    questions: list[list[int]]
    controls: list[list[int]]
    loss: float


_Kept = TypeVar("_Kept", BaseAnswers, MethodScores)


def unedited_answers(
    base: BaseModel, edits: Sequence[Edit], controls: int, *, alone: bool = False, folder: Path | None = None
) -> BaseAnswers:
    """Ask the base model what is compared with, and write `unedited.json`; read it instead where it is there.

    It is asked in the batches in which a method is asked, because rounding depends on them.

    base: the model, not edited.
    edits: with their unrelated questions.
    controls: see `MethodScores`.
    alone: see `run_method`.
    folder: of the run.

    Raises ConfigError where the folder holds the answers to other prompts.
    """
    data = _digest(base, edits, alone, TOKENS, controls)
    path = folder / "unedited.json" if folder else None
    if path and path.exists():
        return _known(path, BaseAnswers, data)
    model = Unedited(base)
    probes: list[list[int]] = []
    questions: list[list[int]] = []
    for group in _groups(edits, alone):
        prompts, targets = _probes(base, group)
        questions += model.generated(prompts[: max(0, controls - len(probes))], TOKENS)
        probes += model.choices(prompts, targets)
    free = model.generated(_ids(base, control_prompts()[:controls]), TOKENS)
    answers = BaseAnswers(data, probes, questions, free, model.loss(_watched(base)))
    if path:
        publish(path, msgspec.json.encode(answers) + b"\n")
    return answers


def run_method(
    name: str,
    base: BaseModel,
    edits: Sequence[Edit],
    answers: Callable[[], BaseAnswers],
    *,
    end: bool = True,
    alone: bool = False,
    controls: int = 64,
    texts: Sequence[str] = (),
    known: dict[Hashable, Any] | None = None,
    folder: Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> MethodScores:
    """Make the edits with one method, ask them, and write `NAME.json`; read it instead where it is there.

    Figures of edits that are made alone are means over them.

    name: one of `METHODS`.
    base: the model; it is left as it was.
    edits: made in this order.
    answers: gives those of the base model.
    end: train the token that ends an answer too.
    alone: make and ask each edit on the unedited model, rather than all after the last.
    controls: see `MethodScores`.
    texts: of a corpus, for methods that need statistics of one.
    known: see `Method`; what several methods of one run have in common is computed once.
    folder: of the run.
    tell: called with each line of news.

    Raises ConfigError where the folder holds the scores of other edits.
    """
    data = _digest(base, edits, alone, end, controls, texts=texts)
    for scores in known_scores(folder, data) if folder else ():
        if scores.method == name:
            if scores.library != library_version():
                tell(f"{name}: its scores in {folder} are those of version {scores.library}, not {library_version()}")
            return scores
    before = answers()
    started = time.monotonic()
    method = open_method(name, base, end=end, texts=texts, known=known)
    shares, curve, seconds, size, diverged, number = _Shares(), list[CurvePoint](), 0.0, 0, None, 0
    try:
        for group in _groups(edits, alone):
            if number:
                method = method.restart()
            took, broken = _edit(method, group, number, before, curve, tell)
            seconds += took
            size += method.bytes
            diverged = diverged or broken
            number += len(group)
            shares.ask(method, group, before, controls)
            if alone:
                tell(f"{name}: {number}/{len(edits)} edits alone, reliability {mean(shares.right)}")
        result = MethodScores(
            method=name,
            library=library_version(),
            data=data,
            edits=len(edits),
            end=end,
            settings=method.settings,
            diverged=diverged,
            edit_seconds=round(seconds / len(edits), 3),
            edit_megabytes=round(size / len(edits) / 1e6, 4),
            seconds=round(time.monotonic() - started, 1),
            curve=tuple(curve),
            controls=controls,
            changed=shares.changed_shares(),
            **shares.scores(),
        )
    finally:
        method.close()
    if folder:
        publish(method_file(folder, name), msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    return result


def method_file(folder: Path, name: str) -> Path:
    """Where the scores of a method lie.

    folder: of the run.
    name: of the method.
    """
    return folder / f"{name}.json"


def known_scores(folder: Path, data: str) -> list[MethodScores]:
    """The scores of every method that lie in the folder of a run.

    folder: of the run.
    data: see `MethodScores`.

    Raises ConfigError where one of them is of other edits.
    """
    paths = (method_file(folder, name) for name in METHODS)
    return [_known(path, MethodScores, data) for path in paths if path.exists()]


def _edit(
    method: Method,
    edits: Sequence[Edit],
    earlier: int,
    before: BaseAnswers,
    curve: list[CurvePoint],
    tell: Callable[[str], None],
) -> tuple[float, int | None]:
    """Make all edits. Returns the seconds this took, and after which edit the method diverged."""
    seconds, diverged, done = 0.0, None, 0
    watched = _watched(method.base)
    while done < len(edits):
        until = done + method.batch if method.batch else next((n for n in ASKED if n > done), len(edits))
        batch = edits[done:until]
        started = time.perf_counter()
        method.edit(batch)
        seconds += time.perf_counter() - started
        done += len(batch)
        watch = done <= CLOSELY or done % CLOSELY == 0 or done == len(edits)
        if diverged is None and watch:
            ratio = _ratio(method.loss(watched), before.loss)
            if not ratio < DIVERGED:
                diverged = earlier + done
                tell(
                    f"{method.name}: diverged at edit {diverged}: perplexity of unrelated prompts is {ratio:.3g} times "
                    "as high"
                )
        if done % 10 == 0 or (done == len(edits) and done > 1):
            tell(f"{method.name}: {done}/{len(edits)} edits, {seconds / done:.2f} s each")
        if done in ASKED and done < len(edits):
            shares = _Shares()
            shares.ask(method, edits[:done], before, 0)
            curve.append(CurvePoint(edits=done, **shares.scores()))
    return seconds, diverged


@dataclass
class _Shares:
    """What came out of asking: shares of tokens that are right, answers that are, for each thing asked."""

    right: list[float] = field(default_factory=list)
    rephrased: list[float] = field(default_factory=list)
    unrelated: list[float] = field(default_factory=list)
    exact: tuple[list[bool], list[bool]] = field(default_factory=lambda: ([], []))
    contains: tuple[list[bool], list[bool]] = field(default_factory=lambda: ([], []))
    changed: tuple[list[bool], list[bool]] = field(default_factory=lambda: ([], []))
    perplexities: list[float] = field(default_factory=list)

    def ask(self, method: Method, edits: Sequence[Edit], before: BaseAnswers, controls: int) -> None:
        """Ask a method that has made some edits, those that follow the ones asked so far."""
        base = method.base
        rephrases = [(i, text) for i, edit in enumerate(edits) for text in edit.rephrases]
        of = [*range(len(edits)), *(i for i, _ in rephrases)]
        prompts = _ids(base, [*(edit.prompt for edit in edits), *(text for _, text in rephrases)])
        targets = [target_ids(base.tokenizer, edits[i].target, chat=False) for i in of]
        ended = [[*target, end_token(base.tokenizer)] for target in targets]
        choices = method.choices(prompts, ended)
        right = [same_share(a[:-1], b) for a, b in zip(choices, targets, strict=True)]
        answers = method.likely_answers(prompts, ended, TOKENS, choices)
        n = len(edits)
        self.right += right[:n]
        self.rephrased += right[n:]
        for number, (text, i) in enumerate(zip(answers, of, strict=True)):
            self.exact[number >= n].append(_plain(text) == _plain(edits[i].target))
            self.contains[number >= n].append(holds(text, _plain(edits[i].target)))
        prompts, targets = _probes(base, edits)
        first = len(self.unrelated)
        probes = before.probes[first : first + len(prompts)]
        self.unrelated += [same_share(a, b) for a, b in zip(method.choices(prompts, targets), probes, strict=True)]
        asked_freely = prompts[: max(0, controls - first)]
        pairs = (
            (asked_freely, before.questions[first : first + len(asked_freely)]),
            (_ids(base, control_prompts()[:controls]), before.controls[:controls]),
        )
        for changed, (prompts, known) in zip(self.changed, pairs, strict=True):
            free = method.likely_answers(prompts, known, TOKENS)
            changed += [a != method.text(b) for a, b in zip(free, known, strict=True)]
        self.perplexities.append(_ratio(method.loss(_watched(base)), before.loss))

    def scores(self) -> dict[str, Any]:
        """The fields of `CurvePoint` but for the number of edits."""
        three = {
            "reliability": mean(self.right),
            "generality": mean(self.rephrased),
            "locality": mean(self.unrelated),
        }
        known = [score for score in three.values() if score is not None]
        return three | {
            "average": round(sum(known) / len(known), 5),
            "exact": FreeShares(mean(self.exact[0]) or 0.0, mean(self.exact[1])),
            "contains": FreeShares(mean(self.contains[0]) or 0.0, mean(self.contains[1])),
            "perplexity": mean(self.perplexities),
        }

    def changed_shares(self) -> ChangedShares:
        return ChangedShares(mean(self.changed[0]), mean(self.changed[1]))


def _groups(edits: Sequence[Edit], alone: bool) -> list[Sequence[Edit]]:
    """Edits that are made one after another, and asked after the last of them."""
    return [[edit] for edit in edits] if alone else [edits]


def _ids(base: BaseModel, texts: Sequence[str]) -> list[list[int]]:
    return [prompt_ids(base.tokenizer, text, chat=False) for text in texts]


def _watched(base: BaseModel) -> list[list[int]]:
    return _ids(base, control_prompts()[-WATCHED:])


def _probes(base: BaseModel, edits: Sequence[Edit]) -> tuple[list[list[int]], list[list[int]]]:
    """Unrelated prompts and their answers, as token ids."""
    probes = [probe for edit in edits for probe in (*edit.locality, *edit.neighbourhood)]
    answers = [probe.answer if probe.answer.strip() else "Yes" for probe in probes]
    return (
        _ids(base, [probe.prompt for probe in probes]),
        [target_ids(base.tokenizer, answer, chat=False) for answer in answers],
    )


def _digest(base: BaseModel, edits: Sequence[Edit], alone: bool, *options: int, texts: Sequence[str] = ()) -> str:
    run = [base.identity, base.module, edits, alone, options, texts]
    return hashlib.sha256(msgspec.json.encode(run)).hexdigest()


def _known(path: Path, kind: type[_Kept], data: str) -> _Kept:
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is damaged ({error})", cure="remove it", reason=Reason.RUN) from None
    if kept.data != data:
        raise ConfigError(
            f"{path} is of other edits, or of another model or other options",
            cure="go on with the same ones, or choose another folder",
            reason=Reason.RUN,
        )
    return kept


def _ratio(after: float, before: float) -> float:
    """The quotient of two perplexities, `MOST` where the first is no number."""
    return round(math.exp(min(after - before, 100.0)), 5) if math.isfinite(after) else MOST


def _plain(text: str) -> str:
    """What `exact` compares, so that what equals a target also contains it."""
    return text.strip().removesuffix(".").rstrip().casefold()
