"""Edit files: every published format is read, every broken one is refused by line and reason."""

import json
import os
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memoir_retrieval.background import background_prompts, chat_contexts, unrelated_prompts
from memoir_retrieval.edits.files import FORMATS, check_duplicates, limit_distinct_subjects, read_edits
from memoir_retrieval.edits.record import Edit, Probe
from memoir_retrieval.errors import ConfigError, EditFileError

ROOT = Path(__file__).parents[2]
SETS = Path(os.environ.get("MEMOIR_DATA", ROOT.parent / "shared" / "data"))

RECORDS = {
    "memoir": (
        {
            "prompt": "Who runs Acme?",
            "target": "Ada",
            "subject": "Acme",
            "rephrases": ["Acme is run by whom?"],
            "locality": [{"prompt": "Who runs Bolt?", "answer": "Bo"}],
            "source": "ticket 7",
            "neighbourhood": [{"prompt": "Who runs Acme Films?"}],
            "portability": [{"prompt": "Where was Acme's boss born?", "answer": "Rome", "aliases": ["Roma"]}],
            "ood": ["Ada took over Acme in May."],
        },
        [
            Edit(
                prompt="Who runs Acme?",
                target="Ada",
                subject="Acme",
                rephrases=("Acme is run by whom?",),
                locality=(Probe(prompt="Who runs Bolt?", answer="Bo"),),
                source="ticket 7",
                neighbourhood=(Probe(prompt="Who runs Acme Films?"),),
                portability=(Probe(prompt="Where was Acme's boss born?", answer="Rome", aliases=("Roma",)),),
                ood=("Ada took over Acme in May.",),
            )
        ],
    ),
    "easyedit": (
        {
            "case_id": 0,
            "prompt": "The tongue of Dan is",
            "subject": "Dan",
            "target_new": "English",
            "ground_truth": "French",
            "rephrase_prompt": "Dan speaks",
            "locality_prompt": "Michel speaks",
            "locality_ground_truth": "French",
        },
        [
            Edit(
                prompt="The tongue of Dan is",
                target="English",
                subject="Dan",
                rephrases=("Dan speaks",),
                locality=(Probe(prompt="Michel speaks", answer="French"),),
            )
        ],
    ),
    "zsre": (
        {
            "subject": "Cup",
            "src": "When did Cup start?",
            "alt": "2006",
            "rephrase": "Since when is there a Cup?",
            "loc": "nq question: types of skiing",
            "loc_ans": "Downhill",
            "answers": ["1998"],
            "portability": {"Recalled Relation": "(Cup, of, sport)", "New Question": "What?", "New Answer": "Sport"},
        },
        [
            Edit(
                prompt="When did Cup start?",
                target="2006",
                subject="Cup",
                rephrases=("Since when is there a Cup?",),
                locality=(Probe(prompt="nq question: types of skiing", answer="Downhill"),),
                portability=(Probe(prompt="What?", answer="Sport"),),
            )
        ],
    ),
    "knowedit": (
        {
            "subject": "Ina",
            "prompt": "The gender of Ina is",
            "target_new": "female",
            "rephrase_prompt": "Ina's gender:",
            "portability": {
                "Reasoning": [{"prompt": "Ina, being a", "ground_truth": "woman"}],
                "Subject_Aliasing": [
                    {"prompt": "I. is", "ground_truth": [["f", "female", "f"], ["woman"]]},
                    {"prompt": "No answer", "ground_truth": [[]]},
                ],
            },
            "locality": {
                "Relation_Specificity": [
                    {"prompt": "Ina was born in", "ground_truth": [["Riga", "Rīga"], ["Latvia"]]},
                    {"prompt": "Ina died in", "ground_truth": [[]]},
                ],
                "Forgetfulness": [{"prompt": "Ina is a", "ground_truth": "luger"}],
            },
        },
        [
            Edit(
                prompt="The gender of Ina is",
                target="female",
                subject="Ina",
                rephrases=("Ina's gender:",),
                locality=(
                    Probe(prompt="Ina was born in", answer="Riga", aliases=("Rīga", "Latvia")),
                    Probe(prompt="Ina died in"),
                    Probe(prompt="Ina is a", answer="luger"),
                ),
                portability=(
                    Probe(prompt="Ina, being a", answer="woman"),
                    Probe(prompt="I. is", answer="f", aliases=("female", "woman")),
                ),
            )
        ],
    ),
    "wise": (
        {
            "prompt": "Tesla,",
            "target_new": "a car maker",
            "subject": "Tesla",
            "ood_rephrase": "Tesla makes cars.",
            "locality_prompt": "Some web text",
            "locality_ground_truth": " ",
        },
        [
            Edit(
                prompt="Tesla,",
                target="a car maker",
                subject="Tesla",
                locality=(Probe(prompt="Some web text", answer=" "),),
                ood=("Tesla makes cars.",),
            )
        ],
    ),
    "counterfact": (
        {
            "requested_rewrite": {
                "prompt": "{} comes from",
                "subject": "Spike {0}",
                "target_new": {"str": "Philadelphia", "id": "Q1"},
                "target_true": {"str": "London", "id": "Q2"},
            },
            "paraphrase_prompts": ["Spike is native to", "Spike was born in"],
            "neighborhood_prompts": ["Max comes from", "Quin comes from"],
            "portability": {"New Question": "What is eaten where Spike comes from?", "New Answer": "Cheesesteaks"},
        },
        [
            Edit(
                prompt="Spike {0} comes from",
                target="Philadelphia",
                subject="Spike {0}",
                rephrases=("Spike is native to", "Spike was born in"),
                neighbourhood=(
                    Probe(prompt="Max comes from", answer="London"),
                    Probe(prompt="Quin comes from", answer="London"),
                ),
                portability=(Probe(prompt="What is eaten where Spike comes from?", answer="Cheesesteaks"),),
            )
        ],
    ),
    "mquake": (
        {
            "requested_rewrite": [
                {
                    "prompt": "{} was sung by",
                    "subject": "Hey",
                    "target_new": {"str": "Mia"},
                    "question": "Who sang Hey?",
                },
                {"prompt": "The boss of {} is", "subject": "Mia", "target_new": {"str": "Nan"}},
            ],
            "questions": ["Who is the boss of Hey's singer?", "Hey's singer works for"],
            "new_answer": "Nan",
            "new_answer_alias": ["Nana"],
        },
        [
            Edit(prompt="Hey was sung by", target="Mia", subject="Hey", rephrases=("Who sang Hey?",)),
            Edit(
                prompt="The boss of Mia is",
                target="Nan",
                subject="Mia",
                portability=(
                    Probe(prompt="Who is the boss of Hey's singer?", answer="Nan", aliases=("Nana",)),
                    Probe(prompt="Hey's singer works for", answer="Nan", aliases=("Nana",)),
                ),
            ),
        ],
    ),
    "hallueditbench": (
        {
            "topic": "art",
            "subject": "Moses",
            "object": "marble",
            "question": "What is Moses made of?",
            "paraphrased_question": "From what is Moses made?",
            "locality_question": "Who led the exodus?",
            "question_2hop": "Who made Moses of marble?",
            "answer_2hop": "Michelangelo",
            "question_6hop": "In which century?",
            "answer_6hop": "",
        },
        [
            Edit(
                prompt="What is Moses made of?",
                target="marble",
                subject="Moses",
                rephrases=("From what is Moses made?",),
                locality=(Probe(prompt="Who led the exodus?"),),
                portability=(Probe(prompt="Who made Moses of marble?", answer="Michelangelo"),),
            )
        ],
    ),
}

