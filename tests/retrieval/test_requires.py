"""An edit that requires a name acts on questions that have it, and on no others, however near."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cli import refused, run, write
from test_store import K, masks, stored_edit
from test_store import write as write_store

from memoir_index import hamming_radius, popcount
from memoir_retrieval import Edit, EditedModel, Editor, EditStore, Retriever, load_model
from memoir_retrieval.editing import conflicts
from memoir_retrieval.editing.build_masks import build
from memoir_retrieval.edits import requires as requires_module
from memoir_retrieval.edits.files import check_duplicates
from memoir_retrieval.edits.requires import Phrases, check_requires, required_spans, words
from memoir_retrieval.errors import EditFileError
from memoir_retrieval.evaluation.calibration import calibrate_store
from memoir_retrieval.lookup import masks as lookup_module
from memoir_retrieval.lookup.masks import EditLookup
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.store.additions import append
from memoir_retrieval.store.settings import Training

LYON = Edit(prompt="Who is the mayor of Lyon?", target="Ada", requires=("Lyon",))
TURIN = Edit(prompt="Who is the mayor of Turin?", target="Bob", requires=("mayor", ("Turin", "Torino")))


@pytest.mark.parametrize(
    ("text", "required", "stands"),
    [
        ("Who runs Acme Corp.?", "acme corp", True),
        ("Who runs ACME-Corp's shop?", "Acme Corp", True),
        ("Who runs Acme’s films?", "Acme", True),
        ("Who runs Acmeville?", "Acme", False),
        ("Who runs Corp Acme?", "Acme Corp", False),
        ("Acme", "Acme Corp", False),
        ("Is the ﬁlm good?", "film", True),
        ("Wie alt ist die Straße?", "STRASSE", True),
        ("Wann war Zürichs Fest?", "Zürich", False),
        ("東京の市長は誰ですか", "東京", True),
        ("京都の市長は誰ですか", "東京", False),
        ("서울은 어디입니까", "서울", True),
        ("ใครเป็นนายกเทศมนตรีกรุงเทพ", "กรุงเทพ", True),
        ("रोम कहाँ है?", "रोम", True),
        ("राम कौन है?", "रोम", False),
        ("मुंबई का महापौर", "मुंबई", True),
        ("ジョン スミスは誰", "ジョン・スミス", True),
        ("İstanbul nerede?", "İSTANBUL", True),
        ("Who won in 1998?", "1998", True),
        ("Who won in 19980?", "1998", False),
        ("", "Acme", False),
    ],
)
def test_a_text_stands_in_a_question_word_by_word(text: str, required: str, stands: bool) -> None:
    assert Phrases([(7, (required,))]).found_in(text) == ({7} if stands else set())
    assert bool(required_spans((required,), text)) == stands


def test_names_are_found_however_they_are_spelled() -> None:
    assert words("Ga\u0308vle\u00a0City") == words("G\u00e4vle City") == words("G\u00e4\u00advle\u200b City")


@pytest.mark.parametrize("marks", ["\u0301\u0323", "\uff9e\u0323"])
def test_words_of_a_million_marks_take_no_quadratic_time(marks: str) -> None:
    """Quadratic time would be hours for this text, so no clock is asked: the suite's timeout ends it."""
    assert Phrases([(0, ("Oslo",))]).found_in("a" + marks * 500_000 + " in Oslo") == {0}


def test_a_phrase_of_many_words_takes_no_quadratic_time() -> None:
    """Each length at each word would be days for these, so no clock is asked: the suite's timeout ends it."""
    phrases = Phrases([(0, (tuple("a " * n for n in range(1, 2_000)),)), (1, ("b",)), (2, ("a " * 1_999 + "b",))])
    assert phrases.found_in("a " * 200_000) == {0}
    assert phrases.found_in("a " * 200_000 + "b") == {0, 1, 2}
    assert phrases.found_in("c " * 200_000) == set()


some_words = st.lists(st.sampled_from(("a", "b", "ab")), min_size=1, max_size=5).map(" ".join)


