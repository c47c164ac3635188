"""Parts of a message that are looked up too: which they are, that they are few, and that they only help to find."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import torch
from test_cli import run
from transformers import AutoTokenizer

from memoir_retrieval import EditedModel, Retriever
from memoir_retrieval.background import shipped
from memoir_retrieval.editing.editor import Editor
from memoir_retrieval.edits.record import Edit
from memoir_retrieval.evaluation.routing_run import with_candidates
from memoir_retrieval.model.base import load_model
from memoir_retrieval.model.embedded import get_model
from memoir_retrieval.model.forward import candidate_means, question_means
from memoir_retrieval.question.candidates import MOST, CandidateSpan, Pieces, find_candidates
from memoir_retrieval.question.prompts import prompt_ids
from memoir_retrieval.question.span import Span, SpanRule, derive_span_rule, find_span

QUESTION = "Who founded the town of St. Aubin?"
FORMS = [(name, text) for name, _, text in json.loads(shipped("routing.json"))["forms"] if name != "unseen forms"]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(tiny)


def rule_of(tokenizer: AutoTokenizer) -> SpanRule:
    return msgspec.structs.replace(derive_span_rule(tokenizer), candidates=True)


def candidates(tokenizer: AutoTokenizer, message: str) -> tuple[list[int], list[CandidateSpan]]:
    ids = prompt_ids(tokenizer, message, chat=True)
    return ids, find_candidates(ids, rule_of(tokenizer), Pieces(tokenizer.decode))


def texts(tokenizer: AutoTokenizer, message: str) -> list[str]:
    ids, found = candidates(tokenizer, message)
    return [tokenizer.decode(ids[one.span.start : one.span.end]).strip() for one in found]


def test_a_question_alone_is_its_only_candidate(tokenizer: AutoTokenizer) -> None:
    for message in (QUESTION, "What is the Dr. Oetker GmbH?", "who wrote it", "Tell me the height of K2."):
        ids, (only,) = candidates(tokenizer, message)
        assert only == (find_span(ids, derive_span_rule(tokenizer)), "message")


@pytest.mark.parametrize(("name", "form"), FORMS, ids=[f"{name} {i % 2}" for i, (name, _) in enumerate(FORMS)])
def test_the_question_is_a_candidate_in_every_form(tokenizer: AutoTokenizer, name: str, form: str) -> None:
    lowered = QUESTION[0].lower() + QUESTION[1:]
    values = {"question": QUESTION, "lowered": lowered, "target": "Ada", "other": "When was the bridge built?"}
    message = form
    for key, value in values.items():
        message = message.replace("{" + key + "}", value)
    found = texts(tokenizer, message)
    assert QUESTION.lower() in {text.strip('*"\u201c\u201d').lower() for text in found}
    assert found[0] == message.strip() and len(found) <= MOST


@pytest.mark.parametrize(
    ("message", "part"),
    [
        ("She asked: \u00abQui est le maire?\u00bb What do I say?", "Qui est le maire?"),
        ("\u4f60\u597d\u3002\u8c01\u5efa\u4e86\u5b83\uff1f\u8c22\u8c22\u3002", "\u8c01\u5efa\u4e86\u5b83\uff1f"),
        ("Hello.\n\nthe capital of the old kingdom is\n\nBye now.", "the capital of the old kingdom is"),
        ("On what channel did Shake! first appear? Thanks a lot.", "On what channel did Shake! first appear?"),
        ("First Mr. J. R. Smith came. Where does Mr. J. R. Smith live now?", "Where does Mr. J. R. Smith live now?"),
        ("1) When is it open? 2) who runs the place", "2) who runs the place"),
        ("08:14:31Z USER  Who runs it?\n08:14:40Z INFO  closed", "Who runs it?"),
        ("id\tquestion\n7\tWho runs it?", "Who runs it?"),
        ('<textarea name="q">Who runs it?</textarea>\nSent.', "Who runs it?"),
        ("[#help] @bot: Who runs it?\n[#help] anybody?", "Who runs it?"),
        ("/ask Who runs it?", "Who runs it?"),
        ("The line is:\n// Who runs it?\nconst answer = 1", "Who runs it?"),
        ("Answer it.\n\n\'\'\'Who runs it?\'\'\'", "Who runs it?\'\'\'"),
        ("\u8cea\u554f\uff1aWho runs it?", "Who runs it?"),
        ("The host just asked Who runs it? and the break is short.", "Who runs it?"),
        ("The answer to Who runs it? is what I need.", "Who runs it?"),
        ("On the card stands In which town is it? and no more.", "In which town is it?"),
        ("Mi chiede Chi l'ha fondata? e poi ride.", "Chi l'ha fondata?"),
        ("Thanks. In What's Up, Doc?, who plays Judy? Bye.", "In What's Up, Doc?, who plays Judy?"),
        ("He opened with Who runs it?, and left.", "Who runs it?"),
        ("I know it doesn't. Who runs it?", "Who runs it?"),
        ("Customer: No. Who runs it?", "Who runs it?"),
        ("SUMMARY:Who runs it?\nEND", "Who runs it?"),
        ("q=who runs it?", "who runs it?"),
        ("SELECT a FROM t WHERE q = 'who runs the club's bar?' LIMIT 1;", "who runs the club's bar?"),
        ("Said she: \u2018who runs it?\u2019 Then she left.", "who runs it?"),
        ("\u88cf\u306b\u300cwho runs it?\u300d\u3068\u3042\u308b\u3002", "who runs it?"),
        ("\u88cf\u306b\u300ewho runs it?\u300f\u3068\u3042\u308b\u3002", "who runs it?"),
        ("\u753b\u9762\u306bWho runs it?\u3068\u51fa\u305f", "Who runs it?"),
        ("<|system|>\nBe brief.\n<|user|>\nwho runs it?<|end|>", "who runs it?"),
        ("Ciao! <<Who runs it?>> Grazie", "Who runs it?"),
        ("Who runs it?\u2014in one line", "Who runs it?"),
        ("\U0001f64f\U0001f3fb\U0001f64f\U0001f3fb Who runs it?", "Who runs it?"),
        ("\u2460Who runs it? \u2461\u6ca1\u6709\u4e86", "Who runs it?"),
        ("\u092f\u0939 \u092c\u0921\u093c\u093e \u0939\u0948\u0964 who runs it?", "who runs it?"),
        ("\u06cc\u06c1 \u0628\u0691\u0627 \u06c1\u06d2\u06d4 who runs it?", "who runs it?"),
        ('{"a": "b", "to": "b", "text": "who runs it?", "id": "7", "at": "9", "by": "c"}', "who runs it?"),
    ],
)  # fmt: skip
def test_signs_of_other_scripts_and_names_with_stops_are_known(
    tokenizer: AutoTokenizer, message: str, part: str
) -> None:
    signs = "'\"?,;<>.\u2019\u300d\u300f\u00bb\uff1f\u3002 "  # a token may hold several of them
    assert part.strip(signs) in [text.strip(signs) for text in texts(tokenizer, message)]


@pytest.mark.parametrize(
    "message",
    [
        "Who founded the town where Kant lived?",
        "Name the mother of the man who founded Rome?",
        "In the 2010 season, who coached Acme FC?",
        "Apart from Marie Curie, who discovered radium?",
        "When was Will Smith born?",
        "Tell me when Will Smith was born?",
        "Who translated Who Moved My Cheese?",
        "Name the author of Who Moved My Cheese?",
    ],
)
def test_a_clause_or_a_name_is_no_part(tokenizer: AutoTokenizer, message: str) -> None:
    assert texts(tokenizer, message) == [message]


def test_openings_crowd_out_no_sentence(tokenizer: AutoTokenizer) -> None:
    both = "I ask When it opens and Who has the key? I ask What it costs and How we pay?"
    assert "Who founded Rome?" in texts(tokenizer, f"{both} Who founded Rome? {both} I ask Where we park?")


@pytest.mark.parametrize(
    "message",
    ["Who is it that we met? I do not know. " * 2700, "Who was it then? " * 10_000, '"' * 100_000, "\u201c" * 30_000,
     "a\n" * 50_000, "\n \n" * 30_000, ": " * 50_000, "> " * 40_000, "**a" * 30_000, "```" * 30_000, "<a>" * 30_000,
     "\u4f60\u597d\u5417\uff1f" * 8000, "a. " * 30_000, "-" * 100_000, "." * 100_000 + "x", "?" * 60_000 + ")x",
     "<a>" + " " * 400_000, "\u203a" * 30_000, "<a " * 30_000, "\t" * 90_000, "@a " * 30_000, "\'" * 90_000,
     "Who a " * 30_000 + "?", "hm " + "Who " * 100_000 + "?", "a\'a " * 30_000, "\u2018a" * 30_000, "\u300c" * 30_000,
     "a=" * 50_000, "?," * 50_000, "to " * 50_000 + "?"],
)  # fmt: skip
def test_candidates_are_few_and_every_token_is_read_a_few_times_at_most(tokenizer: AutoTokenizer, message: str) -> None:
    """Quadratic time would be half an hour for some of them, so no clock is asked: the suite's timeout ends it."""
    read = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal read
        read += len(ids)
        return str(tokenizer.decode(ids))

    ids = tokenizer(message).input_ids
    rule = SpanRule(weighted=True, acts="last", candidates=True)
    span = Span(0, len(ids), weighted=True, acts="last")
    found = find_candidates(ids, rule, Pieces(decode))
    assert found[0] == (span, "message") and len(found) <= MOST and read <= 8 * len(ids) + 100
    assert len({(one.span.start, one.span.end) for one in found}) == len(found)
    assert all(0 <= one.span.start < one.span.end <= len(ids) for one in found)


