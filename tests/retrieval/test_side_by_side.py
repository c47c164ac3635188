"""Memories trained side by side: what each edit gets is what it would get alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from memoir_retrieval import Edit, EditedModel, Editor, EditStore, Retriever, Training, load_model
from memoir_retrieval.editing import conflicts, session, trainer
from memoir_retrieval.editing.memory import Memory
from memoir_retrieval.editing.open_store import OpenStore
from memoir_retrieval.editing.outcome import Progress
from memoir_retrieval.editing.session import Choices, NewEdit
from memoir_retrieval.editing.train import Trained
from memoir_retrieval.editing.trainer_ray import RayTrainer
from memoir_retrieval.editing.wordings import Wordings
from memoir_retrieval.edits.record import StoredEdit, prompt_key
from memoir_retrieval.model.base import BaseModel

EDITS = [
    Edit(prompt=f"{question} {thing}?", target=target)
    for question, thing, target in (
        ("Who founded", "Aarhus", "King Harald"),
        ("Where does the tower stand that leans near", "Pisa", "In Rome"),
        ("Which bird is", "this", "A kestrel"),
        ("When did it rain in", "Oslo", "On Monday"),
        ("What is made in", "Sheffield", "Knives"),
        ("Who sings", "it", "Nobody"),
        ("How many people live in the old town of", "Visby", "Two thousand"),
    )
]


@pytest.fixture(scope="module")
def base(tiny: Path) -> BaseModel:
    return load_model(str(tiny))


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, and in so small a model edits of one memory may leave each other no room."""
    monkeypatch.setattr(trainer, "half_is_faster", lambda base: False)
    monkeypatch.setattr(trainer, "NEIGHBOURS", 0)
    monkeypatch.setattr(session, "TURNS", 0)


def together(base: BaseModel, folder: Path, side_by_side: int = 3) -> EditStore:
    with Editor(base, folder, training=Training(context_masks=0)) as editor:
        editor.add(EDITS, keep_failed=True, side_by_side=side_by_side)
    return EditStore.open(folder)


def same(a: EditStore, b: EditStore) -> None:
    assert [(e.id, e.prompt, e.memory, e.steps) for e in a.edits] == [
        (e.id, e.prompt, e.memory, e.steps) for e in b.edits
    ]
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_array_equal(a.memory_of, b.memory_of)
    np.testing.assert_allclose(a.memories, b.memories, atol=1e-3 * np.abs(b.memories).max())


def test_edits_side_by_side_are_trained_as_if_alone(base: BaseModel, tmp_path: Path) -> None:
    three = together(base, tmp_path / "three")
    assert three.memory_of.tolist() == [0, 1, 2, 0, 1, 2, 0]
    with Editor(base, tmp_path / "alone", training=Training(context_masks=0)) as editor:
        for number, edit in enumerate(EDITS):
            editor._session.train([NewEdit(edit, number, 0)], editor.outcome, Choices(3, keep_failed=True))
        editor.store.commit()
    same(three, EditStore.open(tmp_path / "alone"))
    assert len({edit.steps for edit in three.edits}) > 1  # they left each other at different steps
    model = EditedModel(Retriever(three, base))
    last = [EDITS[4], EDITS[5], EDITS[6]]  # of each memory
    answers = model.generate([edit.prompt for edit in last], max_new_tokens=8)
    assert [prompt_key(answer.text) for answer in answers] == [edit.target for edit in last]


def test_the_same_command_gives_the_same_bytes(base: BaseModel, tmp_path: Path) -> None:
    first, second = together(base, tmp_path / "first"), together(base, tmp_path / "second")
    assert first.memories.tobytes() == second.memories.tobytes() and first.codes.tobytes() == second.codes.tobytes()


