"""A quality run: edits trained one after another, asked on the way and after the last, and everything written down."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from memoir_retrieval.background import control_prompts
from memoir_retrieval.editing.editor import Editor, Progress
from memoir_retrieval.editing.open_store import make_references
from memoir_retrieval.edits.record import Edit, StoredEdit
from memoir_retrieval.errors import ConfigError, Reason
from memoir_retrieval.evaluation.calibration import Calibration, calibrate_store, unrelated_to
from memoir_retrieval.evaluation.measure import asked_back, measure, stored_ids
from memoir_retrieval.evaluation.scores import EditScores, Report
from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.lookup.retriever import Retriever
from memoir_retrieval.store.files import publish
from memoir_retrieval.store.manifest import library_version
from memoir_retrieval.store.read import EditStore
from memoir_retrieval.store.settings import Settings

__all__ = ["RESULT", "Checkpoint", "Run", "checkpoints", "read_run", "refuse_others", "run_quality"]

RESULT = "run.json"
PASSED = "passed.json"  # of a run that is not finished


class Checkpoint(msgspec.Struct, frozen=True):
    """The edits so far, asked again after some of them were trained.

    edits: how many were trained by then.
    reliability: the mean over those that were asked.
    found: share whose prompt matches its edit.
    """

    edits: int
    reliability: float
    found: float


class Passed(msgspec.Struct):
    """`passed.json`, what an interrupted run knows when it goes on.

    data, every: see `Run`.
    asked: a digest of the edits up to the last checkpoint.
    checkpoints: those that were passed.
    seconds: what each edit took so far, by its id.
    """

    data: str
    every: int
    asked: str = ""
    checkpoints: list[Checkpoint] = []
    seconds: dict[int, float] = {}


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """`run.json`.

    command: what was typed.
    library: its version.
    started: when, in UTC.
    data: which edits: the data set or file, and how many of it.
    model: the name of the base model.
    settings: of the store.
    edits: how many were trained.
    stored: how many of them training took up; the others are asked all the same.
    every: one of so many is asked.
    seconds: what each edit took, by its id; not of those that were trained between a checkpoint and an interruption.
    edit_seconds: the median of those.
    checkpoints: the edits so far, asked now and then.
    report: of the end.
    per_edit: what came of each edit that was asked.
    calibration: of the store, None where none of the edits has a rephrasing.
    """

    command: str
    library: str
    started: str
    data: str
    model: str
    settings: dict[str, Any]
    edits: int
    stored: int
    every: int = 1
    seconds: dict[int, float]
    edit_seconds: float | None
    checkpoints: list[Checkpoint]
    report: Report
    per_edit: list[EditScores]
    calibration: Calibration | None


def checkpoints(edits: int) -> list[int]:
    """10, 30, 100, 300, ... below the number of edits, and that number.

    edits: how many edits there are.
    """
    steps = [step * 10**power for power in range(1, 7) for step in (1, 3)]
    return [*(step for step in steps if step < edits), edits]


def run_quality(
    editor: Editor,
    edits: Sequence[Edit],
    folder: Path,
    *,
    command: str,
    data: str,
    context: str,
    controls: int,
    texts: Sequence[str],
    side_by_side: int | None,
    every: int,
    tell: Callable[[str], None],
    progress: Callable[[Progress], None],
) -> Run:
    """Train the edits into the editor's store, measure, and write `run.json`.

    Run again after an interruption it goes on: edits that the store has are not trained again, and checkpoints that
    were passed are kept.

    editor: not yet entered.
    edits: all are trained.
    folder: of the run.
    command, data: as `Run` has them.
    context: one of `CONTEXTS`, or "all".
    controls: how many of the library's unrelated prompts are answered freely.
    texts: unrelated texts whose perplexity is compared.
    side_by_side: see `Editor.add`.
    every: every so many-th edit is asked, with its rephrasings and probes.
    tell: called with each line of news.
    progress: called after each edit that was trained.

    Raises ConfigError where the folder holds a finished run, or one of other edits.
    """
    if (folder / RESULT).exists():
        raise ConfigError(f"{folder} holds a finished run", cure="choose another folder", reason=Reason.RUN)
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    passed = _passed(folder, data, every, edits)
    with editor:
        refuse_others(folder, editor.edits, edits)
        for reached in checkpoints(len(edits)):
            later = edits[reached:]
            trained = _train(editor, edits[:reached], len(later), side_by_side, progress)
            if later and max(stored_ids(editor.edits, later, partly=True)) >= 0:
                continue  # an interrupted run got further: what it did not ask then cannot be asked any more
            model = EditedModel(Retriever(EditStore.open(editor.path), editor.base))
            stored = model.retriever.store.edits
            passed.seconds |= trained
            now = Checkpoint(reached, *asked_back(model, stored, edits[:reached:every]))
            passed.checkpoints = [*(checkpoint for checkpoint in passed.checkpoints if checkpoint.edits < reached), now]
            passed.asked = _digest(edits[:reached])
            publish(folder / PASSED, msgspec.json.encode(passed))
            tell(f"{reached} edits: reliability {now.reliability:.4f}, found {now.found:.4f}")
    probed = edits[::every]
    tell(f"asking {len(probed)} edits, their rephrasings and unrelated prompts ({context})")
    report, per_edit = measure(
        model,
        stored,
        probed,
        tau=model.retriever.tau,
        context=context,
        controls=control_prompts()[:controls],
        texts=texts,
        partly=True,
    )
    ids = stored_ids(stored, edits, partly=True)
    pairs = zip(ids[::every], probed, strict=True)
    rephrases = [(i, text) for i, edit in pairs if i >= 0 for text in edit.rephrases]
    manifest = model.retriever.store.manifest
    run = Run(
        command=command,
        library=library_version(),
        started=started,
        data=data,
        model=manifest.model,
        settings={"module": manifest.module} | msgspec.to_builtins(Settings.of(manifest)),
        edits=len(edits),
        stored=sum(i >= 0 for i in ids),
        every=every,
        seconds=passed.seconds,
        edit_seconds=round(statistics.median(passed.seconds.values()), 4) if passed.seconds else None,
        checkpoints=passed.checkpoints,
        report=report,
        per_edit=per_edit,
        calibration=_calibration(model.retriever, rephrases, unrelated_to(edits, probed), tell),
    )
    publish(folder / RESULT, msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n")
    (folder / PASSED).unlink()
    return run


def _calibration(
    retriever: Retriever, rephrases: Sequence[tuple[int, str]], unrelated: Sequence[str], tell: Callable[[str], None]
) -> Calibration | None:
    """Overlaps for the report. What cannot be measured costs the run nothing else."""
    if not rephrases:
        return None
    # As `memoir calibrate` suggests a tau: by the masks alone of all that is unrelated it would find hardly anything.
    store = retriever.store
    references = store.references
    if not references.texts:
        references = make_references(retriever.base, store.manifest, retriever.fingerprint)
    try:
        return calibrate_store(retriever, rephrases, unrelated, references)
    except ConfigError as error:
        tell(f"tau was not measured: {error}")
        return None


def read_run(folder: Path) -> Run:
    """The run of a folder.

    folder: that of `run_quality`.

    Raises ConfigError where it holds none that this version can read.
    """
    try:
        return msgspec.json.decode((folder / RESULT).read_bytes(), type=Run)
    except OSError as error:
        raise ConfigError(f"{folder} holds no run ({error.strerror}): make one with `memoir bench quality`") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{folder / RESULT} is not a run of this version ({error}): run it again") from None


def _record(edit: Edit | StoredEdit) -> tuple[Any, ...]:
    """What makes an edit that edit."""
    return edit.prompt, edit.target, edit.requires


def _digest(edits: Sequence[Edit]) -> str:
    return hashlib.sha256(msgspec.json.encode([_record(edit) for edit in edits])).hexdigest()


def refuse_others(folder: Path, stored: Sequence[StoredEdit], edits: Sequence[Edit]) -> None:
    """Refuse a store that has edits of another run, such as one that passed no checkpoint.

    folder: what the error names.
    stored: the edits of its store.
    edits: those of this run.

    Raises ConfigError.
    """
    known = {_record(edit) for edit in edits}
    if others := [edit.prompt for edit in stored if _record(edit) not in known]:
        raise ConfigError(
            f"{folder} holds a run of other edits ({len(others)} of them, such as {others[0]!r})",
            cure="go on with the same edits, or choose another folder",
            reason=Reason.RUN,
        )


def _passed(folder: Path, data: str, every: int, edits: Sequence[Edit]) -> Passed:
    """What an interrupted run of the folder left, or nothing. Raises ConfigError where it was of other edits."""
    try:
        left = msgspec.json.decode((folder / PASSED).read_bytes(), type=Passed)
    except FileNotFoundError:
        return Passed(data, every)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{folder / PASSED} is damaged ({error})", cure="choose another folder, or remove it", reason=Reason.RUN
        ) from None
    known = left.checkpoints[-1].edits if left.checkpoints else 0
    if known and left.asked != _digest(edits[:known]):
        raise ConfigError(
            f"{folder} holds an interrupted run of other edits (of {left.data})",
            cure="go on with the same edits, or choose another folder",
            reason=Reason.RUN,
        )
    return left if left.every == every else Passed(data, every, seconds=left.seconds)


def _train(
    editor: Editor, edits: Sequence[Edit], later: int, side_by_side: int | None, progress: Callable[[Progress], None]
) -> dict[int, float]:
    steps: list[Progress] = []

    def timed(step: Progress) -> None:
        steps.append(step)
        progress(step)

    # The figures include what the audit or a contradiction would keep out of a store.
    editor.add(edits, on_conflict="both", keep_failed=True, side_by_side=side_by_side, more=later, progress=timed)
    seconds: dict[int, float] = {}
    before = 0.0
    for end, group in groupby(
        steps, key=lambda step: step.seconds
    ):  # those that were trained side by side share a time
        together = list(group)
        seconds |= {step.edit.id: round((end - before) / len(together), 4) for step in together if step.edit}
        before = end
    return seconds