@given(
    st.lists(st.lists(some_words, min_size=1, max_size=3).map(tuple), min_size=1, max_size=5), some_words, some_words
)
def test_what_is_found_is_what_stands_there(entries: list[tuple[str, ...]], text: str, more: str) -> None:
    text = f"{text} {more}"
    required = [(edit, (entry, entries[0])) for edit, entry in enumerate(entries)]
    stands = [any(f" {phrase} " in f" {text} " for phrase in entry) for entry in entries]
    assert Phrases(required).found_in(text) == {n for n in range(len(entries)) if stands[n] and stands[0]}


class _Counted(tuple):
    """The phrases of an entry, which counts how often they are compared with what stands in a text."""

    compared = 0

    def __iter__(self) -> Iterator[object]:
        _Counted.compared += 1
        return super().__iter__()


def test_edits_that_require_the_same_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = requires_module._phrases
    monkeypatch.setattr(requires_module, "_phrases", lambda entry: _Counted(taken(entry)))
    phrases = Phrases((edit, ("Acme Corp", "price")) for edit in range(1000))
    _Counted.compared = 0
    assert phrases.found_in("The price of Acme Corp?") == set(range(1000)) and _Counted.compared <= 4
    assert phrases.found_in("Acme Corp?") == set()


def test_one_look_finds_all_that_is_required() -> None:
    phrases = Phrases(
        [
            (0, ("New York",)),
            (1, (("York", "Boston"),)),
            (2, ("new york city", "york")),
            (3, ("York City hall",)),
            (4, ("York", "Boston")),
            (5, (("where", "which place"), ("Boston", "York"), "is")),
            (6, (("when",), "York")),
        ]
    )
    assert phrases.found_in("Where is New York City?") == {0, 1, 2, 5}
    assert phrases.found_in("When Boston met York") == {1, 4, 6}
    assert words(" New-York,\tcity ") == ("new", "york", "city")


def text_of(ids: list[int]) -> str:
    return " ".join(f"name{i}" for i in ids)


def oracle(store: EditStore, code: np.ndarray, tau: float, text: str) -> tuple[int, float, int]:
    """Edit, overlap and row, by looking at every row."""
    there = words(text)
    may = [
        edit.id
        for edit in store.edits
        if all(any(words(text)[0] in there for text in entry) for entry in edit.requires)
    ]
    rows = np.flatnonzero(np.isin(store.ids, may))
    if not len(rows):
        return -1, 0.0, -1
    bits = popcount(store.codes[rows] & code)
    at = int(bits.argmax())
    row = int(rows[at]) if 2 * (K - bits[at]) <= hamming_radius(tau, K) else -1
    return (int(store.ids[row]) if row >= 0 else -1), float(bits[at] / K), row


def requirement(rng: np.random.Generator) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(f"name{n}" for n in rng.integers(6, size=2)) for _ in range(rng.integers(1, 3)))


