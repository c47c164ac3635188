"""The judge of questions: from their words it tells an edit's question from those that are like it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from test_store import masks, stored_edit
from test_store import write as write_store

from memoir_index import HammingIndex, pack
from memoir_retrieval.edits.judge import _SENTENCE, TABLE, Judge, _fold, judge_named, read, shipped_judge
from memoir_retrieval.edits.task_words import PLACE
from memoir_retrieval.errors import StoreError, StoreMismatch
from memoir_retrieval.lookup import masks as lookup_module
from memoir_retrieval.lookup.masks import AROUND, EditLookup, around_of
from memoir_retrieval.lookup.vocabulary import Vocabulary
from memoir_retrieval.store.read import EditStore

JUDGE = shipped_judge()
MOTHER = "Who is the mother of Ann Lee?"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("What’s ZÜRICH's  Straße?", ("what", "zurich", "strasse")),
        ("Don't sell 1,000 or 1.5 of C++ and C#", ("do", "not", "sell", "1000", "or", "1.5", "of", "c++", "and", "c#")),
        ("Łódź — RX-100/b", ("lodz", "rx", "100", "b")),
        ("東京は", ("東", "京", "は")),
        ("Are you sure, aren't you? It isn't ours, is it not?", ("are", "you", "sure", "it", "is", "not", "ours")),
        ("The twenty-first of May", ("the", "21st", "of", "may")),
        ("2⁵, 10² m² and 2½ of H₂O", ("2", "5", "10", "2", "m2", "and", "2", "1", "2", "of", "h2o")),
        ("", ()),
        ('"""', ()),
    ],
)
def test_case_accents_and_signs_do_not_count(text: str, words: tuple[str, ...]) -> None:
    assert read(text).words == words


def test_a_run_of_signs_takes_no_quadratic_time() -> None:
    """Quadratic time would be 20 minutes for these texts, so no clock is asked: the suite's timeout ends it."""
    for number in range(100):
        assert read("." * 8000 + f"x{number}").words == (f"x{number}",)
        assert read("?!" * 4000 + f"x{number}").words == (f"x{number}",)


def test_a_run_of_marks_takes_no_quadratic_time() -> None:
    """Quadratic time would be hours for this text, so no clock is asked: the suite's timeout ends it."""
    assert _fold("A" + "\u0301\u0327" * 500_000 + "b") == "ab"


@pytest.mark.parametrize("stop", ["\u0964", "\u0965", "\u06d4", "\u0964\u0964"])
def test_stops_of_other_scripts_end_a_clause(stop: str) -> None:
    assert read(f"vah aaya{stop} kaun gaya{stop}").clauses == (("vah", "aaya"), ("kaun", "gaya"))
    apart = f"Translate{stop} Who is the mother of Ann?{stop} {PLACE}"
    assert _SENTENCE.findall(apart) == ["Translate", " Who is the mother of Ann?", f" {PLACE}"]


@pytest.mark.parametrize(
    "question",
    [
        "who is the mother of ann lee",
        "WHO IS THE MOTHER OF ANN LEE?!",
        "Who is Ann Lee's mother?",
        "What is the name of Ann Lee's mother?",
        "Please answer briefly: Who is the mother of Ann Lee?",
        "Who is the mohter of Ann Lee?",
        "Who is the mother of Ann Lee, right?",
        "You know who the mother of Ann Lee is, don't you?",
        "You know who the mother of Ann Lee is, dont you",
    ],
)
def test_the_same_question_in_other_words_passes(question: str) -> None:
    assert JUDGE.verdict(MOTHER, question).same


