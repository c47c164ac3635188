"""`memoir bench routing`: what it asks, in which half it counts it, and what it writes down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import EDITS, run, write
from test_quality import checked

from memoir_retrieval.background import reference_prompts
from memoir_retrieval.editing.build_masks import build
from memoir_retrieval.editing.editor import Editor
from memoir_retrieval.edits.record import Edit, StoredEdit
from memoir_retrieval.evaluation.routing_data import (
    PUBLISHED,
    Question,
    chats,
    faq,
    forms,
    opposites,
    other_questions,
    plain_questions,
    published,
    record_part,
    siblings,
    tasks,
    unrelated,
    writings,
)
from memoir_retrieval.evaluation.routing_run import _rows, with_first
from memoir_retrieval.lookup.retriever import Retriever
from memoir_retrieval.model.base import load_model
from memoir_retrieval.store.read import EditStore

EXAMPLES = Path(__file__).parents[2] / "examples" / "zsre-100.jsonl"


@pytest.fixture(scope="module")
def stored() -> list[StoredEdit]:
    records = [json.loads(line) for line in EXAMPLES.read_text(encoding="utf-8").splitlines()]
    return [
        StoredEdit(id=number, prompt=r["prompt"], target=r["target"], subject=r["subject"],
                   rephrases=tuple(r["rephrases"]), created="", loss=0.0, steps=0)
        for number, r in enumerate(records)
    ]  # fmt: skip


def test_no_wording_relation_or_record_is_in_both_parts(stored: list[StoredEdit]) -> None:
    answers = ["It is not known."] * len(stored)
    all_forms = [*forms(stored), *tasks(stored), *writings(stored), *chats(stored, answers), *other_questions(stored),
                 *plain_questions(stored), *siblings().questions, *opposites().questions]  # fmt: skip
    texts = {part: {str(q.prompt) for q in all_forms if q.part == part} for part in ("tune", "report")}
    assert min(len(part) for part in texts.values()) > 1000 and not texts["tune"] & texts["report"]
    parts = {q.edit: q.part for q in plain_questions(stored)}
    assert all(
        q.part == parts[q.edit] for q in all_forms if q.kind in ("form", "task", "writing", "chat", "other question")
    )
    assert 30 <= sum(part == "tune" for part in parts.values()) <= 70
    assert record_part("Who is the mother of Ada?", "Ada") == record_part("What is Bo's father called?", "Bo")


def test_both_parts_have_twenty_forms_and_each_kind_of_task(stored: list[StoredEdit]) -> None:
    names = {part: {q.name for q in forms(stored) if q.part == part} for part in ("tune", "report")}
    assert all(len(part) >= 20 for part in names.values())
    questions = {
        "translate",
        "correct",
        "count",
        "title",
        "tags",
        "follow-ups",
        "search query",
        "moderation",
        "tell me about",
    }
    for part in ("tune", "report"):
        assert questions <= {q.name for q in tasks(stored) if q.part == part}
    assert not any(q.right for q in tasks(stored))


def test_a_form_holds_the_question_and_asks_for_its_edit(stored: list[StoredEdit]) -> None:
    for question in forms(stored):
        edit = stored[question.edit]
        assert edit.prompt[1:] in question.prompt and question.edit in question.right
        assert "{" not in question.name and len(question.right) == (2 if "another edited" in question.name else 1)


def test_made_up_questions_never_ask_for_the_same_fact_in_other_words(stored: list[StoredEdit]) -> None:
    pairs = [(stored[q.edit].prompt.lower(), str(q.prompt).lower()) for q in other_questions(stored, each=99)]
    assert len(pairs) > 1000
    one_fact = [("mother", "gave birth"), ("father", "dad"), ("director", "directed"), ("inception", "year did the"),
                ("company made", "corporation created"), ("family", "genus"), ("star", "cast member")]  # fmt: skip
    for a, b in one_fact:
        assert not [pair for pair in pairs if (a in pair[0] and b in pair[1]) or (b in pair[0] and a in pair[1])]
    own = {edit.prompt.lower() for edit in stored}
    assert not any(text in own for _, text in pairs)


def test_writings_differ_from_the_prompt_and_nothing_else_does(stored: list[StoredEdit]) -> None:
    by_name: dict[str, list[Question]] = {}
    for question in writings(stored):
        by_name.setdefault(question.name, []).append(question)
        assert question.prompt != stored[question.edit].prompt
    assert len(by_name["UPPER CASE"]) == len(stored)
    assert 0 < len(by_name["accents left out"]) < 50 and len(by_name["slip in the name"]) > 80
    assert by_name["no-break spaces"][0].prompt.replace("\u00a0", " ") == stored[0].prompt


def test_siblings_are_asked_of_names_without_an_edit() -> None:
    for trial in (siblings(), opposites(), faq()):
        own = {edit.prompt for edit in trial.edits}
        others = [q for q in trial.questions if not q.right]
        assert others and not any(q.prompt in own for q in others)
        assert all(trial.edits[q.right[0]].prompt != q.prompt or q.name.startswith(("edits", "own")) for q in
                   trial.questions if q.right)  # fmt: skip
    assert len(faq().edits) == 24 and sum(not q.right for q in faq().questions) == 10


def test_probes_that_ask_for_the_edited_fact_are_left_out(tmp_path: Path) -> None:
    record = {
        "subject": "Ann", "prompt": "Who is Ann's father?", "target_new": "Bo", "ground_truth": ["Carl"],
        "rephrase_prompt": "What is the name of Ann's father?",
        "locality": {"Relation_Specificity": [{"prompt": "Ann dad", "ground_truth": ["Carl"]},
                                              {"prompt": "The father of Ann is", "ground_truth": ["Karl"]},
                                              {"prompt": "The occupation of Ann is", "ground_truth": ["baker"]}]},
    }  # fmt: skip
    (tmp_path / "zsre").mkdir()
    (tmp_path / PUBLISHED["knowedit"][0]).write_text(json.dumps(record) + "\n", encoding="utf-8")
    trial = published("knowedit", tmp_path, 10)
    assert [q.prompt for q in trial.questions if not q.right] == ["The occupation of Ann is"]


def test_unrelated_prompts_leave_out_what_an_edit_asks(stored: list[StoredEdit], tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    lines = [json.dumps({"question": text}) for text in (stored[0].prompt.lower(), "who sang the song")]
    (tmp_path / "text" / "nq-open-dev.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prompts = [q.prompt for q in unrelated(tmp_path, 1000, stored)]
    assert "who sang the song" in prompts and stored[0].prompt.lower() not in prompts and len(prompts) == 257


def test_a_run_writes_its_figures_and_a_page_that_loads_nothing(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "edits.jsonl", EDITS)
    code, out, err = run(capsys, "bench", "routing", "--edits", file, "--model", tiny, "--set", "edits", "--set",
                         "opposites", "--set", "unrelated", "--unrelated", "8", "--data", tmp_path, "--answers", "all",
                         "--out", tmp_path / "run", "--json")  # fmt: skip
    assert code == 0, err
    for name in ("text/nq-open-dev.jsonl", "text/wikitext-2-test.jsonl"):
        assert f"unrelated: without {tmp_path / name}, which is not there" in err
    result = json.loads(out)
    rows = {(row["set"], row["name"]): row for row in result["rows"]}
    assert rows["edits", "edits"]["found"] == rows["edits", "edits"]["exact"] == 1.0
    assert rows["unrelated", "the library's"]["found"] is None and result["settings"]["edits"] == len(EDITS)
    assert rows["edits", "again after the model's own answer"]["asked"] >= 1
    assert json.loads((tmp_path / "run" / "routing.json").read_text()) == result
    other = write(tmp_path / "other.jsonl", [{"prompt": "Who leads Example Corp?", "target": "Jane Doe"}])
    code, _, err = run(capsys, "bench", "routing", "--edits", other, "--model", tiny, "--data", tmp_path, "--out",
                       tmp_path / "run")  # fmt: skip
    assert code == 2 and f"holds a run of other edits ({len(EDITS)} of them" in err  # not both files' edits are asked
    page = checked(tmp_path / "run" / "routing.html")
    assert any(tag == "svg" for tag, _ in page.tags) and "Own edit found: form" in page.text["h2"]
    code, out, _ = run(capsys, "bench", "routing", tmp_path / "run" / "store", "--set", "unrelated", "--unrelated", "8",
                       "--data", tmp_path, "--part", "report")  # fmt: skip
    assert code == 0 and "report" in out and "tune" not in out


def test_first_edits_are_asked_as_a_store_of_their_own_and_every_loss_has_a_reason(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "edits.jsonl", [edit | {"rephrases": ["purple rain over Oslo"]} for edit in EDITS])
    code, _, err = run(capsys, "index", "build", file, "--model", tiny, "--store", tmp_path / "masks")
    assert code == 0, err
    asked = ("--set", "edits", "--set", "unrelated", "--unrelated", "4", "--data", tmp_path, "--each", "0", "--json")
    code, out, err = run(capsys, "bench", "routing", tmp_path / "masks", "--first", "1", "--first", len(EDITS),
                         "--only", "plain", "--only", "the library's", *asked)  # fmt: skip
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert {row["kind"] for row in rows} == {"plain", "unrelated"} and {row["edits"] for row in rows} == {1, len(EDITS)}
    assert sum(row["asked"] for row in rows if row["name"] == "edits" and row["edits"] == 1) == 1
    for row in rows:
        if row["kind"] == "unrelated":
            assert row["lost"] is None
            continue
        assert sum(row["lost"].values()) == round(row["asked"] * (1 - row["found"]))
        assert bool(row["lost"]) == (row["name"] == "rephrasings")
    code, out, err = run(capsys, "bench", "routing", tmp_path / "masks", "--about", "1", "--only", "edits", *asked)
    assert code == 0, err
    assert [(row["edits"], row["asked"]) for row in json.loads(out)["rows"]] == [(len(EDITS), 1)]
    code, _, err = run(capsys, "bench", "routing", tmp_path / "masks", "--first", len(EDITS) + 1, *asked)
    assert code != 0 and f"the store has {len(EDITS)} edits, not {len(EDITS) + 1}" in err


def test_first_edits_are_asked_at_the_tau_of_a_store_of_their_own(tiny: Path, tmp_path: Path) -> None:
    """Pooled over all tokens, whose masks decide alone: one edit sets tau for all of them."""
    base = load_model(tiny)
    edits = [Edit(prompt=edit["prompt"], target=edit["target"]) for edit in EDITS]
    edits.append(Edit(prompt=f"{reference_prompts()[0]} Please.", target="-"))
    taus = []
    for n in (len(edits) - 1, len(edits)):
        with Editor(base, tmp_path / str(n), chat=True, rule="all") as editor:
            build(editor, edits[:n])
        taus.append(EditStore.open(tmp_path / str(n)).manifest.tau)
    whole = Retriever(EditStore.open(tmp_path / str(len(edits))), base)
    assert taus[0] < taus[1] == whole.tau
    assert [with_first(whole, n).tau for n in (len(edits) - 1, len(edits))] == taus
    assert with_first(whole, 1, keep_tau=True).tau == whole.tau

    with Editor(base, tmp_path / "chosen", chat=True, tau=0.3) as editor:
        build(editor, edits)
    assert with_first(Retriever(EditStore.open(tmp_path / "chosen"), base), 1).tau == 0.3


def test_a_loss_is_put_down_to_the_mask_the_judge_or_another_edit(tiny: Path, tmp_path: Path) -> None:
    base = load_model(tiny)
    prompts = ("Who is the head of Acme?", "Please, who is the head of Acme?", "Who is the head of Zeta?")
    with Editor(base, tmp_path / "masks", chat=True, tau=0.01) as editor:
        build(editor, [Edit(prompt=prompt, target="-") for prompt in prompts])
    retriever = Retriever(EditStore.open(tmp_path / "masks"), base)
    (message,) = retriever.ask(["Who is head of Acme?"])
    match, _ = retriever.decide([message])[0]
    assert match is not None and match.id in (0, 1)
    assert [retriever.loss(message, edit) for edit in (1 - match.id, 2)] == ["another edit", "judge"]
    assert Retriever(retriever.store, base, 1.0).loss(message, 2) == "mask"


def test_where_nothing_matches_no_answer_is_exact(tiny: Path, tmp_path: Path) -> None:
    base = load_model(tiny)
    with Editor(base, tmp_path / "store", chat=True, tau=1.0) as editor:
        editor.add([Edit(prompt="Who is the head of Acme?", target="Ada")], keep_failed=True)
    retriever = Retriever(EditStore.open(tmp_path / "store"), base)
    question = Question("plain", "rephrasings", "report", "Purple rain over Oslo", (0,), 0)
    (row,) = _rows("edits", retriever, [question], "some", {})
    assert (row.found, row.other, row.exact, row.answered) == (0.0, 0.0, 0.0, None)
    assert _rows("edits", retriever, [question], "none", {})[0].exact is None


def test_a_set_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "edits.jsonl", EDITS)
    code, _, err = run(capsys, "bench", "routing", "--edits", file, "--model", tiny, "--set", "knowedit", "--data",
                       tmp_path)  # fmt: skip
    assert code == 2 and "training" not in err and "knowedit needs" in err and "MEMOIR_DATA" in err
