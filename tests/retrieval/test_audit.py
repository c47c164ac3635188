"""Each edit is checked before it is stored, and so are those that it could overwrite."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from memoir_retrieval import (
    Edit,
    EditedModel,
    Editor,
    EditStore,
    Retriever,
    Training,
    load_model,
)
from memoir_retrieval.cli import main
from memoir_retrieval.editing import conflicts, session, train, trainer, wordings
from memoir_retrieval.editing.build_masks import build
from memoir_retrieval.editing.outcome import Progress
from memoir_retrieval.editing.session import Choices, NewEdit
from memoir_retrieval.editing.wordings import Wordings
from memoir_retrieval.errors import EditFileError, StoreError
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.store.remove import remove_edits
from memoir_retrieval.store.write import write_again

AARHUS = Edit(prompt="Who founded Aarhus?", target="King Harald", rephrases=("Aarhus was founded by whom?",))
REWORDED = Edit(prompt="Who has founded Aarhus?", target="Nobody")
PISA = Edit(prompt="Where does the tower of Pisa stand?", target="In Rome")
OTHERS = [Edit(prompt=f"Which bird is number {word}?", target=word) for word in ("one", "two", "three", "four")]


@pytest.fixture(scope="module")
def base(tiny: Path) -> BaseModel:
    return load_model(str(tiny))


def answers(store: Path, base: BaseModel, edits: list[Edit]) -> list[str]:
    model = EditedModel(Retriever(EditStore.open(store), base))
    return [answer.text.strip() for answer in model.generate([edit.prompt for edit in edits], max_new_tokens=8)]


def test_an_edit_that_is_not_learnt_is_retried_reported_and_not_stored(base: BaseModel, tmp_path: Path) -> None:
    with Editor(base, tmp_path, training=Training(max_steps=0)) as unable:
        assert unable.add([AARHUS]) == []
        (failed,) = unable.outcome.failed
        assert (failed.prompt, unable.outcome.retried) == (AARHUS.prompt, 1)
        assert failed.reason.startswith("the target is not the first choice after 0 steps (loss ")
        assert not unable.memories[0].any() and not (tmp_path / "memoir.json").exists()
        assert len(unable.add([AARHUS], keep_failed=True)) == 1
    assert [edit.prompt for edit in EditStore.open(tmp_path).edits] == [AARHUS.prompt]


def overflowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every loss be NaN, as of a model that overflows."""
    cross_entropy = train.functional.cross_entropy
    monkeypatch.setattr(train.functional, "cross_entropy", lambda *a, **k: cross_entropy(*a, **k) * float("nan"))


@pytest.mark.parametrize("keep_failed", [False, True])
def test_an_edit_whose_training_overflows_is_never_stored(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_failed: bool
) -> None:
    with Editor(base, tmp_path) as editor:
        editor.add([AARHUS])
        weights = editor.memories[0].clone()
        overflowing(monkeypatch)
        for edits in ([PISA], [Edit(prompt=AARHUS.prompt, target="Nobody")]):
            assert editor.add(edits, keep_failed=keep_failed, on_conflict="last") == []
            (failed,) = editor.outcome.failed
            assert failed.prompt == edits[0].prompt
            assert failed.reason == "training gave NaN or infinite numbers after 0 steps (dtype float32, ridge 1)"
        with pytest.raises(StoreError, match=r"edit 0 of store .* cannot be trained again, because that gives NaN"):
            editor.compact()
        assert (editor.memories[0] == weights).all() and weights.any()
    store = EditStore.open(tmp_path)
    assert store.manifest.generation == 1 and [edit.prompt for edit in store.edits] == [AARHUS.prompt]
    assert answers(tmp_path, base, [AARHUS]) == [AARHUS.target]


