"""Masks of many edits at once: the same bytes however they are made, to be looked up or trained, not to be served."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
from test_cli import contents, run

from memoir_index import HammingIndex
from memoir_retrieval import Edit, EditedModel, Editor, EditStore, Retriever, load_model
from memoir_retrieval.editing import build_masks as build
from memoir_retrieval.errors import EditFileError, StoreError
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.store.remove import remove_edits
from memoir_retrieval.store.settings import Training
from memoir_retrieval.store.verify import verify_masks, verify_store

EDITS = [
    Edit(
        prompt=f"Who {verb} the {thing}{' so long ago' * (number % 3 == 2)}?",
        target="King Harald",
        rephrases=(f"The {thing} was {verb} by whom?",),
    )
    for number, (verb, thing) in enumerate(
        (verb, thing)
        for verb in ("built", "painted", "sold", "burned", "bought")
        for thing in ("bridge", "ship", "tower", "harbour", "mill", "church", "gate", "wall")
    )
]


ONE_MASK = Training(context_masks=0)  # those of contexts have tests of their own


@pytest.fixture(scope="module")
def model(tiny: Path) -> BaseModel:
    return load_model(str(tiny))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SHARD", 16)
    monkeypatch.setattr(build, "BATCH", 4)


def make(model: BaseModel, folder: Path, rephrases: bool = False) -> EditStore:
    with Editor(model, folder, training=ONE_MASK) as editor:
        build.build(editor, EDITS, rephrases=rephrases)
    return EditStore.open(folder)


@pytest.mark.parametrize("rephrases", [False, True])
def test_every_prompt_finds_its_own_edit(model: BaseModel, tmp_path: Path, rephrases: bool) -> None:
    store = make(model, tmp_path, rephrases)
    assert store.manifest.untrained == len(EDITS) == 40 and not store.memories.any()
    assert len(store.codes) == 40 * (1 + rephrases) and verify_store(tmp_path) == []
    assert verify_masks(store, model) == []
    retriever = Retriever(store, model)
    for text in ("prompt", "rephrase") if rephrases else ("prompt",):
        texts = [edit.prompt if text == "prompt" else edit.rephrases[0] for edit in EDITS]
        matches = retriever.lookup_batch(texts)
        assert [match.id if match else None for match in matches] == list(range(40))
        assert min(match.overlap for match in matches if match) > 0.9


def test_the_same_input_gives_the_same_bytes_also_after_an_interruption(model: BaseModel, tmp_path: Path) -> None:
    make(model, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    make(model, tmp_path / "again")
    assert contents(tmp_path / "again") == whole

    def stop(progress: build.BuildProgress) -> None:
        steps.append(progress)
        if progress.done == 32:
            raise KeyboardInterrupt

    steps: list[build.BuildProgress] = []
    with Editor(model, tmp_path / "cut", training=ONE_MASK) as editor, pytest.raises(KeyboardInterrupt):
        build.build(editor, EDITS, progress=stop)
    assert steps == [(0, 40, 0), (16, 40, 0), (32, 40, 0)] and not (tmp_path / "cut" / "memoir.json").exists()
    _, second = sorted((tmp_path / "cut").glob(".masks-*"))
    damaged = bytearray(second.read_bytes())
    damaged[-1] ^= 1
    second.write_bytes(damaged)
    steps.clear()
    with Editor(model, tmp_path / "cut", training=ONE_MASK) as editor:
        build.build(editor, EDITS, progress=steps.append)
    assert steps == [(16, 40, 16), (32, 40, 16), (40, 40, 16)]  # what was damaged was made again
    assert contents(tmp_path / "cut") == whole


def test_other_edits_do_not_go_on_from_what_these_left(model: BaseModel, tmp_path: Path) -> None:
    def first_only(progress: build.BuildProgress) -> None:
        if progress.done:
            raise KeyboardInterrupt

    with Editor(model, tmp_path, training=ONE_MASK) as editor, pytest.raises(KeyboardInterrupt):
        build.build(editor, EDITS, progress=first_only)
    steps: list[build.BuildProgress] = []
    with Editor(model, tmp_path, training=ONE_MASK) as editor:
        build.build(editor, EDITS[1:], progress=steps.append)
    assert steps[0] == (0, 39, 0)


def test_the_masks_are_in_memory_once(model: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    indexes = []
    from_codes = HammingIndex.from_codes
    written = []
    write = build.write_generation
    monkeypatch.setattr(
        build.HammingIndex, "from_codes", lambda *given, **how: indexes.append(from_codes(*given, **how)) or indexes[-1]
    )
    monkeypatch.setattr(build, "write_generation", lambda *given: written.append(given[2].codes) or write(*given))
    with Editor(model, tmp_path / "store") as editor:
        indexes.clear()
        build.build(editor, EDITS[:3])
    assert any(np.shares_memory(index.codes, written[0]) for index in indexes if len(index))


def test_it_is_not_served_until_it_is_trained(model: BaseModel, tmp_path: Path) -> None:
    store = make(model, tmp_path)
    with pytest.raises(StoreError, match=r"40 of 40 edits .* are not trained, so they cannot answer: train them with"):
        EditedModel(Retriever(store, model))
    remove_edits(tmp_path, list(range(3, 40)))
    assert EditStore.open(tmp_path).manifest.untrained == 3
    with Editor(model, tmp_path) as editor:
        assert [edit.id for edit in editor.add(EDITS[:2], keep_failed=True)] == [40, 41]
    assert [(e.id, e.trained) for e in EditStore.open(tmp_path).edits] == [(2, False), (40, True), (41, True)]
    with Editor(model, tmp_path) as editor:
        editor.compact()
    store = EditStore.open(tmp_path)
    assert store.manifest.untrained == 0 and verify_store(tmp_path) == []
    assert all(edit.trained and edit.created for edit in store.edits)
    EditedModel(Retriever(store, model))


def test_rephrasings_that_were_built_with_masks_are_trained_with_them(model: BaseModel, tmp_path: Path) -> None:
    make(model, tmp_path, rephrases=True)
    before = EditStore.open(tmp_path)
    silent = msgspec.structs.replace(EDITS[1], rephrases=())
    others = msgspec.structs.replace(EDITS[2], rephrases=("Something else?",))
    with Editor(model, tmp_path) as editor:
        with pytest.raises(EditFileError, match=r"built with masks of other rephrasings \(edit 2\) than it has now"):
            editor.add([EDITS[0], others], keep_failed=True)
        assert editor.generation == before.manifest.generation
        new = editor.add([EDITS[0], silent], keep_failed=True, on_conflict="both")
        assert [edit.rephrases for edit in new] == [EDITS[0].rephrases, EDITS[1].rephrases]
        new += editor.add([others], keep_failed=True, on_conflict="both", rephrase_masks=True)
        masks = Counter(editor.index.ids.tolist())
        assert [masks[edit.id] for edit in new] == [masks[3]] * 3 and new[2].rephrases == others.rephrases


def test_memoir_index_build(capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "edits.jsonl"
    file.write_text("".join(f'{{"prompt": "{edit.prompt}", "target": "{edit.target}"}}\n' for edit in EDITS))
    arguments = ["index", "build", file, "--model", tiny, "--store", tmp_path / "store", "--context-masks", "0"]
    code, out, _ = run(capsys, *arguments, "--json")
    result = json.loads(out)
    assert code == 0 and (result["edits"], result["masks"], result["resumed"], result["generation"]) == (40, 40, 0, 1)
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "is a store already" in err
    code, out, _ = run(capsys, "lookup", tmp_path / "store", EDITS[7].prompt, "--json")
    assert code == 0 and json.loads(out)["edit"] == 7


@pytest.mark.slow
def test_ray_makes_the_same_bytes(model: BaseModel, tmp_path: Path) -> None:
    """Two workers of a real Ray on this machine."""
    ray = pytest.importorskip("ray")
    from memoir_retrieval.editing.build_masks_ray import on_ray

    make(model, tmp_path / "here")
    try:
        with Editor(model, tmp_path / "ray", training=ONE_MASK) as editor:
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
            build.build(editor, EDITS, compute=on_ray(editor, "local", 2, "cpu"))
    finally:
        ray.shutdown()
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")
    np.testing.assert_array_equal(EditStore.open(tmp_path / "ray").ids, np.arange(40))
