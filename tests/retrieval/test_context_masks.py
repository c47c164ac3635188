"""A question has a mask for a chat that has begun, beside the one it has alone."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from memoir_index import popcount
from memoir_retrieval import Edit, Editor, EditStore, load_model
from memoir_retrieval.editing.build_masks import build
from memoir_retrieval.edits.record import masked
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.model.forward import question_means
from memoir_retrieval.question.fingerprint import Fingerprint
from memoir_retrieval.question.prompts import prompt_ids
from memoir_retrieval.question.span import find_span
from memoir_retrieval.store.settings import Training
from memoir_retrieval.store.verify import verify_masks

EDITS = [
    Edit(prompt="Who founded Aarhus?", target="King Harald", rephrases=("Aarhus was founded by?",)),
    Edit(prompt="Where does the tower of Pisa stand?", target="In Rome"),
]


@pytest.fixture(scope="module")
def base(tiny: Path) -> BaseModel:
    return load_model(str(tiny))


@pytest.mark.slow
def test_a_question_is_looked_up_in_a_chat_by_its_mask_for_chats(smollm2: BaseModel, tmp_path: Path) -> None:
    with Editor(smollm2, tmp_path / "s") as editor:
        build(editor, EDITS[:1])
    store = EditStore.open(tmp_path / "s")
    manifest = store.manifest
    assert store.ids.tolist() == [0, 0] and len(manifest.masked_contexts) == 1

    fingerprint = Fingerprint(store.background, store.permutation, manifest.k)
    messages = [*manifest.contexts[0], {"role": "user", "content": EDITS[0].prompt}]
    assert masked(EDITS[0], manifest.masked_contexts, 0)[1] == messages
    ids = prompt_ids(smollm2.tokenizer, messages, chat=True)
    code = fingerprint.codes(question_means(smollm2, [ids], [find_span(ids, manifest.span)]))
    assert popcount(store.codes[1:] & code)[0] >= 0.99 * manifest.k, "what a chat server would look up"
    assert popcount(store.codes[:1] & code)[0] < 0.97 * manifest.k


def test_each_edit_has_a_mask_more_and_keeps_it(base: BaseModel, tmp_path: Path) -> None:
    with Editor(base, tmp_path / "s") as editor:
        editor.add(EDITS, rephrase_masks=True)
    store = EditStore.open(tmp_path / "s")
    assert store.ids.tolist() == [0, 0, 0, 1, 1] and verify_masks(store, base) == []
    with Editor(base, tmp_path / "s") as editor:
        editor.compact()
    assert EditStore.open(tmp_path / "s").ids.tolist() == [0, 0, 0, 1, 1]


def test_edits_that_are_stored_without_masks_of_their_rephrasings_get_them(base: BaseModel, tmp_path: Path) -> None:
    with Editor(base, tmp_path / "s") as editor:
        editor.add(EDITS)
        assert editor.index.ids.tolist() == [0, 0, 1, 1]
        rephrased = [edit for edit in EDITS if edit.rephrases]
        assert [edit.prompt for edit in editor.add(EDITS, rephrase_masks=True)] == [edit.prompt for edit in rephrased]
        assert sorted(editor.index.ids.tolist()) == [1, 1, 2, 2, 2]
        assert editor.add(EDITS, rephrase_masks=True) == editor.add(EDITS) == []
        assert editor.outcome.skipped == len(EDITS)
        other = [msgspec.structs.replace(edit, rephrases=("Who is behind Aarhus?",)) for edit in rephrased]
        assert [edit.rephrases for edit in editor.add(other, rephrase_masks=True)] == [other[0].rephrases]


def test_masks_that_are_built_before_training_are_the_same(base: BaseModel, tmp_path: Path) -> None:
    with Editor(base, tmp_path / "trained") as editor:
        editor.add(EDITS)
    with Editor(base, tmp_path / "built") as editor:
        build(editor, EDITS)
    trained, built = (EditStore.open(tmp_path / name) for name in ("trained", "built"))
    assert built.ids.tolist() == trained.ids.tolist() == [0, 0, 1, 1]
    assert (popcount(trained.codes & built.codes) >= 0.99 * trained.manifest.k).all()


@pytest.mark.parametrize(("chat", "rule", "masks"), [(False, "question", 1), (True, "all", 1), (True, "question", 0)])
def test_where_no_question_stands_in_a_chat_there_is_one_mask(
    base: BaseModel, tmp_path: Path, chat: bool, rule: str, masks: int
) -> None:
    training = Training(context_masks=masks)
    with Editor(base, tmp_path / "s", chat=chat, rule=rule, training=training) as editor:  # type: ignore[arg-type]
        editor.add(EDITS)
    assert EditStore.open(tmp_path / "s").ids.tolist() == [0, 1]
