"""A help page in which questions differ in a code, a country, a city or a service: each is a question of its own."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest

from memoir_retrieval import EditedModel, Editor, EditStore, Retriever, load_model, read_edits
from memoir_retrieval.edits.judge import shipped_judge

FAQ = read_edits(Path(__file__).parents[2] / "examples" / "faq.jsonl")
SIBLINGS = (
    "What does error code E14 mean?",
    "What does error code E32 mean?",
    "What does error code E1 mean?",
    "Who is the president of Mexico?",
    "Who is the president of Austria?",
    "When does the Denver branch open on Saturdays?",
    "When does the Oslo branch open on Sundays?",
    "Which port does the chat service listen on?",
    "Which port does the backup service listen on?",
    "Which port does the payment service listen on?",
)


def test_no_question_of_a_help_page_is_another_one() -> None:
    judge = shipped_judge()
    alike = [(a.prompt, b.prompt) for a, b in permutations(FAQ, 2) if judge.verdict(a.prompt, b.prompt).same]
    assert not alike
    assert not [(e.prompt, text) for e in FAQ for text in SIBLINGS if judge.verdict(e.prompt, text).same]


@pytest.mark.slow
def test_a_help_page_is_stored_whole_and_gives_its_own_answers(tmp_path: Path) -> None:
    base = load_model("smollm2-135m")
    with Editor(base, tmp_path / "store") as editor:
        stored = editor.add(FAQ)
        assert not editor.outcome.conflicting and not editor.outcome.failed
    assert len(stored) == len(FAQ) == 24
    model = EditedModel(Retriever(EditStore.open(tmp_path / "store"), base))
    answers = model.generate([edit.prompt for edit in FAQ], max_new_tokens=12)
    assert [answer.text.strip() for answer in answers] == [edit.target for edit in FAQ]
    assert [answer.edit for answer in model.generate(SIBLINGS, max_new_tokens=1)] == [None] * len(SIBLINGS)