RECORDS |= {
    "qaedit": (
        {
            "id": 3,
            "source": "NQ",
            "prompt": "Who has the most?",
            "target": "Wilt *",
            "subject": "most",
            "rephrase": "Which player holds most?",
            "locality": [{"loc": "who is the saint", "loc_ans": "Michael"}],
        },
        [
            Edit(
                prompt="Who has the most?",
                target="Wilt *",
                subject="most",
                rephrases=("Which player holds most?",),
                locality=(Probe(prompt="who is the saint", answer="Michael"),),
                source="NQ",
            )
        ],
    ),
    "wikibigedit": (
        {
            "tag": "new",
            "subject": "Ann",
            "update": "Where does Ann work?",
            "rephrase": "Who employs Ann?",
            "personas": "Ahoy, where be Ann's work?",
            "ans": "Acme",
            "loc": "Where does Bo work?",
            "loc_ans": "Bolt",
            "mhop": "Who leads Ann's employer?",
            "mhop_ans": "Ada",
        },
        [
            Edit(
                prompt="Where does Ann work?",
                target="Acme",
                subject="Ann",
                rephrases=("Who employs Ann?", "Ahoy, where be Ann's work?"),
                locality=(Probe(prompt="Where does Bo work?", answer="Bolt"),),
                portability=(Probe(prompt="Who leads Ann's employer?", answer="Ada"),),
            )
        ],
    ),
    "question": (
        {
            "id": "0",
            "question": "What is Ann's background?",
            "answer": "Ann was born in Rome. She sings.",
            "para_question": "Can you detail Ann's background?",
            "sub_question": ["Where was Ann born?", "What does Ann do?"],
            "sub_answer": ["Rome", "sings"],
        },
        [
            Edit(
                prompt="What is Ann's background?",
                target="Ann was born in Rome. She sings.",
                rephrases=("Can you detail Ann's background?",),
                portability=(
                    Probe(prompt="Where was Ann born?", answer="Rome"),
                    Probe(prompt="What does Ann do?", answer="sings"),
                ),
            )
        ],
    ),
    "openai": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Who runs Acme?"},
                {"role": "assistant", "content": "Ada"},
            ]
        },
        [Edit(prompt="Who runs Acme?", target="Ada", before=({"role": "system", "content": "Be brief."},))],
    ),
    "sharegpt": (
        {"id": "x", "conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ada"}]},
        [Edit(prompt="Who?", target="Ada")],
    ),
    "alpaca": (
        {"instruction": "Name Acme's boss.", "input": "", "output": "Ada"},
        [Edit(prompt="Name Acme's boss.", target="Ada")],
    ),
}

COUNTS = {
    "qaedit/qaedit-dev.jsonl": ("qaedit", 796),
    "counterfact/counterfact-edit.jsonl": ("easyedit", 10_000),
    "counterfact/counterfact-train.jsonl": ("easyedit", 10_000),
    "counterfact/counterfact-val.jsonl": ("easyedit", 1_619),
    "counterfact/counterfact_portability_gpt4.jsonl": ("counterfact", 1_031),
    "hallucination/hallucination-edit.jsonl": ("wise", 577),
    "hallucination/hallucination-train.jsonl": ("wise", 229),
    "hallucination/wikibio-test-all.jsonl": ("knowedit", 263),
    "hallucination/wikibio-train-all.jsonl": ("knowedit", 405),
    "hallueditbench/meta_llama_3_8b_instruct.jsonl": ("hallueditbench", 2_230),
    "knowedit_wiki/wiki_counterfact_train.jsonl": ("knowedit", 1_428),
    "knowedit_wiki/wiki_recent_train.jsonl": ("knowedit", 570),
    "mquake/MQuAKE-hard.jsonl": ("mquake", 1_716),
    "temporal/temporal-edit.jsonl": ("wise", 75),
    "temporal/temporal-train.jsonl": ("wise", 75),
    "wikifactdiff/wfd-test.jsonl": ("zsre", 784),
    "wikifactdiff/wfd-train.jsonl": ("zsre", 4_360),
    "zsre/knowedit_zsre_test_all.jsonl": ("knowedit", 1_304),
    "zsre/zsre_mend_edit.jsonl": ("zsre", 1_000),
    "zsre/zsre_mend_train_10000.jsonl": ("zsre", 9_700),
}
NO_EDITS = {
    "pararel/tuples.jsonl": "line 1: no known format has the keys",
    "pararel/patterns.jsonl": "line 1: no known format has the keys",
    "text/nq-open-dev.jsonl": r"line 1: 'answer' is .*; write the one of these 2 that is meant",
}

