"""Other questions about an edit's subject: where they match all the same, the edit does little to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memoir_retrieval import Edit, Editor, EditStore, Training, load_model
from memoir_retrieval.editing.train import Wording, _run_rows
from memoir_retrieval.editing.wordings import OTHER_QUESTIONS, named
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.store.settings import Settings, training_of

EDIT = Edit(prompt="Who founded the Aarhus Botanical Garden?", target="King Harald", subject="Aarhus Botanical Garden")


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("Who founded the Aarhus Botanical Garden?", "Aarhus Botanical Garden"),
        ("What does error E-42 mean on the Mark II?", "Mark II"),
        ("When was Bell founded, and when was Old Bell Inn?", "Old Bell Inn"),
        ("Who is the mayor?", ""),
        ("", ""),
    ],
)
def test_what_a_question_is_about(prompt: str, name: str) -> None:
    assert named(prompt) == name


def test_what_is_asked_beside_an_edit(tiny: Path, tmp_path: Path) -> None:
    base = load_model(str(tiny))
    with Editor(base, tmp_path / "chat", training=Training(max_steps=0, other_questions=2)) as editor:
        wordings = editor._session.trainer._wordings  # type: ignore[attr-defined]
        spared = wordings.about_the_same(EDIT)
        texts = [base.tokenizer.decode(wording.ids) for wording in spared]
        assert all(OTHER_QUESTIONS[i].format(EDIT.subject) in text for i, text in enumerate(texts)) and len(texts) == 2
        assert wordings.about_the_same(Edit(prompt="Who?", target="x")) == []
        known = Edit(prompt=OTHER_QUESTIONS[0].format("Bell"), target="x", subject="Bell")
        assert len(wordings.about_the_same(known)) == 1  # an edit's own question is none of them
    for folder, options in (("raw", {"chat": False}), ("all", {"rule": "all"})):
        with Editor(base, tmp_path / folder, training=Training(max_steps=0, other_questions=4), **options) as editor:  # type: ignore[arg-type]
            assert editor.manifest.training["other_questions"] == 0
            assert editor._session.trainer._wordings.about_the_same(EDIT) == []  # type: ignore[attr-defined]


def test_a_store_made_before_is_trained_as_it_was(tiny: Path, tmp_path: Path) -> None:
    with Editor(load_model(str(tiny)), tmp_path, training=Training(max_steps=0, other_questions=4)) as editor:
        manifest = editor.manifest
    assert manifest.training["other_questions"] == training_of(manifest).other_questions == 4
    del manifest.training["other_questions"]
    assert training_of(manifest).other_questions == 0 and Settings.of(manifest).training["other_questions"] == 0
    with pytest.raises(ConfigError, match="other_questions=5 is out of range"):
        Training(other_questions=5)


def test_an_edit_does_little_to_other_questions_about_its_subject(smollm2: BaseModel, tmp_path: Path) -> None:
    added: dict[int, float] = {}
    for others in (0, 4):
        training = Training(other_questions=others)
        with Editor(smollm2, tmp_path / str(others), tau=0.6, training=training) as editor:
            assert len(editor.add([EDIT])) == 1
            wordings = editor._session.trainer._wordings  # type: ignore[attr-defined]
        store = EditStore.open(tmp_path / str(others))
        assert store.edits[0].steps < 60
        cut = wordings._cut(f"How large is the {EDIT.subject}?")  # none of those that are trained
        frozen, _ = wordings.freeze_masked(EDIT)
        past = wordings._past
        row = Wording(0, cut.ids, cut.pooled.acts_from, [0])
        with torch.no_grad():
            activations = _run_rows(smollm2, past, [row])[0].activations[row.acts :]
        residual = (activations * frozen.masks[0]) @ torch.from_numpy(store.memories[0].copy()).T
        added[others] = float(residual.norm())
    assert 0 < added[4] < added[0] / 2