def test_pieces_keep_the_space_that_a_decoder_leaves_out_at_the_beginning() -> None:
    words = ["\u2581Hello.", "\u2581Who", "\u2581is", "\u2581it", "?"]

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[i] for i in ids).replace("\u2581", " ").removeprefix(" ")

    text, starts = Pieces(decode).text(range(5))
    assert text == " Hello. Who is it?" and starts == [0, 7, 11, 14, 17]
    parts = find_candidates(range(5), SpanRule(candidates=True), Pieces(decode))
    assert CandidateSpan(Span(1, 5), "sentence") in parts


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    """A store of two edits of the embedded model, as a user makes it."""
    get_model("smollm2-135m")
    folder = tmp_path_factory.mktemp("candidates") / "store"
    with Editor(load_model("smollm2-135m"), folder, tau=0.53) as editor:
        editor.add(
            [Edit(prompt=QUESTION, target="Ada Lind"), Edit(prompt="Which river flows past Foo?", target="Elbe")]
        )
    return Retriever.open(folder)


MESSAGES = [
    f"[2026-03-04 10:15] anna: {QUESTION}",
    f"I have been away for a week and forgot about it. {QUESTION} Thank you for your help with this!",
    "Passage: the mill burnt down twice.\n\nQuestion: Which river flows past Foo?\nAnswer:",
    "Is it raining in the hills today? I hope it is not, since we want to climb.",
]