@pytest.mark.parametrize(
    ("edit", "question"),
    [
        (MOTHER, "Who is the mother of Ann Wong?"),
        (MOTHER, "Who is the father of Ann Lee?"),
        (MOTHER, "Where was Ann Lee born?"),
        (MOTHER, "Translate into French: Who is the mother of Ann Lee?"),
        (MOTHER, "Tell me about Ann Lee."),
        ("What does error code E12 mean?", "What does error code E13 mean?"),
        ("what is the capital of france", "what is the capital of spain"),
        ("How do I enable the alarm?", "How do I disable the alarm?"),
        ("Which plants are safe for cats?", "Which plants are not safe for cats?"),
        ("Who won the cup in 2023?", "Who won the cup in 2024?"),
        ("Which language is C++ written in?", "Which language is C# written in?"),
        ("Is Ann Lee the mother of Kim?", "Ann Lee isn't the mother of Kim, is she?"),
        ("Does Kim live in Bergen?", "Kim does not live in Bergen, does he?"),
        ("Does Kim live in Bergen?", "Kim never lived in Bergen, right?"),
        ("Which plants are safe for cats?", "Which plants are safe for cats, and which are not?"),
        ("Which plants are safe for cats?", "Which plants aren't safe for cats, are they?"),
        ("Who was the ninth queen of Spain?", "Who was the tenth queen of Spain?"),
        ("Who was the ninth queen of Spain?", "Who was the 10th queen of Spain?"),
        ("Who was the 9th queen of Spain?", "Who was the tenth queen of Spain?"),
        ("Who ruled in the nineteenth century?", "Who ruled in the eighteenth century?"),
        ("Who ruled in the twenty-first century?", "Who ruled in the 22nd century?"),
        ("Who wrote nine operas?", "Who wrote the 9th opera?"),
        ("Who was the third queen of Spain?", "Who was the queen of Spain?"),
        ("Who was the queen of Spain?", "Who was the eleventh queen of Spain?"),
        ("What is 2⁵?", "What is 25?"),
        ("How long is a mile in 10² steps?", "How long is a mile in 102 steps?"),
        ("What happens in episode seven?", "What happens in episode 8?"),
        ("What happens in episode seven?", "What happens in episode eight?"),
    ],
)
def test_another_name_number_opposite_or_task_does_not(edit: str, question: str) -> None:
    verdict = JUDGE.verdict(edit, question)
    assert not verdict.same and verdict.score < 0
    assert verdict.lacking or verdict.added


@pytest.mark.parametrize(
    ("edit", "question"),
    [
        ("Is Ann Lee the mother of Kim?", "Ann Lee is the mother of Kim, isn't she?"),
        ("Does Kim live in Bergen?", "Kim lives in Bergen, doesn’t he?"),
        ("Does Kim live in Bergen?", "Kim lives in Bergen, no?"),
        ("Which plants are not safe for cats?", "Which plants are not safe for cats, are they?"),
    ],
)
def test_what_asks_for_a_yes_behind_a_sentence_is_no_negation(edit: str, question: str) -> None:
    assert JUDGE.verdict(edit, question).same and JUDGE.verdict(question, edit).same


@pytest.mark.parametrize(
    ("words", "digits"),
    [
        ("first", "1st"),
        ("second", "2nd"),
        ("third", "3rd"),
        ("ninth", "9th"),
        ("twelfth", "12th"),
        ("twentieth", "20th"),
        ("thirty-second", "32nd"),
        ("nine", "9"),
    ],
)
def test_a_number_in_words_is_that_in_digits(words: str, digits: str) -> None:
    edit = "Who was the {} king of the island?"
    for a, b in ((words, digits), (digits, words)):
        assert JUDGE.verdict(edit.format(a), edit.format(b)).same


def test_what_the_rest_of_the_message_asks_counts() -> None:
    assert JUDGE.verdict(MOTHER, MOTHER, "The weather was nice yesterday.").same
    verdict = JUDGE.verdict(MOTHER, MOTHER, "Translate into German:")
    assert not verdict.same and verdict.part == "task" and verdict.task == "translate into german"


def test_a_slip_is_not_another_word_but_another_code_is() -> None:
    edit = "What year was the film Star Eyes made?"
    for question in ("Waht year was the film Star Eyes made?", "What yaer was the flim Satr Eyes made?"):
        assert JUDGE.verdict(edit, question).same
    assert not JUDGE.verdict("Where is gene PRDM made?", "Where is gene PRMD7 made?").same
    assert not JUDGE.verdict("Which trial is in form A12?", "Which trail is in form A12?").same, "both are words"


