"""Removing an edit puts it out of reach, compacting erases it; what the commands around a store say of that."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from test_cli import contents, run

from memoir_index import unpack
from memoir_retrieval import Edit, EditedModel, Editor, EditStore, Retriever, load_model, read_edits
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.store import write
from memoir_retrieval.store.files import store_lock
from memoir_retrieval.store.remove import remove_edits
from memoir_retrieval.store.settings import Training
from memoir_retrieval.store.verify import verify_masks, verify_store

EXAMPLES = Path(__file__).parents[2] / "examples" / "zsre-100.jsonl"
TOWNS = ("Aarhus", "Oslo", "Visby", "Turku")


def town(name: str) -> Edit:
    return Edit(prompt=f"Who founded {name}?", target="King Harald", rephrases=(f"{name} was founded by whom?",))


@pytest.fixture(scope="module")
def template(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four edits; tests that change them take a copy."""
    folder = tmp_path_factory.mktemp("towns") / "store"
    with Editor(load_model(str(tiny)), folder, training=Training(max_steps=3, context_masks=0)) as editor:
        editor.add([town(name) for name in TOWNS], keep_failed=True)
    return folder


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "store"))


def test_a_removed_edit_is_answered_by_the_base_model(smollm2: BaseModel, tmp_path: Path) -> None:
    """Bit for bit, while the others still act; and by another edit where that one matches too."""
    edits = read_edits(EXAMPLES)[:2]
    twin = Edit(prompt=edits[0].rephrases[0], target="Nobody knows")
    with Editor(smollm2, tmp_path, chat=False) as editor:
        editor.add([*edits, twin])
    prompts = [edit.prompt for edit in edits]

    def ask() -> tuple[list[int | None], list[torch.Tensor], list[torch.Tensor]]:
        model = EditedModel(Retriever(EditStore.open(tmp_path), smollm2))
        logits: list[list[torch.Tensor]] = []
        for edited in (True, False):
            logits.append([])
            hook = smollm2.model.register_forward_hook(lambda m, a, out: logits[-1].append(out.logits[:2].clone()))
            answers = model.generate(prompts, max_new_tokens=6, edited=edited)
            hook.remove()
            if edited:
                matched = [answer.edit for answer in answers]
        return matched, logits[0], logits[1]

    assert ask()[0] == [0, 1]
    remove_edits(tmp_path, [0])
    assert ask()[0] == [2, 1]  # the rephrasing is an edit of its own, and truly matches
    remove_edits(tmp_path, [2])
    matched, edited, base = ask()
    assert matched == [None, 1]
    lengths = [len(smollm2.tokenizer(prompt).input_ids) for prompt in prompts]
    removed, kept = (0, 1) if lengths[0] < lengths[1] else (1, 0)  # rows of a batch go by length
    assert all(torch.equal(a[removed], b[removed]) for a, b in zip(edited, base, strict=False))
    assert not torch.equal(edited[0][kept], base[0][kept])
    assert np.abs(EditStore.open(tmp_path).memories).max() > 0


def test_compacting_leaves_nothing_of_a_removed_edit(tiny: Path, store: Path, tmp_path: Path) -> None:
    """The memory has the bits of one that never held it."""
    model = load_model(str(tiny))
    before = EditStore.open(store)
    remove_edits(store, [1])
    kept = EditStore.open(store)
    np.testing.assert_array_equal(kept.memories, before.memories)
    messages = []
    with Editor(model, store) as editor:
        assert [edit.id for edit in editor.compact(progress=lambda p: messages.append((p.done, p.total)))] == [0, 2, 3]
    assert messages == [(1, 3), (2, 3), (3, 3)]
    with Editor(model, tmp_path / "scratch", training=Training(max_steps=3, context_masks=0)) as editor:
        for number in (0, 2, 3):  # ids seed the noise of training, so they must be the same
            editor.store.manifest = msgspec.structs.replace(editor.manifest, next_id=number)
            editor.add([town(TOWNS[number])], keep_failed=True)
    now, scratch = EditStore.open(store), EditStore.open(tmp_path / "scratch")
    np.testing.assert_array_equal(now.memories, scratch.memories)
    np.testing.assert_array_equal(now.codes, scratch.codes)
    assert not np.array_equal(now.memories, before.memories)
    assert [(e.id, e.loss, e.created) for e in now.edits] == [
        (e.id, e.loss, old.created) for e, old in zip(scratch.edits, kept.edits, strict=True)
    ]
    assert (now.manifest.generation, now.manifest.next_id) == (3, 4)
    assert now.ids.tolist() == [0, 2, 3] and verify_store(store) == []
    masks = unpack(before.codes, before.manifest.d)
    only_removed = masks[1] & ~masks[[0, 2, 3]].any(0)
    assert only_removed.any() and not now.memories[:, :, only_removed].any()
    assert before.memories[:, :, only_removed].any()