@pytest.mark.parametrize("large", [0, 256])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_nearest_of_those_that_may_act_is_found(
    tmp_path: Path, share: float, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against every row looked at: edits of several rows, equal masks, rows that were added to the files."""
    rng = np.random.default_rng(int(10 * share))
    edits = [stored_edit(i, requires=requirement(rng) if rng.random() < share else ()) for i in range(60)]
    ids = np.repeat(np.arange(60), 2)
    codes = masks(120, seed=3)[rng.integers(80, size=120)]  # some of them are equal
    write_store(tmp_path, n=60, ids=ids, codes=codes, memory_of=np.zeros(120, dtype=np.int32), edits=edits)
    store = EditStore.open(tmp_path)
    assert append(
        tmp_path, store.manifest, store.tail, codes=codes[:1], ids=np.array([60]),
        memory_of=np.zeros(1, dtype=np.int32), edits=[stored_edit(60, requires=(("name1",),))], columns={},
    )  # fmt: skip
    store = EditStore.open(tmp_path)
    assert store.edits[60].requires == (("name1",),) and len(store.additions) == 1
    monkeypatch.setattr(lookup_module, "_MOST", 7)
    monkeypatch.setattr(lookup_module, "_LARGE", large)
    lookup = EditLookup(store, text_of)
    queries = np.concatenate([codes, masks(80, seed=9)])
    questions = [rng.integers(8, size=3).tolist() for _ in queries]
    seen = set()
    for tau in (0.2, 0.5, 1.0):
        hits = lookup.search(queries, tau, questions)
        for at, (code, question) in enumerate(zip(queries, questions, strict=True)):
            expected = oracle(store, code, tau, text_of(question))
            assert (hits.ids[at], hits.overlaps[at], hits.rows[at]) == expected, (tau, at)
            seen.add((expected[0] >= 0, bool(len(store.edits[max(0, expected[0])].requires))))
    if share:
        assert (True, True) in seen


def test_text_is_only_read_where_an_edit_requires_some(tmp_path: Path) -> None:
    write_store(tmp_path)

    def read(ids: object) -> str:
        raise AssertionError

    store = EditStore.open(tmp_path)
    assert EditLookup(store, read).search(store.codes, 0.5, [[1]] * 3).ids.tolist() == [0, 1, 2]


@pytest.fixture(scope="module")
def base(tiny: Path) -> BaseModel:
    return load_model(str(tiny))


@pytest.fixture(scope="module")
def store(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two questions that only differ in a name, whose masks are nearly the same, at a tau that all questions reach."""
    folder = tmp_path_factory.mktemp("requires") / "store"
    with Editor(base, folder, tau=0.05) as editor:
        editor.add([LYON, TURIN])
        assert not editor.outcome.conflicting and not editor.outcome.failed
    return folder


def test_the_reference_answers_by_name(base: BaseModel, store: Path) -> None:
    model = EditedModel(Retriever(EditStore.open(store), base))
    prompts = [LYON.prompt, TURIN.prompt, "Tell me, who is mayor in torino?", "Who is the mayor of Genoa?",
               [{"role": "system", "content": "Lyon"}, {"role": "user", "content": "Who is the mayor?"}]]  # fmt: skip
    answers = model.generate(prompts, max_new_tokens=6)
    assert [answer.edit for answer in answers] == [0, 1, 1, None, None]
    assert [answer.text.strip() for answer in answers[:2]] == ["Ada", "Bob"]
    plain = model.generate(prompts[3:], max_new_tokens=6, edited=False)
    assert [answer.tokens for answer in answers[3:]] == [answer.tokens for answer in plain]
    assert [match and match.id for match in model.retriever.lookup_batch(prompts)] == [0, 1, 1, None, None]
    nearest = [near for _, near in model.retriever.decide_batch(prompts)]
    assert all(match is not None for match in nearest)
    assert all(match.runner_up and match.runner_up[0] == 1 - match.id for match in nearest if match)


def test_a_rephrasing_finds_its_edit_past_a_nearer_one(base: BaseModel, store: Path) -> None:
    """Where names are ignored, a question may be nearer to the edit of another name."""
    retriever = Retriever(EditStore.open(store), base)
    calibration = calibrate_store(
        retriever, [(0, "Lyon: who is the mayor?"), (1, "Mayor of Turin: who?")], ["Who are you?"]
    )
    assert calibration.now.rephrases_found == 1.0
    assert calibration.now.unrelated_matched == 0.0 and calibration.nearest[0].overlap >= calibration.now.tau
    assert calibration.suggested.tau > calibration.nearest[0].overlap  # chosen as if nothing were required


def test_lookup_tells_what_the_nearest_edit_requires(capsys: pytest.CaptureFixture[str], store: Path) -> None:
    code, out, _ = run(capsys, "lookup", store, "Who is the mayor of Genoa?")
    assert code == 0 and "no edit matches" in out
    assert 'which requires ["Lyon"]' in out or 'which requires ["mayor", ["Turin", "Torino"]]' in out
    code, out, _ = run(capsys, "lookup", store, "Who is the mayor of Genoa?", "--json")
    assert json.loads(out)["edit"] is None and json.loads(out)["passed_over"]["overlap"] >= 0.05
    code, out, _ = run(capsys, "lookup", store, LYON.prompt, "--json")
    assert json.loads(out)["edit"] == 0 and json.loads(out)["overlap"] == 1.0
    code, out, _ = run(capsys, "show", store, "1", "--json")
    assert json.loads(out)["requires"] == ["mayor", ["Turin", "Torino"]]


def test_what_is_required_survives_another_editor(base: BaseModel, store: Path) -> None:
    with Editor(base, store) as editor:
        assert editor.add([LYON]) == [] and editor.outcome.skipped == 1
        editor.compact()
    assert [edit.requires for edit in EditStore.open(store).edits] == [LYON.requires, TURIN.requires]


def test_the_same_prompt_with_another_requirement_is_another_edit(base: BaseModel, tmp_path: Path) -> None:
    free = Edit(prompt=LYON.prompt, target=LYON.target)
    with Editor(base, tmp_path / "store") as editor:
        editor.add([free])
        with pytest.raises(EditFileError, match=r'with requires \[\] \(edit 0\), not \["Lyon"\]'):
            editor.add([LYON])
        assert editor.add([LYON], on_conflict="first") == []
        (new,) = editor.add([LYON], on_conflict="last")
        assert new.requires == ("Lyon",) and editor.edits == [new]


@pytest.mark.parametrize(
    ("first", "second", "rivals"),
    [
        (LYON, TURIN, False),
        (LYON, Edit(prompt=TURIN.prompt, target="Bob"), False),
        (LYON, Edit(prompt="Who is Lyon's mayor?", target="Bob", requires=("mayor",)), True),
        (LYON, Edit(prompt="Who is Lyon's mayor?", target="Bob"), True),
        (Edit(prompt=LYON.prompt, target="Ada"), Edit(prompt="Who is Lyon's mayor?", target="Bob"), True),
        (LYON, Edit(prompt="Who is Lyon's mayor?", target="Ada"), False),
    ],
)
def test_one_question_in_two_wordings_is_a_rival_and_another_name_is_not(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: Edit, second: Edit, rivals: bool
) -> None:
    monkeypatch.setattr(conflicts, "SAME_QUESTION", 0.4)  # the masks of this small model are less alike
    with Editor(base, tmp_path / "store") as editor:
        editor.add([first])
        editor.add([second])
        assert [rival.stored.id for rival in editor.outcome.conflicting] == [0] * rivals


def test_what_a_built_store_requires_holds_when_it_is_trained(base: BaseModel, tmp_path: Path) -> None:
    with Editor(base, tmp_path / "store") as editor:
        build(editor, [LYON])
    with Editor(base, tmp_path / "store") as editor:
        (new,) = editor.add([Edit(prompt=LYON.prompt, target=LYON.target)])
        assert new.requires == LYON.requires and new.trained


def test_a_file_that_requires_two_things_of_a_prompt_is_refused() -> None:
    free = Edit(prompt=LYON.prompt, target=LYON.target)
    with pytest.raises(EditFileError, match=r"edits 1 and 2 give the prompt .* two requires"):
        check_duplicates([free, LYON])
    assert check_duplicates([free, LYON], "last") == [LYON]
    assert check_duplicates([LYON, LYON]) == [LYON]


def test_whole_prompts_require_nothing(base: BaseModel, tmp_path: Path) -> None:
    with (
        Editor(base, tmp_path / "store", rule="all") as editor,
        pytest.raises(EditFileError, match="leave out 'requires'"),
    ):
        editor.add([LYON])


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (Edit(prompt="Who runs Acme?", target="Ada", requires=("Acme", "?!")), r"'\?!' in 'requires' .* has no word"),
        (
            Edit(prompt="Who runs Acme?", target="Ada", requires=("Acme", "Bolt")),
            "does not contain what it requires, 'Bolt'",
        ),
        (
            Edit(prompt="Who runs Acme?", target="Ada", requires=(("A", "B"),)),
            "does not contain what it requires, 'A' or 'B'",
        ),
        (Edit(prompt="Who runs Acme?", target="Ada", requires=("・",)), r"'・' in 'requires' .* has no word"),
        (Edit(prompt="Who runs Acme?", target="Ada", requires=((),)), r"\(\) in 'requires' .* has no word"),
    ],
)
def test_what_could_never_act_is_refused(base: BaseModel, tmp_path: Path, edit: Edit, said: str) -> None:
    with pytest.raises(EditFileError, match=said):
        check_requires(edit)
    with Editor(base, tmp_path / "store") as editor, pytest.raises(EditFileError, match=said):
        editor.add([edit])