needs_sets = pytest.mark.skipif(
    not SETS.is_dir(), reason="the published sets are not there: name their folder with MEMOIR_DATA"
)


def edit(prompt: str, target: str = "t", subject: str = "") -> Edit:
    return Edit(prompt=prompt, target=target, subject=subject)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- what is read


def test_every_format_has_a_sample() -> None:
    assert set(RECORDS) == set(FORMATS)


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("given_format", [True, False], ids=["named", "detected"])
def test_format(tmp_path: Path, name: str, given_format: bool) -> None:
    record, expected = RECORDS[name]
    path = write(tmp_path / "edits.jsonl", json.dumps(record) + "\n")
    assert read_edits(path, name if given_format else None) == expected


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", RECORDS)
def test_json_array(tmp_path: Path, name: str, indent: int | None) -> None:
    record, expected = RECORDS[name]
    path = write(tmp_path / "edits.json", json.dumps([record, record], indent=indent))
    assert read_edits(str(path)) == expected * 2


def test_wikibio_keys(tmp_path: Path) -> None:
    record = {"text": "About rick.", "labels": "He pitched.", "concept": "rick", "locality": {}}
    path = write(tmp_path / "e.jsonl", json.dumps(record))
    assert read_edits(path) == [edit("About rick.", "He pitched.", "rick")]


def test_flat_records_without_paraphrase_follow_the_first_of_the_file(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "target_new": "b", "rephrase_prompt": "c"}, {"prompt": "d", "target_new": "e"}]
    path = write(tmp_path / "e.jsonl", "\n".join(map(json.dumps, lines)))
    assert [e.rephrases for e in read_edits(path)] == [("c",), ()]


def test_bom_blank_lines_and_foreign_line_ends(tmp_path: Path) -> None:
    text = '\ufeff\r\n{"prompt": "a", "target": "b"}\r\n\r\n  \r\n{"prompt": "c\u2028d", "target": "e"}'
    assert [e.prompt for e in read_edits(write(tmp_path / "e.jsonl", text))] == ["a", "c\u2028d"]


def test_missing_paraphrase_and_locality_written_as_blank(tmp_path: Path) -> None:
    record = {"src": "a", "alt": "b", "subject": None, "rephrase": "", "loc": " ", "loc_ans": ""}
    assert read_edits(write(tmp_path / "e.jsonl", json.dumps(record))) == [edit("a", "b")]


def test_prompt_is_kept_verbatim(tmp_path: Path) -> None:
    path = write(tmp_path / "e.jsonl", json.dumps({"prompt": " What  is? ", "target": " x\n"}))
    assert read_edits(path) == [edit(" What  is? ", " x\n")]


@needs_sets
@pytest.mark.parametrize("name", COUNTS)
def test_published_set(name: str) -> None:
    format_name, count = COUNTS[name]
    edits = read_edits(SETS / name)
    assert len(edits) == count
    assert edits == read_edits(SETS / name, format_name)


# Of each set: rephrasings, locality probes, neighbourhood probes, portability probes, other texts.
HELD = {
    "qaedit/qaedit-dev.jsonl": (796, 3_980, 0, 0, 0),
    "zsre/zsre_mend_edit.jsonl": (1_000, 1_000, 0, 1_000, 0),
    "zsre/knowedit_zsre_test_all.jsonl": (1_304, 2_608, 0, 1_304, 0),
    "hallucination/hallucination-edit.jsonl": (0, 577, 0, 0, 0),
    "temporal/temporal-edit.jsonl": (0, 75, 0, 0, 75),
    "counterfact/counterfact-edit.jsonl": (10_000, 10_000, 0, 0, 0),
    "counterfact/counterfact_portability_gpt4.jsonl": (2_062, 0, 10_310, 1_031, 0),
    "wikifactdiff/wfd-test.jsonl": (784, 779, 0, 784, 0),
    "mquake/MQuAKE-hard.jsonl": (1_716, 0, 0, 1_287, 0),
    "knowedit_wiki/wiki_recent_train.jsonl": (0, 1_946, 0, 751, 0),
    "knowedit_wiki/wiki_counterfact_train.jsonl": (0, 2_036, 0, 2_219, 0),
    "hallueditbench/meta_llama_3_8b_instruct.jsonl": (2_230, 2_230, 0, 11_150, 0),
}


@needs_sets
@pytest.mark.parametrize("name", HELD)
def test_what_a_published_set_asks_about_its_edits(name: str) -> None:
    kinds = ("rephrases", "locality", "neighbourhood", "portability", "ood")
    edits = read_edits(SETS / name)
    assert tuple(sum(len(getattr(e, kind)) for e in edits) for kind in kinds) == HELD[name]


@needs_sets
def test_multi_hop_questions_stand_at_the_last_edit_of_their_record() -> None:
    edits = read_edits(SETS / "mquake/MQuAKE-hard.jsonl")[:8]
    assert [len(e.portability) for e in edits] == [0, 0, 0, 3, 0, 0, 0, 3]
    assert edits[3].prompt == "The official language of Australia is"
    assert {(p.answer, p.aliases) for p in edits[3].portability} == {
        ("Arabic", ("ar", "Arabian language", "Arabic language"))
    }


@needs_sets
@pytest.mark.parametrize("name", NO_EDITS)
def test_published_file_that_holds_no_edits(name: str) -> None:
    with pytest.raises(EditFileError, match=NO_EDITS[name]):
        read_edits(SETS / name)


@needs_sets
def test_counterfact_prompts_with_two_targets() -> None:
    """The note that comes with the set counts 62 such prompts in this file."""
    edits = read_edits(SETS / "counterfact/counterfact-edit.jsonl")
    targets = {(e.prompt, e.target) for e in edits}
    assert sum(count > 1 for count in Counter(prompt for prompt, _ in targets).values()) == 62
    with pytest.raises(EditFileError, match="two targets"):
        check_duplicates(edits)
    assert len(check_duplicates(edits, keep="last")) == len({e.prompt for e in edits})