def test_a_store_made_before_acts_as_it_was_made_until_it_is_compacted(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    model, store = load_model(str(tiny)), tmp_path / "store"
    training = Training(max_steps=20, context_masks=0)
    with Editor(model, store, training=training) as editor:
        editor.store.empty(acts="first")
        editor._restart()
        editor.add([town(name) for name in TOWNS[:2]], keep_failed=True)
    with Editor(model, store) as editor:
        editor.add([town(TOWNS[2])], keep_failed=True)
    old = EditStore.open(store)
    assert old.manifest.span.acts == "first"
    code, out, _ = run(capsys, "compact", store)
    assert code == 0 and f"`memoir compact {store} --acts last`" in out
    code, out, _ = run(capsys, "compact", store, "--acts", "last")
    said = "they act from the last token before the answer on, no longer from the first token of the question"
    assert code == 0 and said in out
    with Editor(model, tmp_path / "new", training=training) as editor:
        editor.add([town(name) for name in TOWNS[:3]], keep_failed=True)
    now, new = EditStore.open(store), EditStore.open(tmp_path / "new")
    assert now.manifest.span == new.manifest.span and now.manifest.span.acts == "last" and now.manifest.span.behind
    np.testing.assert_array_equal(now.codes, old.codes)
    np.testing.assert_array_equal(now.memories, new.memories)
    assert not np.array_equal(now.memories, old.memories)


@pytest.mark.parametrize(
    ("acts", "behind", "token"),
    [
        ("first", 0, "first token of the question"),  # format 4 and older
        ("last", 0, "last token of the question"),  # formats 5 and 6
        ("last", 6, "last token before the answer"),
    ],
)
def test_compact_says_from_which_token_the_edits_of_a_store_act(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path, acts: str, behind: int, token: str
) -> None:
    with Editor(load_model(str(tiny)), tmp_path, training=Training(max_steps=1, context_masks=0)) as editor:
        assert editor.manifest.span.behind == 6
        span = msgspec.structs.replace(editor.manifest.span, acts=acts, behind=behind)
        editor.store.manifest = msgspec.structs.replace(editor.manifest, span=span)
        editor._restart()
        editor.add([town("Oslo")], keep_failed=True)
    code, out, _ = run(capsys, "compact", tmp_path, "--json")
    assert (code, json.loads(out)["acts"]) == (0, token)


def test_an_interrupted_change_of_the_rule_leaves_the_old_one(tiny: Path, store: Path) -> None:
    def stop(_progress: object) -> None:
        raise KeyboardInterrupt

    with Editor(load_model(str(tiny)), store) as editor:
        with pytest.raises(KeyboardInterrupt):
            editor.compact(stop, acts="first")
        assert editor.manifest.span.acts == editor._session.wordings.span.acts == "last"
    assert EditStore.open(store).manifest.span.acts == "last"


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_compact_says_which_generation_is_there(
    tiny: Path, store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Ctrl-C may come before the new generation is published, or while the old files are removed."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    generation = EditStore.open(store).manifest.generation
    monkeypatch.setattr(write, "write_manifest" if when == "before" else "remove_unused", stop)
    code, _, err = run(capsys, "compact", store, "--model", tiny)
    now = EditStore.open(store).manifest.generation
    assert code == 130 and now == generation + (when == "after")
    assert f"is {'compacted' if when == 'after' else 'unchanged'}, at generation {now}" in err
    if when == "after":
        monkeypatch.undo()
        monkeypatch.setattr(write, "remove_unused", stop)
        with Editor(load_model(str(tiny)), store) as editor:
            with pytest.raises(KeyboardInterrupt):
                editor.compact()
            monkeypatch.undo()
            assert editor.generation == EditStore.open(store).manifest.generation == now + 1
            editor.add([town("Bergen")], keep_failed=True)
            assert editor.generation == EditStore.open(store).manifest.generation == now + 2


def test_a_store_of_the_rule_all_acts_on_every_token(tiny: Path, tmp_path: Path) -> None:
    with Editor(load_model(str(tiny)), tmp_path, rule="all", training=Training(max_steps=1)) as editor:
        editor.add([town("Aarhus")], keep_failed=True)
        assert editor.manifest.span.acts == "first"
        with pytest.raises(ConfigError, match="the span rule all, which acts on every token: choose acts first"):
            editor.compact(acts="last")


def test_compacting_a_store_without_edits_erases_all(tiny: Path, store: Path) -> None:
    remove_edits(store, [0, 1, 2, 3])
    assert EditStore.open(store).memories.any()
    with Editor(load_model(str(tiny)), store) as editor:
        assert editor.compact() == []
    now = EditStore.open(store)
    assert not now.memories.any() and now.manifest.next_id == 4


def test_memoir_remove(capsys: pytest.CaptureFixture[str], store: Path) -> None:
    code, out, _ = run(capsys, "remove", store, "2", "--prompt", " Who founded  Oslo?", "--json")
    assert code == 0
    assert json.loads(out) == {"removed": [2, 1], "generation": 2, "erased": False, "still_held": []}
    code, out, _ = run(capsys, "remove", store, "0")
    assert code == 0 and "removed edit 0: Who founded Aarhus?" in out
    assert f"the residual memory still holds what was trained: `memoir compact {store}` erases it" in out
    before = contents(store)
    for arguments, said in (
        (["0"], "has no edit 0"),
        (["3", "0"], "has no edit 0"),
        (["--prompt", "Who?"], "no edit of 'Who?'"),
        ([], "name what to remove"),
    ):
        code, out, err = run(capsys, "remove", store, *arguments)
        assert code == 2 and out == "" and said in err and err.count("\n") == 1
        assert contents(store) == before


def test_memoir_compact(capsys: pytest.CaptureFixture[str], tiny: Path, store: Path) -> None:
    remove_edits(store, [1])
    code, out, err = run(capsys, "compact", store, "--json")
    assert code == 0 and "Traceback" not in err
    summary = json.loads(out)
    assert (summary["edits"], summary["generation"], summary["erased"], summary["still_held"]) == (3, 3, True, [])
    assert summary["failed"] == []
    code, out, _ = run(capsys, "compact", store, "--model", tiny)
    assert code == 0 and "3 edits trained again; generation 4 holds nothing of any other" in out


def test_memoir_compact_succeeds_where_another_writer_comes_next(
    capsys: pytest.CaptureFixture[str], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is compacted then, and what the other keeps from being removed is named."""
    leave, other = Editor.__exit__, ExitStack()

    def leave_and_lock(self: Editor, *exception: Any) -> None:
        leave(self, *exception)
        other.enter_context(store_lock(store))
        (store / "memory-1.safetensors").write_bytes(b"of the generation before")

    monkeypatch.setattr(Editor, "__exit__", leave_and_lock)
    with other:
        code, out, err = run(capsys, "compact", store, "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["generation"] == 2 and not summary["erased"] and summary["still_held"] == ["memory-1.safetensors"]


def test_memoir_compact_says_which_edits_do_not_come_back(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    with Editor(load_model(str(tiny)), tmp_path, training=Training(max_steps=0, context_masks=0)) as editor:
        editor.add([town("Aarhus")], keep_failed=True)
    code, out, _ = run(capsys, "compact", tmp_path)
    assert code == 0
    assert "not answered with its target: 'Who founded Aarhus?': the target is not the first choice" in out


def test_memoir_index_verify(capsys: pytest.CaptureFixture[str], store: Path) -> None:
    code, out, _ = run(capsys, "index", "verify", store, "--json")
    assert code == 0
    assert json.loads(out) == {
        "store": str(store), "differs": [], "format": 7, "generation": 1, "edits": 4, "masks": 4, "leftovers": [],
    }  # fmt: skip
    code, out, _ = run(capsys, "index", "verify", store, "--masks")
    assert code == 0 and out == f"{store}: sound; generation 1, 4 edits, 4 masks, made again\n"
    for name in ("memory-1.safetensors", "edits-1.jsonl"):
        data = bytearray((store / name).read_bytes())
        data[-20] ^= 1
        (store / name).write_bytes(data)
    code, out, _ = run(capsys, "index", "verify", store)
    lines = out.splitlines()
    assert code == 1 and len(lines) >= 3 and lines[-1] == f"{store}: {len(lines) - 1} differences"
    assert lines[0].startswith("memory-1.safetensors has sha256 ") and lines[1].startswith("edits-1.jsonl has sha256 ")
    (store / "codes-1.safetensors").unlink()
    code, out, _ = run(capsys, "index", "verify", store, "--json")
    assert code == 1 and "codes-1.safetensors is missing" in json.loads(out)["differs"]
    (store / "memoir.json").write_text("{")
    code, out, _ = run(capsys, "index", "verify", store)
    assert code == 1 and "memoir.json is damaged" in out.splitlines()[0]
    code, _, err = run(capsys, "index", "verify", store.parent / "nowhere")
    assert code == 2 and "does not exist" in err


def test_a_mask_that_is_not_that_of_its_prompt(tiny: Path, store: Path) -> None:
    opened = EditStore.open(store)
    model = load_model(str(tiny))
    assert verify_masks(opened, model) == []
    opened.codes[[0, 1]] = opened.codes[[1, 0]]
    first, second = verify_masks(opened, model)
    assert first.startswith("mask 0 of edit 0 overlaps 0.") and "'Who founded Aarhus?' gives" in first
    assert second.startswith("mask 1 of edit 1 overlaps 0.")