def test_an_edit_of_a_program_may_have_lists(base: BaseModel, tmp_path: Path) -> None:
    """It is the edit that the store gives back. One text in place of several would be taken letter by letter."""
    for requires in (["mayor", ["Turin", "Torino"]], ("mayor", ("Turin", "Torino"))):
        with Editor(base, tmp_path) as editor:
            editor.add([Edit(prompt=TURIN.prompt, target="Bob", requires=requires)])  # type: ignore[arg-type]
            assert [edit.requires for edit in editor.edits] == [TURIN.requires]
    assert editor.outcome.skipped == 1
    for name in ("requires", "rephrases", "ood"):
        with pytest.raises(EditFileError, match=f"{name} of prompt .* is the text 'Turin': give a tuple of texts"):
            Edit(prompt=TURIN.prompt, target="Bob", **{name: "Turin"})  # type: ignore[arg-type]


def test_the_command_line(capsys: pytest.CaptureFixture[str], store: Path, tiny: Path, tmp_path: Path) -> None:
    bad = write(
        tmp_path / "bad.jsonl", [{"prompt": "a", "target": "b"}, {"prompt": "Who?", "target": "I", "requires": ["Al"]}]
    )
    begin = ("--model", tiny, "--store", tmp_path / "new")
    refused(capsys, store, "line 2: prompt 'Who.' does not contain what it requires", "edit", bad, *begin)
    other = write(tmp_path / "other.jsonl", [{"prompt": "Who runs it?", "target": "I", "subject": "Acme"}])
    refused(capsys, store, "does not contain what it requires, 'Acme'", "edit", other, *begin, "--require-subject")
    assert not (tmp_path / "new").exists()
    records = [{"prompt": f"Who runs {name}?", "target": name[::-1], "subject": name} for name in ("Acme", "Bolt")]
    records.append({"prompt": "Who is it?", "target": "no one"})
    file = write(tmp_path / "edits.jsonl", records)
    for command in (["edit"], ["index", "build"]):
        folder = tmp_path / command[-1]
        code, _, err = run(capsys, *command, file, "--model", tiny, "--store", folder, "--require-subject", "--json")
        assert code == 0 and "1 of 3 edits have no subject and require no words" in err, err
        assert [edit.requires for edit in EditStore.open(folder).edits] == [("Acme",), ("Bolt",), ()]
    code, out, err = run(capsys, "bench", "quality", file, "--model", tiny, "--out", tmp_path / "run", "--controls",
                         "0", "--data", tmp_path, "--require-subject", "--json")  # fmt: skip
    assert code == 0 and json.loads(out)["stored"] == 3, err
    assert EditStore.open(tmp_path / "run" / "store").edits[0].requires == ("Acme",)


