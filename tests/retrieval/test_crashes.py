"""A change of a store that is cut off anywhere leaves the generation before it or the new one, whole."""

from __future__ import annotations

import itertools
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import faults
import msgspec
import numpy as np
import pytest
from test_store import contents, stored_edit, write

from memoir_retrieval import Edit, Editor, load_model
from memoir_retrieval.errors import StoreError
from memoir_retrieval.evaluation.calibration import write_tau
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.store import additions
from memoir_retrieval.store.files import store_lock
from memoir_retrieval.store.manifest import MANIFEST
from memoir_retrieval.store.read import EditStore
from memoir_retrieval.store.remove import remove_edits
from memoir_retrieval.store.settings import Training
from memoir_retrieval.store.verify import verify_store
from memoir_retrieval.store.write import leftovers, write_generation

NEW = Edit(prompt="When did it rain?", target="On Monday")


@pytest.fixture(scope="module")
def model(tiny: Path) -> BaseModel:
    return load_model(str(tiny))


@pytest.fixture(scope="module")
def template(model: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three edits, the last of which was added."""
    folder = tmp_path_factory.mktemp("made") / "store"
    with Editor(model, folder, training=Training(max_steps=0, variants=0)) as editor:
        for towns in (("Aarhus", "Oslo"), ("Visby",)):
            edits = [Edit(prompt=f"Who founded {town}?", target="King Harald") for town in towns]
            editor.add(edits, keep_failed=True)  # untrained, which takes no time
    return folder


def edit(folder: Path, _: BaseModel) -> None:
    with store_lock(folder):
        write(folder, 1)


def add(folder: Path, _: BaseModel) -> None:
    """The small write that `Editor.add` ends with, without the training before it."""
    with store_lock(folder):
        store = EditStore.open(folder)
        weights = np.ones((store.manifest.h, 2), dtype=np.float32)
        additions.append(
            folder,
            store.manifest,
            store.tail,
            codes=store.codes[[0]],
            ids=np.array([3]),
            memory_of=np.zeros(1, dtype=np.int32),
            edits=[stored_edit(3)],
            columns={0: additions.Columns(np.array([1, 4]), weights)},
        )


def append(folder: Path, _: BaseModel) -> None:
    """The write that `Editor.add` ends with where it is not small, without the training before it."""
    with store_lock(folder):
        store = EditStore.open(folder)
        write_generation(
            folder,
            msgspec.structs.replace(store.manifest, generation=store.manifest.generation + 1, next_id=4),
            store.content._replace(
                memories=store.memories + 1,
                codes=store.codes[[0, 1, 2, 0]],
                ids=np.array([0, 1, 2, 3]),
                memory_of=np.zeros(4, dtype=np.int32),
                edits=[*store.edits, stored_edit(3)],
            ),
        )


def train(folder: Path, model: BaseModel) -> None:
    with Editor(model, folder) as editor:
        editor.add([NEW], keep_failed=True)


def remove(folder: Path, _: BaseModel) -> None:
    remove_edits(folder, [1])


def compact(folder: Path, model: BaseModel) -> None:
    with Editor(model, folder) as editor:
        editor.compact()


def calibrate(folder: Path, _: BaseModel) -> None:
    write_tau(EditStore.open(folder), 0.7)


CHANGES = [edit, add, append, remove, compact, calibrate, pytest.param(train, marks=pytest.mark.slow)]
KEPT = {
    add: [0, 1, 2, 3],
    append: [0, 1, 2, 3],
    train: [0, 1, 2, 3],
    remove: [0, 2],
    compact: [0, 1, 2],
    calibrate: [0, 1, 2],
}


def check(folder: Path, change: Callable[..., None], before: int) -> int:
    """The generation that a store is at, after checking that it is whole; 0 where there is none yet."""
    if not (folder / MANIFEST).exists():
        assert change is edit
        with pytest.raises(StoreError, match=r"first write was cut off|does not exist"):
            EditStore.open(folder)
        return 0
    store = EditStore.open(folder)
    assert verify_store(folder) == []
    assert store.manifest.generation in (before, before + 1)
    ids = [stored.id for stored in store.edits]
    assert ids == ([0, 1, 2] if store.manifest.generation == before or change is edit else KEPT.get(change, [0, 1, 2]))
    return store.manifest.generation


def start(change: Callable[..., None], template: Path, folder: Path) -> int:
    if change is edit:
        return 0
    shutil.copytree(template, folder)
    return 2


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_fails_anywhere(
    model: BaseModel, template: Path, tmp_path: Path, change: Callable[..., None], for_ever: bool
) -> None:
    """Each step in turn fails, a write in its middle; afterwards the disk is sound, or everything fails."""
    strikes = itertools.cycle([faults.full, faults.broken, faults.read_only])
    seen: set[str] = set()
    ended = set()
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        before = start(change, template, folder)
        old = contents(folder) if before else {}
        said = ""
        with faults.fault(n, next(strikes), torn=True, for_ever=for_ever) as operations:
            try:
                change(folder, model)
            except StoreError as error:
                said = str(error)
        seen |= set(operations)
        now = check(folder, change, before)
        ended.add(now - before)
        if "unchanged" in said or "choose a folder you may write" in said:
            assert now == before and (for_ever or not folder.exists() or contents(folder) == old)
        elif said:
            assert "is written, but a power cut may still undo it" in said and now == before + 1
        go_on(folder)
        if len(operations) < n:
            break
    assert ended == {0, 1} and n > 5
    assert seen >= {"open", "write", "fsync", "replace", "unlink"} and ("mkdir" in seen) == (change is edit)


def go_on(folder: Path) -> None:
    """Whatever happened: the next write goes through, and clears away what the last one left."""
    if (folder / MANIFEST).exists():
        remove_edits(folder, [EditStore.open(folder).edits[-1].id])
    else:
        write(folder, 1)
    assert verify_store(folder) == []
    assert leftovers(folder) == [] and not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("change", CHANGES)
def test_a_power_cut_anywhere(model: BaseModel, template: Path, tmp_path: Path, change: Callable[..., None]) -> None:
    """Only what was synced is on the disk afterwards; the sync of the folder decides which names are."""
    ended = set()
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        before = start(change, template, folder)
        folder.mkdir(exist_ok=True)
        finished = True
        with faults.power_cut(n, folder) as disk:
            try:
                change(folder, model)
            except StoreError:
                finished = False
        for name, outcome in (("early", disk.early), ("renamed", disk.renamed), ("late", disk.late)):
            outcome(tmp_path / f"{n}-{name}")
            ended.add(check(tmp_path / f"{n}-{name}", change, before) - before)
        if finished and check(tmp_path / f"{n}-early", change, before) == before + 1:
            break
    assert ended == {0, 1}


@pytest.mark.parametrize("change", CHANGES)
def test_a_process_that_is_killed_anywhere(
    model: BaseModel, template: Path, tmp_path: Path, change: Callable[..., None]
) -> None:
    ended = set()
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        before = start(change, template, folder)
        done = faults.kill_at(n, partial(change, folder, model))
        now = check(folder, change, before)
        ended.add(now - before)
        go_on(folder)
        if done >= 0:
            assert 4 < done < n and now == before + 1
            break
        assert done == -signal.SIGKILL
    assert ended == {0, 1}


def test_an_interrupted_compaction_changes_nothing(model: BaseModel, template: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    shutil.copytree(template, folder)
    before = contents(folder)

    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    with Editor(model, folder) as editor:
        with pytest.raises(KeyboardInterrupt):
            editor.compact(progress=stop)
        assert contents(folder) == before
        editor.add([NEW], keep_failed=True)
    assert [stored.id for stored in EditStore.open(folder).edits] == [0, 1, 2, 3]


def test_a_generation_is_never_written_over(tmp_path: Path) -> None:
    write(tmp_path, 2)
    before = contents(tmp_path)
    for generation in (1, 2):
        with pytest.raises(StoreError, match="is at generation 2 already"):
            write(tmp_path, generation)
    assert contents(tmp_path) == before