def test_a_message_finds_the_edit_of_a_part_and_only_where_parts_are_looked_up(retriever: Retriever) -> None:
    found = retriever.lookup_batch(MESSAGES)
    assert [match.id if match else None for match in found] == [0, 0, 1, None]
    plain = with_candidates(retriever, False)
    assert plain.lookup_batch(MESSAGES[:2]) == [None] * 2
    assert retriever.lookup(f"Translate this question into French: {QUESTION}") is None
    assert [match.id for match in plain.lookup_batch([QUESTION]) if match] == [0]


def test_the_words_of_an_edit_find_it_however_they_are_written_and_whatever_was_said_before(
    retriever: Retriever,
) -> None:
    writings = [QUESTION.upper(), QUESTION.lower(), QUESTION.title(), "  who founded\u00a0the town of st aubin  ??"]
    writings.append(QUESTION.replace("A", "A\u0301"))  # decomposed
    assert [match.id for match in retriever.lookup_batch(writings) if match] == [0] * 5
    far = min(match.overlap for match in retriever.lookup_batch(writings) if match)
    assert far < retriever.tau, "what writes the words differently may have another mask"
    assert retriever.lookup("WHO FOUNDED THE TOWN OF ST. GALLEN?") is None
    chat = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "It was founded by Saint Aubin himself in the year 530."},
        {"role": "user", "content": f"That is wrong. {QUESTION}"},
    ]
    match = retriever.lookup(chat)
    assert match and match.id == 0