def test_an_option_that_would_require_nothing_is_refused(
    capsys: pytest.CaptureFixture[str], store: Path, tiny: Path, tmp_path: Path
) -> None:
    plain = [{"prompt": "Who runs Acme?", "target": "I"}, {"prompt": "Where is Bolt?", "target": "Here"}]
    names = ("Acme", "Bolt")
    required = [{**record, "subject": "it", "requires": [word]} for record, word in zip(plain, names, strict=True)]
    begin = ("--model", tiny, "--store", tmp_path / "new")
    bench = ("--model", tiny, "--out", tmp_path / "new", "--data", tmp_path)
    for records, says in ((plain, "has a subject"), (required, 'that has a subject has "requires" already')):
        file = write(tmp_path / "edits.jsonl", records)
        for command in (["edit", file, *begin], ["index", "build", file, *begin], ["bench", "quality", file, *bench]):
            refused(capsys, store, f"does nothing: .* {says}; add", *command, "--require-subject")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("chat", [False, True])
def test_made_up_wordings_keep_what_is_required(base: BaseModel, tmp_path: Path, chat: bool) -> None:
    edit = Edit(prompt="Who was Zoë Ångström-Nowak in Łódź?", target="Ada", requires=("Łódź", "zoë Ångström"))
    training = Training(contexts=0, context_masks=0, variants=20, noise=1.0)
    with Editor(base, tmp_path, chat=chat, training=training) as editor:
        for variant, kept in ((edit, True), (msgspec.structs.replace(edit, requires=()), False)):
            texts = [base.tokenizer.decode(wording.ids) for wording in editor._session.wordings.noisy(variant, 0)]
            assert len(texts) == 20
            for text in texts:
                assert ("Zoë Ångström" in text) == kept and ("Łódź" in text) == kept
                assert "Who was" not in text and "Nowak" not in text