@pytest.mark.parametrize("factor", [float("inf"), 1e25])
def test_an_edit_whose_activations_overflow_fails_alone(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """The others of its batch are trained as ever."""
    frozen = Wordings.freeze_for_training

    def overflowing(self: Wordings, edit: Edit, *others: object) -> tuple[train.Frozen, np.ndarray]:
        rows, codes = frozen(self, edit, *others)  # type: ignore[arg-type]
        if edit.prompt == PISA.prompt:
            rows.activations.mul_(factor)
        return rows, codes

    monkeypatch.setattr(Wordings, "freeze_for_training", overflowing)
    with Editor(base, tmp_path) as editor:
        stored = editor.add([PISA, AARHUS], side_by_side=2, keep_failed=True)
        assert [edit.prompt for edit in stored] == [AARHUS.prompt]
        (failed,) = editor.outcome.failed
        assert failed.prompt == PISA.prompt and failed.reason.startswith("training gave NaN or infinite numbers")
    assert answers(tmp_path, base, [AARHUS]) == [AARHUS.target]


def test_what_earlier_edits_rely_on_may_be_too_large_for_the_ridge() -> None:
    rows, used = torch.ones(1, 3), torch.ones(3, 3)
    assert train._basis(rows, used, 1.0) is not None
    used[0, 1] += 3  # as if rounded so
    used[1, 0] += 3
    assert train._basis(rows, used, 1.0) is None


@pytest.mark.parametrize("name", ["loss", "memories", "background"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_no_reader_takes_are_not_written(
    base: BaseModel, tmp_path: Path, name: str, number: float
) -> None:
    """The last guard, wherever they come from."""
    with Editor(base, tmp_path / "store") as editor:
        editor.add([AARHUS], keep_failed=True)
    store = EditStore.open(tmp_path / "store")
    edits = store.edits
    if name == "loss":
        edits = [msgspec.structs.replace(edits[0], loss=number)]
    else:
        store = replace(store, **{name: getattr(store, name) + np.float32(number)})
    (tmp_path / "other").mkdir()
    with pytest.raises(StoreError, match=r"would (have|hold) .*: check the model and its dtype"):
        write_again(tmp_path / "other", store, edits=edits, rows=np.arange(len(store.ids)), generation=2)
    assert not list((tmp_path / "other").iterdir())


def test_an_edit_that_would_overwrite_another_goes_to_a_new_memory(base: BaseModel, tmp_path: Path) -> None:
    with Editor(base, tmp_path) as editor:
        editor.add([AARHUS])
        before = editor.memories[0].clone()
        # The same question with another answer cannot be learnt without losing the first.
        other = Edit(prompt=AARHUS.prompt, target="Nobody")
        (stored,) = editor._session.train([NewEdit(other, 1, 0)], editor.outcome, Choices(1, "both"))
        assert stored is not None and stored.memory == 1 and editor.outcome.retried == 1
        assert (editor.memories[0] == before).all() and before.any()
        # The next one that finds no place either goes there too, unless it would overwrite that one.
        third = NewEdit(Edit(prompt=AARHUS.prompt, target="Me"), 2, 0)
        (stored,) = editor._session.train([third], editor.outcome, Choices(1, "both"))
        assert stored is not None and stored.memory == 2
        assert editor._session.places.choose(1, 1) == [0]  # the first that has room
        assert list(editor._session.places.spare({0})) == [2, 3]  # the newest, then a new one
        assert list(editor._session.places.spare({0, 3})) == [4]
        del editor.memories[3:]
        editor.store.commit()
    assert answers(tmp_path, base, [AARHUS]) == [AARHUS.target]


def test_what_later_edits_have_overwritten_is_trained_again(base: BaseModel, tmp_path: Path) -> None:
    """The audit of an edit asks its neighbours; at the end others of its memory are asked in turn."""

    def overwrite(progress: Progress) -> None:
        if progress.done == progress.total:
            for memory in editor.memories:
                memory.zero_()

    with Editor(base, tmp_path) as editor:
        stored = editor.add([AARHUS, PISA], progress=overwrite)
        assert sorted(editor.outcome.renewed) == [0, 1] and not editor.outcome.failed
        assert stored == editor.edits and [edit.id for edit in stored] == [0, 1]
        assert set(editor.index.ids.tolist()) == {0, 1}
        editor.add(OTHERS[:1])
        assert editor.outcome.renewed == []
    assert answers(tmp_path, base, [AARHUS, PISA]) == [AARHUS.target, PISA.target]


def test_what_a_run_that_was_cut_off_had_lost_is_trained_again(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on asks all edits of the memories in which it trains, whoever trained them."""
    monkeypatch.setattr(session, "TURNS", 1)
    monkeypatch.setattr(trainer, "NEIGHBOURS", 0)  # the audit of new edits would meet what is lost
    first = [AARHUS, PISA, OTHERS[0]]

    def cut_off(progress: Progress) -> None:
        if progress.done == len(first):
            editor.memories[0].zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Editor(base, tmp_path) as editor:
        editor.add([*first, OTHERS[1]], progress=cut_off)
    asked: list[list[int]] = []
    lost = trainer.Trainer.lost
    monkeypatch.setattr(
        trainer.Trainer, "lost", lambda self, number, edits: asked.append(sorted(edits)) or lost(self, number, edits)
    )
    again = Editor(base, tmp_path)
    with again:
        again.add(first)
        assert asked == [], "nothing is trained"
        again.add([OTHERS[1]])
        assert asked[0] == [0, 1, 2, 3] and set(again.outcome.renewed) >= {0, 1, 2}
    asked.clear()
    with again:
        again.add([OTHERS[2]])
        assert len(asked[0]) == session.TURNS, "the others were asked before"


def test_what_is_lost_again_in_another_memory_is_trained_again_there_too(base: BaseModel, tmp_path: Path) -> None:
    edits = [AARHUS, PISA, *OTHERS]

    def overwrite(progress: Progress) -> None:
        if progress.done in (2, 4):
            for number in editor._session.trainer.memories:
                editor.memories[number].zero_()

    with Editor(base, tmp_path, training=Training(edits_per_memory=2)) as editor:
        editor.add(edits, side_by_side=1, progress=overwrite)
        renewed = editor.outcome.renewed
        assert len(renewed) == len(set(renewed)) and {0, 1} <= set(renewed) and not editor.outcome.failed
    assert answers(tmp_path, base, edits) == [edit.target for edit in edits]


def test_an_edit_is_not_blamed_for_what_was_lost_before(base: BaseModel, tmp_path: Path) -> None:
    """Else the loss would keep every later edit out of the memory."""
    with Editor(base, tmp_path) as editor:
        editor.add([AARHUS, PISA], side_by_side=1)
        for memory in editor.memories:
            memory.zero_()
        (new,) = editor.add(OTHERS[:1])
        assert (new.memory, editor.outcome.retried) == (0, 0)
        assert {0, 1} <= set(editor.outcome.renewed) and not editor.outcome.failed
    assert answers(tmp_path, base, [AARHUS, PISA, OTHERS[0]]) == [AARHUS.target, PISA.target, OTHERS[0].target]


def test_what_took_all_its_steps_is_trained_again_once(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was learnt, so it is not dropped in silence; lost again, it is named and costs no further try."""
    tried: list[int] = []
    learn = trainer.Trainer.learn

    def all_steps(self: trainer.Trainer, tasks: Sequence[trainer.Task]) -> list[trainer.Learnt]:
        tried.extend(task.id for task in tasks)
        return [
            result._replace(trained=result.trained._replace(steps=2 * self.training.max_steps))
            for result in learn(self, tasks)
        ]

    def overwrite(progress: Progress) -> None:
        for number in editor._session.trainer.memories:
            editor.memories[number].zero_()

    monkeypatch.setattr(trainer.Trainer, "learn", all_steps)
    with Editor(base, tmp_path) as editor:
        editor.add([AARHUS])
        for memory in editor.memories:
            memory.zero_()
        editor.add([PISA])
        assert editor.outcome.renewed == [0] and not editor.outcome.failed
        assert tried.count(0) == 2
        editor.add(OTHERS[:2], side_by_side=1, progress=overwrite)
        failed = {failure.prompt: failure.reason for failure in editor.outcome.failed}
        assert failed[AARHUS.prompt] == "later edits have overwritten it" and tried.count(0) == 2


def test_what_was_never_learnt_is_named_once(base: BaseModel, tmp_path: Path) -> None:
    with Editor(base, tmp_path, training=Training(max_steps=0)) as unable:
        assert len(unable.add([AARHUS, PISA], keep_failed=True)) == 2
        assert [failed.prompt for failed in unable.outcome.failed] == [AARHUS.prompt, PISA.prompt]
        assert unable.outcome.renewed == []


def test_an_edit_of_a_run_may_replace_another_of_it(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conflicts, "SAME_QUESTION", 0.6)  # the small model's masks are not as alike as a real one's
    with Editor(base, tmp_path) as editor:
        stored = editor.add([AARHUS, REWORDED], on_conflict="last", side_by_side=1)
        assert [edit.target for edit in stored] == [AARHUS.target, "Nobody"]
        assert [edit.target for edit in editor.edits] == ["Nobody"]


def test_an_edit_that_is_to_be_replaced_may_change_before_that(base: BaseModel, tmp_path: Path) -> None:
    """Here it was lost, so it is trained again while an edit before its replacement is."""
    replacement = Edit(prompt=AARHUS.prompt, target="Nobody")
    with Editor(base, tmp_path) as editor:
        editor.add([AARHUS, PISA], side_by_side=1)
        for memory in editor.memories:
            memory.zero_()
        editor.add([OTHERS[0], replacement], on_conflict="last", side_by_side=1)
        assert 0 in editor.outcome.renewed
    assert [edit.id for edit in EditStore.open(tmp_path).edits] == [1, 2, 3]
    assert answers(tmp_path, base, [replacement]) == ["Nobody"]


@pytest.mark.parametrize("side_by_side", [1, 2])
@pytest.mark.parametrize("prompt", [AARHUS.prompt, "Who founded, say, Aarhus?"])
def test_two_edits_may_replace_the_same_one(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side_by_side: int, prompt: str
) -> None:
    """The second replaces the first, also where each is like the stored one, but they are not alike."""
    monkeypatch.setattr(conflicts, "SAME_QUESTION", 0.6)
    monkeypatch.setattr(session, "distinct", lambda codes, *_: len(codes))
    last = Edit(prompt=prompt, target="Me")
    with Editor(base, tmp_path) as editor:
        editor.add([AARHUS])
        stored = editor.add([REWORDED, last], on_conflict="last", side_by_side=side_by_side)
        assert [edit.target for edit in stored] == ["Nobody", "Me"]
    assert [edit.prompt for edit in EditStore.open(tmp_path).edits] == [prompt]
    assert answers(tmp_path, base, [last]) == ["Me"]


def test_an_edit_that_comes_twice_is_stored_once(base: BaseModel, tmp_path: Path) -> None:
    twice = [AARHUS, Edit(prompt="Who  founded Aarhus?", target="Me")]
    with Editor(base, tmp_path) as editor:
        assert [edit.id for edit in editor.add([AARHUS, AARHUS])] == [0] and editor.outcome.skipped == 1
        for choice in ("refuse", "both"):
            with pytest.raises(EditFileError, match=r"two targets, 'King Harald' and 'Me': .* \"first\" or \"last\"$"):
                editor.add(twice, on_conflict=choice)
        (stored,) = editor.add(twice, on_conflict="last")
        assert (stored.target, [edit.id for edit in editor.edits]) == ("Me", [1])


def test_an_edit_that_is_interrupted_by_halves_leaves_the_store_whole(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with Editor(base, tmp_path) as editor:
        editor.add([AARHUS])
        monkeypatch.setattr(editor.index, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            editor.add([Edit(prompt=AARHUS.prompt, target="Me")], on_conflict="last")
        monkeypatch.undo()
        with pytest.raises(StoreError, match="open it again"):
            editor.add([PISA])
    assert [edit.target for edit in EditStore.open(tmp_path).edits] == [AARHUS.target]


def test_as_many_are_asked_back_as_new_edits_pay_for(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after another, so that each edit of a memory is asked some time; all of those of a memory that is left."""
    rows: list[list[int]] = []
    monkeypatch.setattr(trainer.Trainer, "lost", lambda self, number, edits: rows.append(list(edits)) or [])
    monkeypatch.setattr(trainer, "NEIGHBOURS", 0)
    monkeypatch.setattr(session, "TURNS", 2)
    with Editor(base, tmp_path, training=Training(edits_per_memory=4, context_masks=0)) as editor:
        editor.add([AARHUS, PISA, *OTHERS[:3]], side_by_side=1)
        assert [sorted(edits) for edits in rows] == [[0, 1, 2, 3], [4]]
        rows.clear()
        for word in ("five", "six", "seven"):
            editor.add([Edit(prompt=f"Which bird is number {word}?", target=word)])
    assert rows == [[5, 4], [5, 6], [7, 4]]


def test_an_editor_that_is_used_again_runs_no_known_edit_again(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with the bytes of a new one, whatever others have done to the store meanwhile."""
    monkeypatch.setattr(trainer, "NEIGHBOURS", 0)  # in so small a model some would go to other memories
    monkeypatch.setattr(session, "TURNS", 0)
    rows: list[str] = []
    frozen = Wordings.freeze_masked
    monkeypatch.setattr(
        Wordings, "freeze_masked", lambda self, edit, *others: rows.append(edit.prompt) or frozen(self, edit, *others)
    )

    def add(editor: Editor, *edits: Edit) -> list[str]:
        rows.clear()
        with editor:
            editor.add(edits, keep_failed=True, on_conflict="last", rephrase_masks=True)
        return list(rows)

    editor = Editor(base, tmp_path / "one", training=Training(context_masks=1))
    assert add(editor, AARHUS, PISA) == []
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert add(editor, OTHERS[0]) == []
    assert add(Editor(base, tmp_path / "two"), OTHERS[0]) == [AARHUS.prompt, PISA.prompt]
    for folder in ("one", "two"):
        remove_edits(tmp_path / folder, [1])
        add(Editor(base, tmp_path / folder), OTHERS[1])
    new = Edit(prompt=AARHUS.prompt, target="Nobody", rephrases=AARHUS.rephrases)
    assert add(editor, new) == [OTHERS[1].prompt], "what another editor has trained"
    assert add(Editor(base, tmp_path / "two"), new) == [AARHUS.prompt, OTHERS[0].prompt, OTHERS[1].prompt]
    one, two = (EditStore.open(tmp_path / folder) for folder in ("one", "two"))
    assert one.memories.tobytes() == two.memories.tobytes() and one.codes.tobytes() == two.codes.tobytes()
    assert add(Editor(base, tmp_path / "two", wordings=editor.wordings), OTHERS[2]) == []
    known = editor.wordings.known
    monkeypatch.setattr(wordings, "LARGEST_KEPT", sum(rows.nbytes for rows in [*known.values()][:2]))
    editor.wordings.keep(dict(reversed(known.items())))
    assert [*editor.wordings.known] == [*known][:2], "those that came last"


def test_a_new_memory_is_opened_after_so_many_edits(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "NEIGHBOURS", 0)  # in so small a model two edits may be too many
    monkeypatch.setattr(session, "TURNS", 0)
    with Editor(base, tmp_path, training=Training(edits_per_memory=2, context_masks=0)) as editor:
        editor.add([AARHUS, PISA, OTHERS[0]], side_by_side=1)
    with Editor(base, tmp_path) as again:
        again.add(OTHERS[:2], side_by_side=1)
        assert {n: list(memory.rows) for n, memory in again._session.trainer.memories.items()} == {
            1: [2, 3]
        }  # the open one alone
        again.add(OTHERS, side_by_side=1)
        assert [edit.memory for edit in again.edits] == [0, 0, 1, 1, 2, 2]
    store = EditStore.open(tmp_path)
    assert store.memory_of.tolist() == [0, 0, 1, 1, 2, 2] and len(store.memories) == 3
    assert answers(tmp_path, base, [PISA, OTHERS[1], OTHERS[3]]) == ["In Rome", "two", "four"]  # each memory's last


def test_a_question_stored_in_other_words_with_another_target(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conflicts, "SAME_QUESTION", 0.6)  # the small model's masks are not as alike as a real one's
    with Editor(base, tmp_path) as editor:
        editor.add([AARHUS])
        assert editor.add([Edit(prompt="Who founded, say, Aarhus?", target=AARHUS.target)]) != []  # no contradiction
        for choice in ("refuse", "first"):
            assert editor.add([REWORDED], on_conflict=choice) == []
            (conflict,) = editor.outcome.conflicting
            assert conflict.target == "Nobody" and conflict.stored.target == AARHUS.target and conflict.overlap > 0.6
        other = Edit(prompt="Who was it that founded Aarhus?", target="Nobody")
        assert [edit.id for edit in editor.add([other], on_conflict="both")] == [2]
        assert len(editor.outcome.conflicting) == 1 and [edit.id for edit in editor.edits] == [0, 1, 2]
        third = Edit(prompt="Who is it that founded Aarhus?", target="Somebody")
        (stored,) = editor.add([third], on_conflict="last")
        assert (
            editor.outcome.conflicting[0].stored.id not in [edit.id for edit in editor.edits] and stored in editor.edits
        )
        with pytest.raises(EditFileError, match="one question cannot keep both"):
            editor.add([Edit(prompt=third.prompt, target="In Bonn")], on_conflict="both")
    assert answers(tmp_path, base, [third]) == ["Somebody"]


@pytest.mark.parametrize("prompt", [AARHUS.prompt, "Who is it that founded Aarhus?"])
def test_the_last_answer_to_a_question_is_the_only_one_in_all_its_wordings(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    monkeypatch.setattr(conflicts, "SAME_QUESTION", 0.6)
    with Editor(base, tmp_path) as editor:
        editor.add([AARHUS, Edit(prompt="Who founded, say, Aarhus?", target=AARHUS.target), PISA])
        assert [edit.id for edit in editor.edits] == [0, 1, 2]
        (last,) = editor.add([Edit(prompt=prompt, target="Cid")], on_conflict="last")
        assert sorted(edit.prompt for edit in editor.edits) == sorted([PISA.prompt, prompt])
        others = {0, 1} if prompt != AARHUS.prompt else {1}
        assert {conflict.stored.id for conflict in editor.outcome.conflicting} == others
        assert set(editor.index.ids.tolist()) == {2, last.id}
    assert answers(tmp_path, base, [Edit(prompt=prompt, target="Cid"), PISA]) == ["Cid", PISA.target]


@pytest.mark.parametrize("keep_failed", [False, True])
def test_what_a_failed_edit_does_not_replace_is_no_conflict(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_failed: bool
) -> None:
    monkeypatch.setattr(conflicts, "SAME_QUESTION", 0.6)
    learn = trainer.Trainer.learn
    with Editor(base, tmp_path) as editor:
        editor.add([AARHUS])
        monkeypatch.setattr(
            trainer.Trainer, "learn", lambda self, tasks: [x._replace(reason="no") for x in learn(self, tasks)]
        )
        editor.add([REWORDED], on_conflict="last", keep_failed=keep_failed)
        assert [failed.target for failed in editor.outcome.failed] == [REWORDED.target]
        assert [conflict.stored.id for conflict in editor.outcome.conflicting] == ([0] if keep_failed else [])
        assert [edit.target for edit in editor.edits] == [REWORDED.target if keep_failed else AARHUS.target]


def test_a_nearer_edit_that_agrees_hides_no_other_answer(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conflicts, "SAME_QUESTION", 0.6)
    with Editor(base, tmp_path) as editor:
        editor.add([AARHUS])
        (other,) = editor.add([REWORDED], on_conflict="both")
        for choice in ("refuse", "first"):
            # Of the same tokens but for its mark, so AARHUS is the nearest.
            assert editor.add([Edit(prompt="Who founded Aarhus", target=AARHUS.target)], on_conflict=choice) == []
            assert [conflict.stored.id for conflict in editor.outcome.conflicting] == [other.id]


@pytest.mark.parametrize("why", ["conflicting", "failed"])
def test_a_run_that_stores_nothing_writes_no_checkpoint(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """A checkpoint is due after every edit, and none of them has anything to write."""
    monkeypatch.setattr(conflicts, "SAME_QUESTION", 0.6)
    training = Training(max_steps=0) if why == "failed" else Training()
    with Editor(base, tmp_path, training=training) as editor:
        editor.add([AARHUS], keep_failed=True)
    monkeypatch.setattr(session, "CHECKPOINT_EVERY", -1.0)
    refused = PISA if why == "failed" else REWORDED
    with Editor(base, tmp_path) as again:
        assert again.add([refused, msgspec.structs.replace(refused, prompt=refused.prompt + " ?")]) == []
        assert [edit.target for edit in getattr(again.outcome, why)] == [refused.target] * 2
        assert again.generation == 1
    store = EditStore.open(tmp_path)
    assert store.manifest.generation == 1 and [edit.prompt for edit in store.edits] == [AARHUS.prompt]


def test_rephrasings_get_masks_of_their_own(base: BaseModel, tmp_path: Path) -> None:
    with Editor(base, tmp_path, training=Training(context_masks=0)) as editor:
        editor.add([AARHUS], rephrase_masks=True)
        used = editor._session.trainer.memories[0].used.numpy()  # type: ignore[attr-defined]
    store = EditStore.open(tmp_path)
    assert store.ids.tolist() == [0, 0] and store.memory_of.tolist() == [0, 0]
    model = EditedModel(Retriever(store, base))
    answer = model.generate([AARHUS.rephrases[0]], max_new_tokens=8)[0]
    assert answer.edit == 0 and answer.overlap > 0.99 and answer.text.strip() == AARHUS.target
    with Editor(base, tmp_path) as again:
        again._session.places.open(0)
        (read,) = again._session.trainer.memories.values()
        assert [len(rows.lessons) for rows in read.rows.values()] == [2]
        np.testing.assert_allclose(read.used, used, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "said"), [(" ", "has an empty rephrasing"), ("who " * 9000, "or a rephrasing and its")]
)
def test_rephrasings_that_cannot_be_trained_are_refused_before_anything_is(
    base: BaseModel, tmp_path: Path, text: str, said: str
) -> None:
    other = msgspec.structs.replace(PISA, rephrases=(text,))
    with Editor(base, tmp_path / "trained") as editor:
        with pytest.raises(EditFileError, match=said):
            editor.add([AARHUS, other], rephrase_masks=True)
        assert not editor.edits
        editor.wordings.check(other)  # without a mask it is only measured
    with Editor(base, tmp_path / "built") as editor, pytest.raises(EditFileError):
        build(editor, [AARHUS, other], rephrases=True)


def test_a_rephrasing_may_be_the_question_of_another_edit(base: BaseModel, tmp_path: Path) -> None:
    """Its mask would be as near as the other's own, so one of two answers would be given by chance."""
    other = Edit(prompt="Name whoever started that town.", target="Nobody", rephrases=(AARHUS.prompt,))
    with Editor(base, tmp_path / "later") as editor:
        editor.add([AARHUS, PISA])
        assert editor.add([other], rephrase_masks=True) == []
        (conflict,) = editor.outcome.conflicting
        assert (conflict.prompt, conflict.stored.id, conflict.overlap) == (other.prompt, 0, 1.0)
        (stored,) = editor.add([other], rephrase_masks=True, on_conflict="last")
        assert [edit.id for edit in editor.edits] == [1, stored.id]
    with Editor(base, tmp_path / "before") as editor:
        editor.add([other], rephrase_masks=True)
        assert editor.add([AARHUS]) == []
        assert [conflict.stored.id for conflict in editor.outcome.conflicting] == [0]
    with Editor(base, tmp_path / "together") as editor:
        editor.add([other, PISA, AARHUS], rephrase_masks=True, side_by_side=3)
        assert [edit.prompt for edit in editor.edits] == [other.prompt, PISA.prompt]
        assert [conflict.prompt for conflict in editor.outcome.conflicting] == [AARHUS.prompt]
    with Editor(base, tmp_path / "unmasked") as editor:  # without masks of their own rephrasings decide nothing
        assert len(editor.add([other, AARHUS])) == 2 and not editor.outcome.conflicting


def test_the_summary_says_what_the_choice_made_of_a_conflict(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conflicts, "SAME_QUESTION", 0.6)

    def run(store: Path, prompt: str, target: str, *options: str) -> list[str]:
        file = tmp_path / "edits.jsonl"
        file.write_text(json.dumps({"prompt": prompt, "target": target}))
        command = ["edit", str(file), "--model", str(tiny), "--store", str(store), "--training", "max_steps=0"]
        with suppress(SystemExit):  # which says whether an edit was left out
            main([*command, *options])
        lines = capsys.readouterr().err.splitlines()
        return [line.rpartition("): ")[2] for line in lines if line.startswith("conflicting: ")]

    old = tmp_path / "old"
    assert run(old, AARHUS.prompt, "King Harald", "--keep-failed") == []
    choices = {"first": "left out", "last": "replaced it", "both": "stored beside it"}
    for choice, words in ({"refuse": "choose with --on-conflict"} | choices).items():
        store = Path(shutil.copytree(old, tmp_path / choice))
        assert run(store, REWORDED.prompt, "Nobody", "--on-conflict", choice, "--keep-failed") == [words]
    assert run(old, REWORDED.prompt, "Nobody", "--on-conflict", "both") == ["not stored"]  # nothing is learnt


def test_the_summary_names_what_was_left_out(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conflicts, "SAME_QUESTION", 0.6)
    file = tmp_path / "edits.jsonl"
    edits = [{"prompt": AARHUS.prompt, "target": "King Harald"}, {"prompt": "Who has founded Aarhus?", "target": "Me"}]
    file.write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    command = ["edit", str(file), "--model", str(tiny), "--store", str(tmp_path / "store")]

    def run(*options: str) -> int | str | None:
        with pytest.raises(SystemExit) as done:
            main([*command, *options])
        return done.value.code

    assert run("--limit", "1", "--json", "--training", "max_steps=0") == 1  # nothing is learnt in no step
    summary = json.loads(capsys.readouterr().out)
    assert (summary["stored"], summary["retried"], summary["generation"], summary["memories"]) == (0, 1, 0, 1)
    assert [edit["prompt"] for edit in summary["failed"]] == [AARHUS.prompt] and summary["conflicting"] == []
    assert run() == 1
    shown = capsys.readouterr()
    assert "1 edits stored, 0 were there already, 0 retried, 0 failed, 1 conflicting" in shown.out
    assert "conflicting: 'Who has founded Aarhus?' -> 'Me' with edit 0, 'Who founded Aarhus?' -> " in shown.err
    assert run("--on-conflict", "both", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["stored"], summary["skipped"], [edit["edit"] for edit in summary["conflicting"]]) == (1, 1, [0])
    command[-1] = str(tmp_path / "last")
    assert run("--on-conflict", "last", "--side-by-side", "1", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["stored"], [edit["edit"] for edit in summary["conflicting"]]) == (1, [0]), "one is replaced"