def test_words_that_are_required_are_not_held_against_a_question() -> None:
    edit, question = "Who is the mayor of Mumbai?", "Who is the mayor of Bombay?"
    assert not JUDGE.verdict(edit, question).same
    assert JUDGE.verdict(edit, question, required=("Mumbai", "Bombay")).same


def test_the_time_of_a_verdict_does_not_grow_with_the_text() -> None:
    """A text is cut: of a hundred thousand characters, sentences or quotes a bounded part is read."""
    for text in ("a " * 50_000, "Is it? " * 15_000, '"' * 100_000, "7" * 100_000, "e\u0301\u0323" * 40_000):
        assert len(read(text).words) <= 512
        assert not JUDGE.verdict(MOTHER, text).same


def test_a_verdict_is_the_same_every_time() -> None:
    again = shipped_judge.__wrapped__()  # read a second time
    for question in ("What is the name of Ann Lee's mother?", "Who gave birth to Ann Lee?", "Who is Ann?"):
        assert again.verdict(MOTHER, question) == JUDGE.verdict(MOTHER, question)
    assert again.name == JUDGE.name


def test_a_damaged_table_is_refused() -> None:
    data = (Path(__file__).parents[2] / "memoir_retrieval" / "data" / TABLE).read_bytes()
    for broken in (b"", data[:-1], data[: len(data) // 2], b"\0" * 100):
        with pytest.raises(StoreError, match=r"judge.safetensors is damaged .*: install memoir-retrieval again"):
            Judge.of_bytes(broken)


def test_a_store_of_another_judge_is_refused() -> None:
    assert judge_named("", Path("edits")) is None
    assert judge_named(JUDGE.name, Path("edits")) is JUDGE
    with pytest.raises(
        StoreMismatch, match=f"store edits was made with judge 1-0123, this memoir-retrieval has {JUDGE.name}"
    ):
        judge_named("1-0123", Path("edits"))


PROMPTS = ("Who runs Acme?", "Where is Acme?", "Who runs Initech?")


def words_of(ids: object) -> str:
    return PROMPTS[ids[0]] if ids and ids[0] < len(PROMPTS) else "How old is Acme?"  # type: ignore[index]


def judged_store(folder: Path, judge: str = JUDGE.name) -> EditStore:
    """Three edits; the masks of the first two are one and the same."""
    codes = masks(3, seed=4)[[0, 0, 1]]
    write_store(folder, codes=codes, edits=[stored_edit(i, prompt=text) for i, text in enumerate(PROMPTS)])
    store = EditStore.open(folder)
    return replace(store, manifest=msgspec.structs.replace(store.manifest, judge=judge))


def test_of_edits_with_one_mask_the_one_that_is_asked_matches(tmp_path: Path) -> None:
    lookup = EditLookup(judged_store(tmp_path), words_of)
    codes = masks(3, seed=4)[[0, 0, 0, 1]]
    hits = lookup.search(codes, 0.5, [[0], [1], [9], [2]])
    assert hits.ids.tolist() == [0, 1, -1, 2] and hits.rows.tolist() == [0, 1, -1, 2]
    assert hits.overlaps.tolist() == [1.0, 1.0, 1.0, 1.0]
    judged = lookup.judged(codes[:2], 0.5, [[1], [9]])
    assert [one and (one.edit, one.verdict.same) for one in judged] == [(1, True), (0, False)]


def test_the_span_of_a_message_decides_whose_words_are_an_edits(tmp_path: Path) -> None:
    """Spans are looked up beside the whole message, and what stands around them counts."""
    texts = [
        "Hello. Who runs Acme?",
        "Who runs Acme?",
        "Translate into French: Who runs Acme?",
        "Where is Acme?",
        "Hm.",
    ]
    lookup = EditLookup(judged_store(tmp_path), lambda ids: texts[ids[0]] if ids else "")
    near, far = masks(3, seed=4)[[0, 2]]
    codes = np.stack([near, near, near, near, far, far, near])
    hits, chosen = lookup.decide(codes, 0.9, [[0], [1], [2], [1], [4], [4], [3]], [2, 2, 1, 2])
    assert hits.ids.tolist() == [0, -1, -1, 1]
    assert chosen.tolist()[2:] == [4, 6] and chosen[0] in (0, 1)


def sharing(rng: np.random.Generator, mask: np.ndarray, common: int) -> np.ndarray:
    """A mask that has so many ones in common with another; bool [D]."""
    other = np.zeros_like(mask)
    other[rng.permutation(np.flatnonzero(mask))[:common]] = True
    other[rng.permutation(np.flatnonzero(~mask))[: mask.sum() - common]] = True
    return other


def asked_store(folder: Path, prompts: list[str], codes: np.ndarray, requires: list[tuple[str, ...]]) -> EditStore:
    edits = [
        stored_edit(i, prompt=prompt, requires=texts)
        for i, (prompt, texts) in enumerate(zip(prompts, requires, strict=True))
    ]
    write_store(folder, n=len(edits), codes=codes, edits=edits)
    store = EditStore.open(folder)
    return replace(store, manifest=msgspec.structs.replace(store.manifest, judge=JUDGE.name))


@pytest.mark.parametrize("large", [0, 256])
@pytest.mark.parametrize("others", [7, 8, 20])
def test_nearer_edits_of_the_same_name_do_not_hide_the_one_whose_words_these_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: int, large: int
) -> None:
    monkeypatch.setattr(lookup_module, "_LARGE", large)
    rng = np.random.default_rng(8)
    mask = np.arange(64) < 12
    prompts = [f"What does Acme Corp sell in {1980 + i}?" for i in range(others)] + ["Who runs Acme Corp?"]
    codes = pack(np.stack([*(sharing(rng, mask, 5) for _ in range(others)), sharing(rng, mask, 4)]))
    store = asked_store(tmp_path, prompts, codes, [("Acme Corp",)] * len(prompts))
    lookup = EditLookup(store, lambda ids: "WHO RUNS ACME CORP?" if ids else "")
    hits = lookup.search(pack(mask[None]), 0.5, [[0]])
    assert (hits.ids.tolist(), hits.rows.tolist(), hits.overlaps.tolist()) == ([others], [others], [4 / 12])


def test_of_many_edits_of_one_name_the_index_finds_those_that_a_look_at_every_row_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(9)
    centre = rng.permutation(64) < 12
    names, things = ("Acme", "Bolt", "Cord"), ("chairs", "lamps", "boats", "ropes")
    prompts = [f"Who sold {t} to {n} in {year}?" for n in names for t in things for year in range(1990, 1998)]
    masks_of = [sharing(rng, centre, int(common)) for common in rng.integers(3, 13, len(prompts))]
    requires = [tuple(name for name in names if name in prompt and rng.random() < 0.8) for prompt in prompts]
    store = asked_store(tmp_path, prompts, pack(np.stack(masks_of)), requires)
    texts = [*prompts[::5], "Who sold lamps to Acme?", "What about Bolt and Cord?", "ACME", "When?"]
    lookup = EditLookup(store, lambda ids: texts[ids[0]] if ids else "")
    queries = pack(np.stack([sharing(rng, centre, int(common)) for common in rng.integers(3, 13, len(texts))]))
    questions = [[i] for i in range(len(texts))]
    searched = []
    only = HammingIndex.only
    monkeypatch.setattr(HammingIndex, "only", lambda *given: searched.append(len(given[1])) or only(*given))
    seen = set()
    for tau in (0.3, 0.5, 0.7):
        results = []
        for large in (1 << 30, 8):
            monkeypatch.setattr(lookup_module, "_LARGE", large)
            searched.clear()
            hits, chosen = lookup.decide(queries, tau, questions, [3] * (len(questions) // 3))
            results.append([column.tolist() for column in (*hits, chosen)])
            results[-1].append(lookup.judged(queries, tau, questions))
            assert bool(searched) == (large == 8)
        assert results[0] == results[1]
        seen |= {edit >= 0 for edit in results[0][0]}
    assert seen == {True, False} and len(questions) % 3 == 0


def test_a_question_with_one_mistyped_word_finds_its_edit_however_far_its_mask_is(tmp_path: Path) -> None:
    prompts = ["Who runs Methley Mills?", "Who runs Initech?", "Where is Acme Bolt 17?", "Who owns Brunel Works?"]
    texts = {
        "Who runs Mehtley Mills?": 0,
        "WHO RUNS METHLY MILLS": 0,
        "Who rusn Initech?": 1,
        "Who runs Initeck?": 1,
        "Who runs Mehtley Milsl?": -1,  # two slips
        "Who runs Methley Bolt?": -1,  # each word is one of some question
        "Who runs Methley Miles?": -1,  # a word of its own
        "Where is Acme Bolt 71?": -1,
        "Who owns Brunle Works?": -1,  # it lacks what the edit requires
        "Who runs the Mehtley Mills?": -1,  # another word, too
    }
    codes = masks(2, seed=4)
    store = asked_store(tmp_path, prompts, codes[[0] * 4], [(), (), (), ("Brunel",)])
    lookup = EditLookup(store, lambda ids: [*texts][ids[0]] if ids else "")
    hits = lookup.search(codes[[1] * len(texts)], 0.9, [[i] for i in range(len(texts))])
    assert dict(zip(texts, hits.ids.tolist(), strict=True)) == texts
    assert (hits.overlaps < 0.9).all() and len(set(hits.overlaps.tolist())) == 1


def test_words_that_slips_make_of_each_other_are_found_and_few_others() -> None:
    words = ["volvo", "volva", "venus", "a", "17", "methley", "b12m"]
    vocabulary = Vocabulary(words)
    for word, like in (("vlovo", {"volvo"}), ("volv", {"volvo", "volva"}), ("volvoo", {"volvo"}), ("mars", set())):
        assert {*vocabulary.like(word)} == like
    assert vocabulary.stranger(["volvo", "vlovo", "a"]) == "vlovo"
    for others in (["volvo", "a"], ["vlovo", "venuss"], ["b13m"], ["vol"]):
        assert vocabulary.stranger(others) == ""
    assert Vocabulary(()).stranger(["vlovo"]) == "vlovo" and not [*Vocabulary(()).like("vlovo")]


def test_a_message_that_holds_a_question_beside_a_task_is_that_task(tmp_path: Path) -> None:
    """The words of the whole fit the question; what its own part has around it does not."""
    texts = ["Now please: Who runs Acme?", "Who runs Acme?", "please: Who runs Acme?"]
    lookup = EditLookup(judged_store(tmp_path), lambda ids: texts[ids[0]] if ids else "")
    codes = masks(3, seed=4)[[0, 0, 0]]
    for around, edit in (([-np.inf, -9, -9], 0), ([-np.inf, 9, -9], -1), ([-np.inf, 9, 9], -1)):
        says = np.array(around, np.float32)
        hits, chosen = lookup.decide(codes, 0.9, [[0], [1], [2]], [3], says)
        assert hits.ids.tolist() == [edit]
        parts = lookup.parts(codes, 0.9, [[0], [1], [2]], int(chosen[0]), says)
        assert [part.same for part in parts] == [edit == 0] * 3
        assert [part.reason == "task" for part in parts] == [edit < 0] * 3


def rephrased_store(folder: Path, requires: tuple[str, ...] = ()) -> EditStore:
    """One edit whose rephrasing has a mask of its own; both masks are alike."""
    edit = stored_edit(0, prompt="Who runs Acme?", rephrases=("The boss of Initech?",), requires=requires)
    both = masks(2, seed=4)[[0, 0]]
    write_store(folder, n=1, codes=both, ids=np.zeros(2, int), memory_of=np.zeros(2, np.int32), edits=[edit])
    store = EditStore.open(folder)
    return replace(store, manifest=msgspec.structs.replace(store.manifest, judge=JUDGE.name))


def test_a_task_is_one_whatever_other_wordings_an_edit_has(tmp_path: Path) -> None:
    texts = ["Translate into French: Who runs Acme?", "Who runs Acme?"]
    lookup = EditLookup(rephrased_store(tmp_path), lambda ids: texts[ids[0]] if ids else "")
    codes = masks(2, seed=4)[[0, 0]]
    hits, chosen = lookup.decide(codes, 0.9, [[0], [1]], [2])
    assert hits.ids.tolist() == [-1]
    assert [part.reason for part in lookup.parts(codes, 0.9, [[0], [1]], int(chosen[0]))][1] == "task"
    assert lookup.search(codes[:1], 0.9, [[1]]).ids.tolist() == [0]


@pytest.mark.parametrize("common", [1.0, 0.0])
def test_a_rephrasing_word_by_word_acts_only_where_what_is_required_stands(tmp_path: Path, common: float) -> None:
    texts = ["The boss of Initech?", "THE BOSS OF INITECH?", "Who runs ACME?"]
    lookup = EditLookup(rephrased_store(tmp_path, ("Acme",)), lambda ids: texts[ids[0]] if ids else "")
    near, far = masks(2, seed=4)
    codes = np.stack([near if common else far] * 3)
    assert lookup.search(codes, 0.9, [[0], [1], [2]]).ids.tolist() == [-1, -1, 0]


def test_a_message_with_the_words_of_an_edit_alone_is_no_task(tmp_path: Path) -> None:
    """Double spaces make the end of a question a part; what stands before it may look like a task."""
    texts = ["Who  runs  Acme?", "runs Acme?"]
    lookup = EditLookup(judged_store(tmp_path), lambda ids: texts[ids[0]] if ids else "")
    codes = masks(3, seed=4)[[0, 0]]
    assert lookup.decide(codes, 0.9, [[0], [1]], [2], np.array([-np.inf, 99], np.float32))[0].ids.tolist() == [0]


def test_each_part_says_what_spoke_against_its_edit_in_the_words_of_the_message_alone(tmp_path: Path) -> None:
    texts = ["Translate into French: Who runs Acme today?", "Who runs Acme?", "Where is Acme?", "Hm." + "x" * 300]
    lookup = EditLookup(judged_store(tmp_path), lambda ids: texts[ids[0]] if ids else "")
    near, far = masks(3, seed=4)[[0, 2]]
    whole, task = lookup.parts(np.stack([near, near]), 0.9, [[0], [1]], 1)
    other, nothing = lookup.parts(np.stack([near, far]), 0.9, [[2], [3]], 0)
    assert [part.edit for part in (whole, task, other)] == [0, 0, 1] and nothing.edit is None
    assert not (whole.same or task.same or nothing.same) and other.same
    assert (task.reason, task.words) == ("task", ("translate into french",))
    assert "translate" in whole.words and whole.overlap == 1.0
    assert (other.reason, other.words) == ("same words", ()) and [other.decides, nothing.decides] == [True, False]
    assert nothing.overlap < 0.9 and len(nothing.text) == 200


def test_a_store_without_a_judge_is_decided_by_its_masks_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lookup = EditLookup(judged_store(tmp_path, judge=""), words_of)
    assert [record.message for record in caplog.records] == [
        f"store {tmp_path} was made without a judge of questions, so masks alone decide: `memoir calibrate {tmp_path} "
        "--write` adds one"
    ]
    assert lookup.search(masks(3, seed=4)[:1], 0.5, [[1]]).ids.tolist() == [0]


def test_the_table_that_is_shipped_is_the_one_that_its_name_says() -> None:
    table = (Path(__file__).parents[2] / "memoir_retrieval" / "data" / TABLE).read_bytes()
    assert JUDGE.name == f"{JUDGE.weights.version}-{hashlib.sha256(table).hexdigest()[:16]}"
    assert len(table) < 3 << 20 and JUDGE.vectors.dtype == np.int8


def test_what_stands_around_each_place_of_a_question_is_read() -> None:
    question, far = "Who runs Acme?", "x" * 9000
    assert around_of(f"{question}{far}Translate this: {question}{far}", question).count(PLACE) == 2
    assert "Translate" in around_of(f"{far}{question}{far}Translate this: {question}{far}", question)
    assert around_of(f"Say: {question} Bye.", question) == f"Say: {PLACE} Bye."
    assert len(around_of(question * 5000, question)) <= 4 * AROUND
    for alone in ("", "  "):
        assert around_of(question, alone) == around_of(f" {question}\n", question) == ""