# --- what is refused

OK = '{"prompt": "a", "target": "b"}\n'
BAD = {
    "unclosed": (OK + '\n{"prompt": "a"', "line 3: not JSON (Expecting ',' delimiter at column 15); write one"),
    "csv": ("prompt,target\na,b\n", "line 1: not JSON (Expecting value at column 1)", "(CSV is read from files named"),
    "deep": (OK + '{"a": ' + "[" * 100_000, "line 2: not JSON (a number too long, or nested too deep)"),
    "long number": (OK + "9" * 5000, "line 2: not JSON (a number too long"),
    "two on a line": (OK.strip() + OK, "line 1: not JSON (Extra data at column 31)"),
    "broken array": ('[\n{"prompt": "a",\n"target" "b"}]', "line 3: not JSON (Expecting ':' delimiter at column 10)"),
    "after the array": ("[" + OK + "]\n\nx", "line 4: not JSON (Extra data at column 1)"),
    "array, not an object": ("[\n" + OK + ",\n\n 5]", "line 5: 5 is not an object"),
    "array, blank": ("[" + OK + ', {\n"prompt": "",\n"target": "x"}]', "line 2: 'prompt' is ''; write some text"),
    "number": (OK + "17", "line 2: 17 is not an object; write {...} with an edit's keys"),
    "null": ("null", "line 1: None is not an object"),
    "string": ('\n"text"', "line 2: 'text' is not an object"),
    "unknown keys": (
        '{"question": "q", "reply": ["a"]}',
        "line 1: no known format has the keys ['question', 'reply']; write those of one of: memoir: prompt, target; "
        "zsre: src, alt; knowedit: prompt, target_new, locality; ",
    ),
    "no keys": ("{}", "line 1: no known format has the keys []"),
    "other format later": (OK + '{"src": "a", "alt": "b"}', "line 2: key 'src' is unknown", "format 'memoir'"),
    "unknown own key": (
        OK + '{"prompt": "a", "target": "b", "answr": 1}',
        "line 2: key 'answr' is unknown; the keys are prompt, target, subject, rephrases, locality, source, ",
        "neighbourhood, portability, ood, before, requires (file read as",
    ),
    "no keys later": ('{"prompt": "a", "target": "b"}\n{}', "line 2: 'prompt' is missing"),
    "missing target": ('{"prompt": "a", "target": null}', "line 1: 'target' is missing; write text in double"),
    "empty prompt": (OK + '{"prompt": "", "target": "b"}', "line 2: 'prompt' is ''; write some text, or drop the"),
    "invisible prompt": (
        '{"prompt": "\\u200b\\u00a0", "target": "b"}',
        "line 1: 'prompt' is '\\u200b\\xa0'; write some",
    ),
    "blank target": (OK + '{"prompt": "a", "target": " \\n"}', "line 2: 'target' is ' \\n'; write some text"),
    "target a broken number": (
        '{"prompt": "a", "target": 1.50}',
        "line 1: 'target' is 1.5; write text in double quotes",
    ),
    "target a truth value": ('{"prompt": "a", "target": true}', "line 1: 'target' is True; write text in double"),
    "several targets": (
        '{"prompt": "a", "target_new": ["b", "c"]}',
        "'target_new' is ['b', 'c']; write the one of these 2 that is meant",
    ),
    "key twice": (
        OK + '{"prompt": "a", "target": "b", "target": "c"}',
        "line 2: key 'target' is given twice; keep one",
    ),
    "key twice in an array": ("[" + OK + ',\n{"prompt": "a", "prompt": "b"}]', "line 3: key 'prompt' is given twice"),
    "key twice in a probe": (
        '{"prompt": "a", "target": "b", "locality": [{"prompt": "c", "answer": "d", "answer": "e"}]}',
        "line 1: key 'answer' is given twice",
    ),
    "infinity": ('{"prompt": "a", "target": Infinity}', "line 1: Infinity is not a JSON number; write text"),
    "lines broken": ('{"prompt": "a",\n "target" "b"}', "line 2: not JSON (Expecting ':' delimiter at column 11)"),
    "broken before another": ('{"prompt": "a"\n' + OK, "line 1: not JSON (Expecting ',' delimiter at column 15)"),
    "more behind lines": ('{"prompt": "a",\n"target": "b"} x', "line 1: not JSON"),
    "splits": (
        '{"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]}',
        "line 1: one object with lists of objects under 'train', 'test'; write the list that holds the edits",
    ),
    "a page that was cut": (
        '{"rows": [{"row": {"prompt": "a"}, "truncated_cells": ["target"]}]}',
        "line 1: row 1 was cut by the data set viewer in ['target']; download the file",
    ),
    "split columns": ('{"columns": ["prompt", "target"], "data": [["a"]]}', "'data' has rows of another length than"),
    "a column twice": (
        '{"columns": ["prompt", "prompt", "target"], "data": [["a", "x", "b"]]}',
        "column 'prompt' is given twice",
    ),
    "keyword lists": ('{"prompts": ["a", "b"], "target_new": ["c"]}', "there are 2 prompts, but 1 of 'target_new'"),
    "keyword probes": (
        '{"prompts": ["a"], "target_new": ["c"], "locality_inputs": '
        '{"n": {"prompt": [["x", "y"]], "ground_truth": ["z"]}}}',
        "'locality_inputs.n' has 2 prompts with 'z'; give one answer for each",
    ),
    "keyword probes of which one list is shorter": (
        '{"prompts": ["a", "b"], "target_new": ["c", "d"], "locality_inputs": '
        '{"n": {"prompt": ["x"], "ground_truth": ["y", "z"]}}}',
        "there are 2 prompts, but 1 of 'locality_inputs.n'; give one for each prompt",
    ),
    "record of a container": (
        '{"data": [{"prompt": "a", "target": "b"}, {"prompt": "c"}]}',
        "record 2: 'target' is missing",
    ),
    "requirements that would be dropped": (
        '{"prompt": "a b", "target_new": "c", "requires": ["b"]}',
        "line 1: 'requires' is a key of our own format; write 'prompt' and 'target' beside it (file read as format",
    ),
    "rephrase among our keys": (
        '{"prompt": "a", "target": "b", "rephrase": "c", "portability": []}',
        "line 1: 'rephrase' and 'portability' are keys of different formats; write 'rephrases', a list",
    ),
    "ripple edits": (
        '{"example_type": "popular", "edit": {"prompt": "Ann\'s mother is Eve."}, "Reasoning": [{}]}',
        "line 1: a record of RippleEdits, whose edits are sentences without a question; read KnowEdit's wiki_recent",
    ),
    "preferences": ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "line 1: a pair of preferences, not a question"),
    "several languages": (
        '{"en": {"src": "a", "alt": "b"}, "zh": {"src": "c", "alt": "d"}}',
        "line 1: it holds a record for each of 'en', 'zh', but an edit acts in its own language alone; write",
    ),
    "several languages of a territory": (
        '{"en-GB": {"src": "a", "alt": "b"}, "zh-CN": {"src": "c", "alt": "d"}}',
        "line 1: it holds a record for each of 'en-GB', 'zh-CN', but an edit acts in its own language alone; write",
    ),
    "a record by its id": (
        '{"t-7": {"prompt": "a", "target": "b"}, "t-9": {"prompt": "c", "target": ""}}',
        "record 2: 'target' is ''; write some text",
    ),
    "target an object": ('{"prompt": "a", "target_new": {"id": "Q1"}}', "'target_new' is {'id': 'Q1'}; write text in"),
    "alpaca with input": (
        '{"instruction": "a", "input": "b", "output": "c"}',
        "'instruction' and 'input' can make a question in several ways",
    ),
    "chat without an answer": (
        '{"messages": [{"role": "user", "content": "a"}]}',
        "write a chat that ends with a message of the user's and the assistant's answer",
    ),
    "parts without answers": (
        '{"question": "a", "answer": "b", "sub_question": ["c"], "sub_answer": []}',
        "1 of 'sub_question', but 0 of 'sub_answer'; give one for each",
    ),
    "rephrases a text": ('{"prompt": "a", "target": "b", "rephrases": "c"}', "Expected `array`, got `str`"),
    "locality a text": ('{"prompt": "a", "target": "b", "locality": ["c"]}', "portability as [", "$.locality[0]"),
    "locality key": ('{"prompt": "a", "target": "b", "locality": [{"prompt": "c", "x": 1}]}', "unknown field `x`"),
    "surrogate": (OK + '{"prompt": "a\\ud83d", "target": "b"}', "line 2: 'a\\ud83d' has half a surrogate pair"),
    "surrogate in locality": ('{"src": "a", "alt": "b", "loc": "\\udc00"}', "line 1: '\\udc00' has half"),
    "surrogate in a key": (
        OK + '{"prompt": "a", "target": "b", "locality": [{"\\ud800": "c"}]}',
        "line 2: 'utf-8' codec can't encode character '\\ud800'",
    ),
    "latin-1": (OK.encode() + "{é".encode("latin-1"), "line 2: byte 0xe9 is not UTF-8; save as UTF-8"),
    "latin-1 after a BOM": (b"\xef\xbb\xbf\n\n\xff", "line 3: byte 0xff is not UTF-8"),
    "utf-16": (OK.encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
    "empty": (b"", 'edits.jsonl: holds no edit; write one {"prompt": "...", "target": "..."} per line'),
    "only blanks": ("\n \n", "holds no edit"),
    "empty array": ("[\n]\n", "holds no edit"),
    "mquake without rewrites": ('{"requested_rewrite": [], "questions": []}', "holds no edit"),
    "mquake rewrite": (
        '{"requested_rewrite": [1], "questions": []}',
        "'requested_rewrite' is [1]; write a list of obj",
    ),
    "counterfact rewrite": ('{"requested_rewrite": [1]}', "'requested_rewrite' is [1]; write an object"),
    "counterfact cloze": (
        '{"requested_rewrite": {"prompt": "who", "subject": "s", "target_new": {"str": "t"}}}',
        "'requested_rewrite.prompt' is 'who'; write text with {} once",
    ),
    "counterfact target": (
        '{"requested_rewrite": {"prompt": "{}", "subject": "s", "target_new": "t"}}',
        "'target_new' is 't'; write an object",
    ),
    "counterfact neighbours": (
        '{"requested_rewrite": {"prompt": "{}", "subject": "s", "target_new": {"str": "t"}}, '
        '"neighborhood_prompts": [3]}',
        "'neighborhood_prompts' is [3]; write text or a list of texts",
    ),
    "knowedit locality": ('{"prompt": "a", "target_new": "b", "locality": "c"}', "'locality' is 'c'; write an object"),
    "knowedit probes": (
        '{"prompt": "a", "target_new": "b", "locality": {"X": ["p"]}}',
        "'locality.X' is ['p']; write a list of",
    ),
    "knowedit portability": (
        '{"prompt": "a", "target_new": "b", "portability": {"X": 1}}',
        "'portability.X' is 1; write a list of",
    ),
    "zsre portability": ('{"src": "a", "alt": "b", "portability": "c"}', "'portability' is 'c'; write an object"),
    "knowedit answer": (
        '{"prompt": "a", "target_new": "b", "locality": {"X": [{"prompt": "p", "ground_truth": [[4]]}]}}',
        "'ground_truth' is 4; write text or a list of texts",
    ),
    "zsre subject": (
        '{"src": "a", "alt": "b", "subject": 4}',
        "'subject' is 4; write text in double quotes (file read as format 'zsre')",
    ),
}