def test_what_was_cut_off_goes_on_in_the_same_memories(base: BaseModel, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with Editor(base, tmp_path / "cut", training=Training(context_masks=0)) as editor, pytest.raises(KeyboardInterrupt):
        editor.add(EDITS, keep_failed=True, side_by_side=3, progress=stop)
    assert [edit.id for edit in EditStore.open(tmp_path / "cut").edits] == [0, 1, 2]
    same(together(base, tmp_path / "cut"), together(base, tmp_path / "whole"))


@pytest.mark.parametrize("when", ["before it is written", "after it is written", "in the store"])
def test_nothing_of_an_edit_that_was_cut_off_is_committed(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The edits before it are, and the same editor goes on as if it had never stopped."""
    taken: list[int] = []
    take, add = trainer.Trainer.take, OpenStore.add

    def take_and_stop(self: trainer.Trainer, task: trainer.Task, trained: Trained) -> None:
        taken.append(task.id)
        if task.id == 2 and when == "before it is written":
            raise KeyboardInterrupt
        take(self, task, trained)
        if task.id == 2 and when == "after it is written":
            raise KeyboardInterrupt

    def stop_and_add(self: OpenStore, edit: StoredEdit, *rest: Any) -> None:
        if edit.id == 2 and when == "in the store":
            raise KeyboardInterrupt
        add(self, edit, *rest)

    with Editor(base, tmp_path / "whole", training=Training(context_masks=0)) as editor:
        editor.add(EDITS[:2], keep_failed=True, side_by_side=1)
    with Editor(base, tmp_path / "cut", training=Training(context_masks=0)) as editor:
        with monkeypatch.context() as patched:
            patched.setattr(trainer.Trainer, "take", take_and_stop)
            patched.setattr(OpenStore, "add", stop_and_add)
            with pytest.raises(KeyboardInterrupt):
                editor.add(EDITS[:3], keep_failed=True, side_by_side=1)
        assert taken == [0, 1, 2]
        whole, cut = EditStore.open(tmp_path / "whole"), EditStore.open(tmp_path / "cut")
        same(whole, cut)
        np.testing.assert_array_equal(whole.memories, cut.memories)
        editor.add(EDITS[:3], keep_failed=True, side_by_side=1)
        assert sorted(editor._session.trainer.memories[0].rows) == [0, 1, 2] and editor.outcome.renewed == []


@pytest.mark.parametrize("refused", [False, True])
def test_what_is_replaced_is_not_protected_in_a_memory_that_is_opened_late(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """It is again, and once, where its replacement is refused. In memory 0 the replacement is said to hurt others."""
    learn = trainer.Trainer.learn
    rows: list[tuple[int, list[int]]] = []

    def learn_elsewhere(self: trainer.Trainer, tasks: Sequence[trainer.Task]) -> list[trainer.Learnt]:
        rows.extend((task.memory, sorted(self.memories[task.memory].rows)) for task in tasks)
        lost = [task.memory == 0 for task in tasks]
        reasons = ["no" if refused or hurts else "" for hurts in lost]
        learnt = zip(learn(self, tasks), lost, reasons, strict=True)
        return [result._replace(lost=hurts, reason=reason) for result, hurts, reason in learnt]

    with Editor(base, tmp_path, training=Training(context_masks=0, edits_per_memory=2)) as editor:
        editor.add(EDITS[:2], keep_failed=True, side_by_side=2)
        assert [edit.memory for edit in editor.edits] == [0, 1]
    monkeypatch.setattr(trainer.Trainer, "learn", learn_elsewhere)
    with Editor(base, tmp_path) as editor:
        editor.add([Edit(prompt=EDITS[1].prompt, target="Nowhere")], on_conflict="last", side_by_side=1)
        assert rows == [(0, [0]), (1, [])]
        memory = editor._session.trainer.memories[1]
        assert sorted(memory.rows) == [1 if refused else 2]
        once = Memory(memory.weight)
        for edit, of_it in memory.rows.items():
            once.add(edit, of_it)
        torch.testing.assert_close(memory.used, once.used, atol=1e-3, rtol=1e-3)


def test_what_is_not_replaced_after_all_keeps_its_answer(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile another edit was trained in its memory, as if it were gone."""
    learn, take = trainer.Trainer.learn, trainer.Trainer.take

    def learn_all_but_nowhere(self: trainer.Trainer, tasks: Sequence[trainer.Task]) -> list[trainer.Learnt]:
        learnt = zip(tasks, learn(self, tasks), strict=True)
        return [result._replace(reason="no") if task.edit.target == "Nowhere" else result for task, result in learnt]

    def take_alone(self: trainer.Trainer, task: trainer.Task, trained: Trained) -> None:
        if task.edit == EDITS[2]:
            self.memories[task.memory].weight.zero_()
        take(self, task, trained)

    with Editor(base, tmp_path, training=Training(context_masks=0)) as editor:
        editor.add(EDITS[:2], side_by_side=2)
        assert [edit.memory for edit in editor.edits] == [0, 1]
        with monkeypatch.context() as patched:
            patched.setattr(trainer.Trainer, "learn", learn_all_but_nowhere)
            patched.setattr(trainer.Trainer, "take", take_alone)
            nowhere = Edit(prompt=EDITS[1].prompt, target="Nowhere")
            (new,) = editor.add([nowhere, EDITS[2]], on_conflict="last", side_by_side=2)
        assert new.memory == 1 and [failed.target for failed in editor.outcome.failed] == ["Nowhere"]
        assert editor.outcome.renewed == [1]
    model = EditedModel(Retriever(EditStore.open(tmp_path), base))
    answers = model.generate([edit.prompt for edit in EDITS[:3]], max_new_tokens=8)
    assert [prompt_key(answer.text) for answer in answers] == [edit.target for edit in EDITS[:3]]


def test_a_memory_that_fails_to_open_is_not_open(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the edits that were not run again would be overwritten by those to come."""
    with Editor(base, tmp_path) as editor:
        editor.add(EDITS[:3], keep_failed=True, side_by_side=1)
    rows, again = Wordings.rows, []

    def out_of_memory(self: Wordings, *arguments: Any) -> Any:
        again.append(arguments)
        if len(again) == 2:
            raise MemoryError
        return rows(self, *arguments)

    monkeypatch.setattr(Wordings, "rows", out_of_memory)
    with Editor(base, tmp_path) as editor:
        with pytest.raises(MemoryError):
            editor.add([EDITS[3]], keep_failed=True, side_by_side=1)
        assert not editor._session.trainer.memories
        editor.add([EDITS[3]], keep_failed=True, side_by_side=1)
        assert sorted(editor._session.trainer.memories[0].rows) == [0, 1, 2, 3]


def test_what_was_to_be_replaced_is_left_alone_after_an_error(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> None:
        raise MemoryError

    with Editor(base, tmp_path) as editor:
        editor.add(EDITS[:2], keep_failed=True, side_by_side=1)
        with monkeypatch.context() as patched:
            patched.setattr(trainer.Trainer, "learn", out_of_memory)
            with pytest.raises(MemoryError):
                editor.add([Edit(prompt=EDITS[0].prompt, target="Nobody")], on_conflict="last")
        editor.add([EDITS[2]], keep_failed=True, side_by_side=1)
        assert sorted(editor._session.trainer.memories[0].rows) == [0, 1, 2]


def test_what_was_prepared_is_let_go(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where later edits have overwritten earlier ones, whose ids are below its own, and where some fail."""

    def overwrite(progress: Progress) -> None:
        if progress.done == progress.total:
            for memory in editor.memories:
                memory.zero_()

    monkeypatch.setattr(session, "TURNS", 4)
    with Editor(base, tmp_path) as editor:
        editor.add(EDITS[:3], progress=overwrite)
        assert sorted(editor.outcome.renewed) == [0, 1, 2]
        assert not editor._session.trainer._prepared  # type: ignore[attr-defined]
    with Editor(base, tmp_path / "failing", training=Training(max_steps=0)) as editor:
        editor.add(EDITS[:4], side_by_side=2)
        assert len(editor.outcome.failed) == 4
        assert len(editor._session.trainer._prepared) == 2, "those of the last turn"  # type: ignore[attr-defined]


def test_workers_let_go_of_what_was_prepared(base: BaseModel, tmp_path: Path) -> None:
    """Without Ray: a trainer in this process stands in for each of two workers."""
    with Editor(base, tmp_path) as editor:
        workers = [trainer.Trainer(base, editor.wordings, editor.store.training) for _ in range(2)]

    def called(worker: trainer.Trainer) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda method, *arguments: getattr(worker, method)(*arguments))

    ray_trainer = RayTrainer.__new__(RayTrainer)
    ray_trainer.memories, ray_trainer._prepared = {}, {}
    ray_trainer._workers = [SimpleNamespace(call=called(worker)) for worker in workers]
    ray_trainer._get = lambda answers: answers
    for number in range(2):
        ray_trainer.open(number, torch.zeros(base.h, base.d), [])
    first, second = (trainer.Task(number, EDITS[number], number) for number in range(2))
    ray_trainer.prepare([first, second])
    moved = first._replace(memory=1)
    (learnt,) = ray_trainer.learn([moved])
    assert sorted(workers[1]._prepared) == [0, 1], "the other one is still to be taken up"
    ray_trainer.take(moved, learnt.trained)
    assert [sorted(worker._prepared) for worker in workers] == [[0], [1]]
    ray_trainer.prepare([trainer.Task(0, EDITS[0], 0)])
    assert [sorted(worker._prepared) for worker in workers] == [[0], []]


def test_a_worker_that_is_gone_leaves_the_memory_as_it_was() -> None:
    """Without Ray: a stand-in for its call."""
    ray_trainer = RayTrainer.__new__(RayTrainer)
    weight = torch.zeros(2, 4)
    ray_trainer.memories = {0: weight}
    ray_trainer._workers = [SimpleNamespace(call=SimpleNamespace(remote=lambda *_: None))]

    def gone(_: object) -> None:
        raise ConnectionError

    ray_trainer._get = gone
    trained = SimpleNamespace(columns=torch.tensor([1]), weights=torch.ones(2, 1))
    with pytest.raises(ConnectionError):
        ray_trainer.take(trainer.Task(0, EDITS[0], 0), trained)
    assert not weight.any()
    with pytest.raises(ConnectionError):
        ray_trainer.open(1, weight, [])
    assert list(ray_trainer.memories) == [0]


def test_as_many_memories_as_the_edits_fill(base: BaseModel, tmp_path: Path) -> None:
    with Editor(base, tmp_path / "few", training=Training(edits_per_memory=7)) as editor:
        assert [editor.side_by_side(n) for n in (0, 1, 7, 8, 15, 1000)] == [1, 1, 1, 2, 3, 4]
        editor.add(EDITS[:2])
        assert [edit.memory for edit in editor.edits] == [0, 0]
    with Editor(base, tmp_path / "many", training=Training(edits_per_memory=2)) as editor:
        editor.add(EDITS, keep_failed=True)
        assert [edit.memory for edit in editor.edits] == [0, 1, 2, 3, 0, 1, 2]
        editor.add([Edit(prompt="What is the tallest thing?", target="A tree")])
        assert editor.edits[-1].memory == 3  # the last memory, and it has room
    with Editor(base, tmp_path / "rest", training=Training(edits_per_memory=3)) as editor:
        for reached in (1, 7):  # in two calls, which share the edits out as one does
            editor.add(EDITS[:reached], keep_failed=True, more=7 - reached)
        assert [edit.memory for edit in editor.edits] == [0, 1, 2, 0, 1, 2, 0]
    with Editor(base, tmp_path / "full", training=Training(edits_per_memory=1)) as editor:
        editor.add(EDITS, keep_failed=True)
        assert len(editor.memories) == 7  # the last three did not begin a fourth


def test_one_question_twice_in_a_file_is_found_side_by_side(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conflicts, "SAME_QUESTION", 0.6)  # the small model's masks are not as alike as a real one's
    again = Edit(prompt="Who has founded Aarhus?", target="Nobody")
    with Editor(base, tmp_path) as editor:
        editor.add([EDITS[0], again, EDITS[4]], side_by_side=3)
        (conflict,) = editor.outcome.conflicting
        assert conflict.target == "Nobody" and conflict.stored.id == 0
        assert [edit.prompt for edit in editor.edits] == [EDITS[0].prompt, EDITS[4].prompt]
        assert len({edit.memory for edit in editor.edits}) == 2


@pytest.mark.slow
def test_ray_gives_the_same_store(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers on this machine, with two memories each, as they train by default."""
    ray = pytest.importorskip("ray")
    from memoir_retrieval.editing.trainer_ray import on_ray

    monkeypatch.undo()  # it does not reach the workers
    here = together(base, tmp_path / "here", side_by_side=4)
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        with Editor(
            base, tmp_path / "ray", training=Training(context_masks=0), trainer=on_ray("local", 2, "cpu")
        ) as editor:
            editor.add(EDITS[:4], keep_failed=True, side_by_side=4)
        with Editor(base, tmp_path / "ray", trainer=on_ray("local", 2, "cpu")) as editor:  # the memories are read again
            editor.add(EDITS, keep_failed=True, side_by_side=4)
    finally:
        ray.shutdown()
    there = EditStore.open(tmp_path / "ray")
    assert there.memory_of.tolist() == here.memory_of.tolist() and there.memory_of.tolist()[:4] == [0, 1, 2, 3]
    np.testing.assert_array_equal(there.codes, here.codes)
    np.testing.assert_allclose(there.memories, here.memories, atol=0.05 * np.abs(here.memories).max())
    model = EditedModel(Retriever(there, base))
    answers = model.generate([edit.prompt for edit in EDITS[4:]], max_new_tokens=8)
    assert [prompt_key(answer.text) for answer in answers] == [edit.target for edit in EDITS[4:]]