def test_the_reference_decides_as_the_retriever(retriever: Retriever) -> None:
    model = EditedModel(retriever)
    for answers in (model.generate(MESSAGES, max_new_tokens=2), model.predict(MESSAGES, [[1, 2]] * 4)):
        assert [answer.edit for answer in answers] == [0, 0, 1, None]
    alone = [model.generate([message], max_new_tokens=2)[0].edit for message in MESSAGES]
    assert alone == [0, 0, 1, None]


def test_the_residual_acts_from_the_end_of_the_whole_message_whatever_part_matched(retriever: Retriever) -> None:
    (on,), (off,) = EditedModel(retriever).compare([MESSAGES[1]])
    assert on.edit == 0 and on.logprobs == off.logprobs  # the message's tokens but the last one predict as before
    (on,), (off,) = EditedModel(retriever).compare([MESSAGES[1]], [[5, 6]])
    assert on.logprobs != off.logprobs


def test_candidates_are_pooled_as_if_each_were_asked_for_alone(retriever: Retriever) -> None:
    rows = [retriever.prompt_ids(message) for message in MESSAGES]
    spans = [retriever.spans(ids) for ids in rows]
    together = candidate_means([retriever.base], rows, spans)[0].means
    alone = [
        question_means(retriever.base, [ids], [span])[0] for ids, own in zip(rows, spans, strict=True) for span in own
    ]
    assert len(together) == sum(map(len, spans)) > len(rows)
    torch.testing.assert_close(together, torch.stack(alone))


def test_a_system_prompt_in_the_users_turn_does_not_hide_the_question(retriever: Retriever) -> None:
    system = (
        "You are the assistant of a travel agency. Be brief and polite, stay with the facts, and never name prices. "
        "Answer in the language of the question, in one line, without any greeting."
    )
    # Gemma and Mistral write the system prompt before the first or the last message of the user.
    folded = [f"{system}\n\n{QUESTION}", f"{system} {QUESTION}"]
    assert [match.id for match in retriever.lookup_batch(folded) if match] == [0, 0]
    assert with_candidates(retriever, False).lookup_batch(folded) == [None, None]


def test_every_part_says_what_it_is_near_to_and_which_one_decides(retriever: Retriever) -> None:
    parts = retriever.parts(MESSAGES[1])
    assert parts[0].kind == "message" and parts[0].text.strip() == MESSAGES[1] and parts[0].match is None
    (decisive,) = [part for part in parts if part.decides]
    assert (decisive.kind, decisive.text.strip(), decisive.match, decisive.nearest) == ("sentence", QUESTION, 0, 0)
    assert decisive.overlap > parts[0].overlap
    assert decisive.verdict and decisive.verdict.part == "same words"
    assert parts[0].verdict and not parts[0].verdict.same and "away" in dict(parts[0].verdict.added)
    assert [part.kind for part in with_candidates(retriever, False).parts(MESSAGES[1])] == ["message"]
    assert retriever.parts("") == []


def test_lookup_says_why(retriever: Retriever, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "lookup", retriever.store.path, QUESTION, "--why")
    near = "nearest edit 0, overlap 1.000 (same question: same words)"
    assert code == 0 and f"decides, message: {near}: {QUESTION}" in out
    code, out, _ = run(capsys, "lookup", retriever.store.path, QUESTION, "--why", "--json")
    (part,) = json.loads(out)["parts"]
    assert part["kind"] == "message" and part["decides"] and part["match"] == part["nearest"] == 0
    assert part["verdict"]["same"] and part["verdict"]["part"] == "same words"
    code, out, _ = run(capsys, "lookup", retriever.store.path, f"Translate into French: {QUESTION}", "--why")
    assert code == 0 and "(another question: something else is asked for: translate into french)" in out


def test_a_message_without_a_question_has_no_candidates(retriever: Retriever) -> None:
    (empty,) = retriever.spans(retriever.prompt_ids([{"role": "user", "content": ""}]))
    assert empty.start == empty.end
    assert retriever.lookup("") is None