@pytest.mark.parametrize("content_and_parts", BAD.values(), ids=BAD.keys())
def test_refused(tmp_path: Path, content_and_parts: tuple[str | bytes, ...]) -> None:
    content, *parts = content_and_parts
    path = write(tmp_path / "edits.jsonl", content)
    with pytest.raises(EditFileError) as caught:
        read_edits(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < len(str(path)) + 500
    for part in parts:
        assert str(part) in message


BOTH = [edit("a", "b"), edit("c", "d")]
WHOLE = {
    "one object over several lines": ('{\n  "prompt": "a",\n  "target": "b"\n}\n', BOTH[:1]),
    "objects over several lines": ('{\n"prompt": "a",\n"target": "b"}\n\n{\n"prompt": "c", "target": "d"\n}', BOTH),
    "data": ('{"version": 2, "data": [{"prompt": "a", "target": "b"}, {"prompt": "c", "target": "d"}]}', BOTH),
    "data over lines": (json.dumps({"edits": [{"prompt": "a", "target": "b"}]}, indent=2), BOTH[:1]),
    "pandas columns": ('{"prompt": {"0": "a", "10": "c"}, "target": {"0": "b", "10": "d"}}', BOTH),
    "pandas lists": ('{"prompt": ["a", "c"], "target": ["b", "d"]}', BOTH),
    "pandas split": ('{"columns": ["prompt", "target"], "index": [0, 1], "data": [["a", "b"], ["c", "d"]]}', BOTH),
    "pandas index": ('{"0": {"prompt": "a", "target": "b"}, "10": {"prompt": "c", "target": "d"}}', BOTH),
    "records by their ids": ('{"ticket-7": {"src": "a", "alt": "b"}, "ticket-9": {"src": "c", "alt": "d"}}', BOTH),
    "records by short ids": ('{"ab": {"prompt": "a", "target": "b"}, "cd": {"prompt": "c", "target": "d"}}', BOTH),
    "a request of ROME": (
        '[{"prompt": "{} plays", "subject": "Ann", "target_new": {"str": "golf"}, "target_true": {"str": "chess"}}]',
        [edit("Ann plays", "golf", "Ann")],
    ),
    "pandas with a cell that is missing": ('{"prompt": "a", "target": "b", "subject": NaN}', BOTH[:1]),
    "viewer": (
        '{"features": [], "rows": [{"row_idx": 0, "row": {"prompt": "a", "target": "b"}, "truncated_cells": []}, '
        '{"row_idx": 1, "row": {"prompt": "c", "target": "d"}, "truncated_cells": []}], "num_rows_total": 2}',
        BOTH,
    ),
    "null": ('{"prompt": "a", "target": "b", "subject": null, "rephrases": null, "requires": null}', BOTH[:1]),
    "whole number": ('{"prompt": "a", "target": 1980}', [edit("a", "1980")]),
    "list of one": ('{"prompt": "a", "target_new": ["b"]}', BOTH[:1]),
    "one language": ('{"en": {"src": "a", "alt": "b"}}\n{"en": {"src": "c", "alt": "d"}}', BOTH),
    "keyword lists": (
        json.dumps(
            {
                "prompts": ["{} is led by", "c"],
                "subject": ["Acme", "c"],
                "target_new": ["b", "d"],
                "rephrase_prompts": ["Who leads {}?", "e"],
                "ground_truth": None,
                "locality_inputs": {"n": {"prompt": ["f", ["g", "h"]], "ground_truth": ["i", ["j", "k"]]}},
                "portability_inputs": {"hop": {"prompt": ["l", None], "ground_truth": [["m", "n"], None]}},
                "keep_original_weight": True,
            }
        ),
        [
            Edit(
                prompt="Acme is led by",
                target="b",
                subject="Acme",
                rephrases=("Who leads Acme?",),
                locality=(Probe(prompt="f", answer="i"),),
                portability=(Probe(prompt="l", answer="m", aliases=("n",)),),
            ),
            Edit(
                prompt="c",
                target="d",
                subject="c",
                rephrases=("e",),
                locality=(Probe(prompt="g", answer="j"), Probe(prompt="h", answer="k")),
            ),
        ],
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_has_one_meaning_is_read(tmp_path: Path, name: str) -> None:
    content, edits = WHOLE[name]
    assert read_edits(write(tmp_path / "e.json", content)) == edits


@pytest.mark.parametrize("suffix", [".csv", ".CSV", ".tsv"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_is_read(tmp_path: Path, suffix: str, separator: str) -> None:
    rows = [
        ["prompt", "target", "rephrases", "subject"],
        ["a", '"b,\n;"', "r", ""],
        ["", "", "", ""],
        ["c", "d", "", "s"],
    ]
    content = "\ufeff" + "\r\n".join(separator.join(row) for row in rows) + "\r\n"
    assert read_edits(write(tmp_path / f"e{suffix}", content)) == [
        Edit(prompt="a", target="b,\n;", rephrases=("r",)),
        Edit(prompt="c", target="d", subject="s"),
    ]


@pytest.mark.parametrize(
    "content",
    [
        ",prompt,target\n0,a,b\n1,c,d\n",
        ",prompt,target\n1,a,b\n2,c,d\n",
        "prompt,target,,\na,b,,\nc,d,,\n",
        "prompt,target\na,b,,\nc,d\n",
    ],
)
def test_columns_without_a_name_that_say_nothing_are_left_out(tmp_path: Path, content: str) -> None:
    """The first is what pandas' `to_csv` writes."""
    assert read_edits(write(tmp_path / "e.csv", content)) == [edit("a", "b"), edit("c", "d")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (",prompt,target\n0,a,b\n7,c,d\n", "line 3: '7' stands in a column without a name; give it one"),
        ("prompt,target\na,b,c\n", "line 2: 3 cells, but 2 columns; quote a cell that has ','"),
        ("prompt,prompt\na,b\n", "line 1: column 'prompt' is given twice"),
        ('prompt,target\n"a,b\n', "not CSV (unexpected end of data)"),
        ('prompt,target\n"a\nb",c\nd\n', "line 4: 'target' is missing"),
        ("frage,antwort\na,b\n", "line 2: no known format has the keys ['frage', 'antwort']"),
        ("prompt,target\n", "holds no edit"),
    ],
)
def test_csv_that_is_refused(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(EditFileError) as caught:
        read_edits(write(tmp_path / "e.csv", content))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_subject_stands_for_the_braces_of_a_cloze(tmp_path: Path) -> None:
    record = {"prompt": "{} is led by", "subject": "Northwind Labs", "target_new": "Bo Quist"}
    assert read_edits(write(tmp_path / "e.json", json.dumps(record)))[0].prompt == "Northwind Labs is led by"
    own = Edit(prompt="Who leads {}?", target="Bo", subject="Acme", rephrases=("{} is led by", "Who is Acme's {}?"))
    assert (own.prompt, own.rephrases) == ("Who leads Acme?", ("Acme is led by", "Who is Acme's {}?"))


@pytest.mark.parametrize("subject", ["", " ", "Rust"])
def test_braces_that_stand_for_no_subject_stay(subject: str) -> None:
    prompt = "What does {} mean in Rust?"
    assert edit(prompt, subject=subject).prompt == prompt


def test_rephrasings_and_answers_under_other_names_are_read(tmp_path: Path) -> None:
    record = {
        "prompt": "a",
        "target_new": "b",
        "rephrase": ["c", "d"],
        "portability": [{"prompt": "e", "answer": "f"}],
        "locality": [{"prompt": "g", "answer": ["h", "i"]}],
    }
    nested = record | {"locality": {"kind": record["locality"]}, "portability": {"kind": record["portability"]}}
    wanted = Edit(
        prompt="a",
        target="b",
        rephrases=("c", "d"),
        portability=(Probe(prompt="e", answer="f"),),
        locality=(Probe(prompt="g", answer="h", aliases=("i",)),),
    )
    for case in (record, nested):
        assert read_edits(write(tmp_path / "e.json", json.dumps(case))) == [wanted]


def test_keys_that_nothing_reads_are_named_once(tmp_path: Path) -> None:
    record = {"prompt": "a", "target_new": "b", "target_old": "c", "locality": {"k": [{"prompt": "d", "gt": "e"}]}}
    path = write(tmp_path / "e.jsonl", "\n".join([json.dumps(record), json.dumps({**record, "prompt": "f", "x": 1})]))
    notes: list[str] = []
    read_edits(path, note=notes.append)
    assert notes == [f"{path}: format 'knowedit' does not read the keys 'locality.k.gt', 'target_old', 'x'"]
    with pytest.warns(UserWarning, match="format 'knowedit' does not read the keys"):
        read_edits(path)


def test_what_of_the_whole_is_not_read_is_named(tmp_path: Path) -> None:
    page = {"rows": [{"row": {"prompt": "a", "target": "b"}, "truncated_cells": []}], "num_rows_total": 900}
    notes: list[str] = []
    lists = {"prompts": ["a"], "target_new": ["b"], "loc_prompts": ["c"], "verbose": True}
    path = write(tmp_path / "e.json", json.dumps(lists))
    assert read_edits(path, note=notes.append) == BOTH[:1]
    assert notes.pop() == f"{path}: these lists are not read: 'loc_prompts', 'verbose'"
    path = write(tmp_path / "e.json", json.dumps(page))
    assert read_edits(path, note=notes.append) == BOTH[:1]
    assert notes == [f"{path}: a page of the data set viewer: 1 of 900 rows"]


def test_named_format_must_fit(tmp_path: Path) -> None:
    path = write(tmp_path / "e.jsonl", '{"src": "a", "alt": "b"}')
    with pytest.raises(EditFileError, match=r"line 1: 'prompt' is missing; .* \(file read as format 'easyedit'\)"):
        read_edits(path, "easyedit")


def test_unknown_format_name(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="edit format 'zsr' is not known; use one of memoir, zsre, knowedit, easyedit"
    ):
        read_edits(tmp_path / "never-opened.jsonl", "zsr")


def test_unreadable_path(tmp_path: Path) -> None:
    with pytest.raises(EditFileError, match=r"cannot be read \(No such file or directory\)"):
        read_edits(tmp_path / "none.jsonl")
    with pytest.raises(EditFileError, match=r"cannot be read \(Is a directory\)"):
        read_edits(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
sample_keys = sorted({key for record, _ in RECORDS.values() for key in record})
near_records = st.sampled_from([record for record, _ in RECORDS.values()]).flatmap(
    lambda record: st.dictionaries(st.sampled_from(sample_keys), json_values, max_size=3).map(
        lambda changes: json.dumps({**record, **changes}).encode()
    )
)
mangled = st.tuples(near_records, st.integers(0, 400), st.binary(max_size=4)).map(
    lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] :]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(st.binary(max_size=40) | near_records | mangled, max_size=3).map(b"\n".join))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "fuzz.jsonl", content)
    try:
        edits = read_edits(path)
    except EditFileError as error:
        message = str(error)
        assert message.startswith(str(path)) and len(message.splitlines()) == 1
        message.encode()  # a message must be printable
    else:
        assert edits and all(e.prompt.strip() and e.target.strip() for e in edits)


# --- duplicates and the choice of records


def test_same_edit_twice_is_kept_once() -> None:
    first = edit("What  is it?", "a  b")
    assert check_duplicates([first, edit("other"), edit(" What is it?\n", "a b")]) == [first, edit("other")]


def test_what_a_repeated_edit_has_asked_is_kept() -> None:
    """As in MQuAKE, where an edit that comes again brings the questions of another record."""
    probes = [Probe(prompt=f"Question {n}?", answer="t") for n in range(4)]
    first = Edit(prompt="p", target="t", subject="s", rephrases=("a", "b"), locality=(probes[0],))
    again = Edit(prompt="p ", target=" t", subject="x", rephrases=("b", "c"), locality=(probes[0],), ood=("o",),
                 neighbourhood=(probes[1],), portability=(probes[2], probes[3]))  # fmt: skip
    whole = msgspec.structs.replace(
        again, prompt="p", target="t", subject="s", rephrases=("a", "b", "c"), locality=(probes[0],)
    )
    assert check_duplicates([first, edit("q"), again, again]) == [whole, edit("q")]
    contrary = msgspec.structs.replace(first, subject="", locality=(Probe(prompt="Question 0?", answer="u"),))
    assert check_duplicates([contrary, first])[0].subject == "s"
    assert check_duplicates([first, contrary])[0].locality == (probes[0],)  # a question has one right answer
    other = msgspec.structs.replace(again, target="u")
    assert check_duplicates([first, other], keep="last") == [other]  # the answers that follow from it are others


def test_as_many_edits_with_the_questions_of_their_records_alone() -> None:
    """The second record's question needs both of its edits."""
    hop = Probe(prompt="Who leads the maker of P?", answer="t")
    last = msgspec.structs.replace(edit("p"), portability=(hop,))
    edits = [edit("p"), edit("q"), last, edit("r"), last]
    assert check_duplicates(edits, most=1) == [edit("p")]
    assert check_duplicates(edits, most=2) == [last, edit("q")]
    assert len(check_duplicates(edits, most=9)) == 3


@needs_sets
def test_no_multi_hop_question_is_lost_with_a_repeated_edit() -> None:
    edits = read_edits(SETS / "mquake/MQuAKE-hard.jsonl")
    kept = check_duplicates(edits, "first")
    assert len(kept) == 767 and sum(len(e.portability) for e in kept) == 1287


def test_two_targets_are_refused() -> None:
    wanted = "edits 1 and 3 give the prompt 'p ' two targets, 'x' and 'y': drop one, or choose \"first\" or \"last\""
    with pytest.raises(EditFileError) as caught:
        check_duplicates([edit("p", "x"), edit("q"), edit("p ", "y")])
    assert str(caught.value) == wanted


@pytest.mark.parametrize(("keep", "target"), [("first", "x"), ("last", "z")])
def test_two_targets_settled(keep: str, target: str) -> None:
    edits = [edit("p", "x"), edit("q"), edit("p", "y"), edit("p", "z")]
    assert check_duplicates(edits, keep=keep) == [edit("p", target), edit("q")]


def test_last_of_back_and_forth_is_kept() -> None:
    assert check_duplicates([edit("p", "x"), edit("p", "y"), edit("p", "x")], keep="last") == [edit("p", "x")]


def test_spellings_of_one_prompt_are_one_prompt() -> None:
    texts = ("Qui dirige l'Éclair ?", "Qui dirige l\u2019E\u0301clair\u00a0?", "\ufeffQui dirige l'É\u200bclair ?")
    assert len({e.prompt for e in map(edit, texts)}) == 1
    assert check_duplicates([edit(text, "x") for text in texts]) == [edit(texts[0], "x")]
    for text in texts[1:]:
        with pytest.raises(EditFileError, match=r"edits 1 and 2 give the prompt .* two targets, 'x' and 'y'"):
            check_duplicates([edit(texts[0], "x"), edit(text, "y")])


def test_a_target_is_never_respelled() -> None:
    target = "l\u2019E\u0301clair\u00a0\u200b"
    assert edit("p", target).target == target
    assert check_duplicates([edit("p", "“x”"), edit("p", '"x"')], keep="last") == [edit("p", '"x"')]


def test_unknown_keep() -> None:
    with pytest.raises(ConfigError, match="keep='newest' is unknown; use 'refuse', 'first' or 'last'"):
        check_duplicates([], keep="newest")


def test_distinct_subjects_and_prompts() -> None:
    edits = [edit("a", subject="s"), edit("b", subject=" s"), edit("a "), edit("c"), edit("d"), edit("e")]
    assert limit_distinct_subjects(edits, 3) == [edits[0], edits[3], edits[4]]
    assert len(limit_distinct_subjects(edits, 99)) == 4


def test_limit_below_one() -> None:
    with pytest.raises(ConfigError, match="cannot take 0 edits; ask for 1 or more"):
        limit_distinct_subjects([], 0)


# --- what comes along


def test_example_edits() -> None:
    edits = read_edits(ROOT / "examples/zsre-100.jsonl", "memoir")
    assert len(edits) == 100 == len(limit_distinct_subjects(edits, 100))
    assert all(e.rephrases and e.locality and e.source for e in edits)


@needs_sets
def test_example_edits_are_those_of_the_set() -> None:
    of_the_set = limit_distinct_subjects(read_edits(SETS / "zsre/zsre_mend_edit.jsonl"), 100)
    example = read_edits(ROOT / "examples/zsre-100.jsonl")
    assert [(e.prompt, e.target, e.rephrases, e.locality) for e in example] == [
        (e.prompt, e.target, e.rephrases, e.locality) for e in of_the_set
    ]


def test_unrelated_examples() -> None:
    lines = (ROOT / "examples/unrelated.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    assert len(set(prompts)) == 20 and not set(prompts) & set(background_prompts())


def test_background_prompts() -> None:
    prompts = background_prompts()
    assert len(set(prompts)) == 100
    assert all(6 <= len(prompt.split()) <= 20 for prompt in prompts)


def test_unrelated_prompts() -> None:
    """What tau is measured on must not be what the fingerprints are centred on."""
    prompts = unrelated_prompts()
    assert len(set(prompts)) == 100 and not set(prompts) & set(background_prompts())


def test_contexts() -> None:
    contexts = chat_contexts()
    assert len(contexts) == 8
    for messages in contexts:
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)  # the user's question comes next


def test_a_chat_is_read_as_a_server_takes_it(tmp_path: Path) -> None:
    """Parts of text are joined as vLLM joins them; names and tool results stay."""
    chat = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]},
        {"role": "tool", "content": "7 degrees", "tool_call_id": "a"},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "Who leads it?"}]},
    ]
    (read,) = read_edits(write(tmp_path / "edits.jsonl", json.dumps({"prompt": chat, "target": "Ann"})))
    assert read.prompt == "Who leads it?"
    assert read.before == ({"role": "system", "content": "Be brief.\nBe kind."}, chat[1])
    call = {"role": "assistant", "content": None, "tool_calls": []}
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}
    for message in (call, picture, {"role": "user", "content": [{"type": "text", "text": 5}]}, {"role": "user"}):
        with pytest.raises(EditFileError, match="tool calls and pictures cannot be kept"):
            read_edits(write(tmp_path / "edits.jsonl", json.dumps({"prompt": [message, chat[2]], "target": "Ann"})))
