"""What the words around a question say: a task, or a frame in which an answer is wanted."""

from __future__ import annotations

import json
from importlib.resources import files

import numpy as np
import pytest
from safetensors.numpy import load, save

from memoir_retrieval.edits.judge import TABLE, TASK, WORDED, Judge, shipped_judge
from memoir_retrieval.edits.task_words import PLACE, ROWS, TaskWords, rows_of
from memoir_retrieval.evaluation import messages as module
from memoir_retrieval.evaluation.messages import Framed, framed, held_back
from memoir_retrieval.evaluation.train_judge import with_tasks
from memoir_retrieval.evaluation.train_task_words import LearntWords, learn_words

QUESTION = "Who runs Acme?"
JUDGE = shipped_judge()


@pytest.mark.parametrize(
    "rest",
    [
        f"Translate into French: {PLACE}",
        f"{PLACE}\nHow many words is that?",
        f"Wie viele Wörter hat das? {PLACE}",
        f"traduce al inglés: {PLACE}",
    ],
)
def test_words_alone_tell_a_task(rest: str) -> None:
    verdict = JUDGE.verdict(QUESTION, QUESTION, rest)
    assert (verdict.same, verdict.part) == (False, "task") and verdict.task


@pytest.mark.parametrize(
    "rest", [f"Good morning! {PLACE}", f"{PLACE} Thanks a lot.", f"Hallo zusammen,\n{PLACE}", f" ... {PLACE}"]
)
def test_words_alone_tell_a_frame(rest: str) -> None:
    assert JUDGE.verdict(QUESTION, QUESTION, rest).part == "same words"


def test_words_and_activations_count_together() -> None:
    words = TaskWords(*_table())
    for rest in (f"Translate into French: {PLACE}", f"Good morning! {PLACE}"):
        nats = words.nats(rest)
        assert (nats >= WORDED) is (rest[0] == "T")
        assert JUDGE.verdict(QUESTION, QUESTION, rest, speaks=TASK - nats - 0.01).same
        assert JUDGE.verdict(QUESTION, QUESTION, rest, speaks=TASK - nats + 0.01).part == "task"
    assert JUDGE.verdict(QUESTION, QUESTION, f" ... {PLACE}", speaks=99.0).same  # no word stands there


@pytest.mark.parametrize(
    "rest", [f"{PLACE} And what is the boiling point of water?", f"How many strings does a violin have? {PLACE}"]
)
def test_another_question_beside_it_is_no_task(rest: str) -> None:
    assert JUDGE.verdict(QUESTION, QUESTION, rest).same
    assert JUDGE.verdict(QUESTION, QUESTION, rest, speaks=3.0).same


@pytest.mark.parametrize(
    "rest", [f"How many letters are there? {PLACE}", f"Which language is that? {PLACE}", f"How do you say {PLACE}?"]
)
def test_a_question_about_the_text_beside_it_is_one(rest: str) -> None:
    assert not JUDGE.verdict(QUESTION, QUESTION, rest, speaks=1.5).same


def test_the_clause_that_most_speaks_for_a_task_is_named() -> None:
    verdict = JUDGE.verdict(QUESTION, QUESTION, f"Good morning. Translate this into German: {PLACE} Thank you!")
    assert verdict.task == "translate this into german"


def test_case_figures_and_spaces_do_not_count_but_the_place_does() -> None:
    rows = rows_of(f"Give me 12 words: {PLACE}")
    assert rows.dtype == np.int64 and rows.min() >= 0 and rows.max() < ROWS and len(np.unique(rows)) == len(rows)
    assert np.array_equal(rows, rows_of(f"GIVE  me\u00a0345 words:\t{PLACE}"))
    assert not np.array_equal(rows, rows_of(f"{PLACE} Give me 12 words:"))
    assert np.array_equal(rows_of("ｓａｙ"), rows_of("say"))


@pytest.mark.parametrize("text", ["", " \t ", "\ud800", "e\u0301" * 3000, "7" * 4000, "\n" * 4000])
def test_any_text_has_nats(text: str) -> None:
    assert np.isfinite(TaskWords(*_table()).nats(text))


def test_a_table_is_summed_over_the_rows_of_a_text() -> None:
    table = np.zeros(ROWS, np.int8)
    rows = rows_of("say it")
    assert TaskWords(table, 0.5, -1.0).nats("say it") == -1.0
    table[rows] = -128
    table[rows[0]] = 127
    expected = -1.0 + 0.5 * (127 - 128 * (len(rows) - 1)) / len(rows) ** 0.5
    assert TaskWords(table, 0.5, -1.0).nats("say it") == pytest.approx(expected)


def test_words_are_learnt_and_measured_on_messages_held_back() -> None:
    def message(number: int, task: bool) -> Framed:
        verb = ("count", "rate", "spell")[number % 3] if task else ("tell", "answer", "say")[number % 3]
        text = f"friend {number * 7919}, please {verb} this: {QUESTION}"
        return Framed(text, QUESTION, task, text.replace(QUESTION, "{question}") + str(number))

    messages = [message(number, task) for number in range(60) for task in (True, False)]
    learnt = learn_words(messages)
    assert 0 < held_back(messages).sum() < len(messages) // 2
    assert learnt.caught > 0.7 and learnt.lost < 0.1  # a hundred messages, half of them with more around them
    words = TaskWords(learnt.table, learnt.step, learnt.bias)
    assert words.nats(f"please spell this: {PLACE}") > 1 > -1 > words.nats(f"please answer this: {PLACE}")
    assert "say" in messages[5].text and np.array_equal(learnt.table, learn_words(messages).table)


def test_tasks_can_be_learnt_again_without_the_words_of_questions() -> None:
    tensors = load((files("memoir_retrieval") / "data" / TABLE).read_bytes())
    table = np.arange(ROWS, dtype=np.int64).astype(np.int8)
    judge = Judge.of_bytes(save(with_tasks(tensors, LearntWords(table, 0.25, -3.0, 1.0, 0.0))))
    assert np.array_equal(judge.vectors, JUDGE.vectors) and judge.row == JUDGE.row
    assert (judge.weights.task, judge.weights.task_step, judge.weights.bias) == (-3.0, 0.25, JUDGE.weights.bias)


def test_more_messages_leave_the_others_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {message.sentence: message for message in framed()}
    real = json.loads

    def with_two_more(text: str) -> dict[str, list[str]]:
        data = real(text)
        if "forms" in data:
            data["tasks"] = ["Number one: {question}", *data["tasks"]]
            data["forms"] = ["Number two: {question}", *data["forms"]]
        return data

    monkeypatch.setattr(module.json, "loads", with_two_more)
    after = {message.sentence: message for message in framed()}
    assert set(after) - set(before) == {"Number one: {question}", "Number two: {question}"}
    assert all(after[sentence] == message for sentence, message in before.items())


def _table() -> tuple[np.ndarray, float, float]:
    tensors = load((files("memoir_retrieval") / "data" / TABLE).read_bytes())
    return tensors["tasks"], JUDGE.weights.task_step, JUDGE.weights.task
