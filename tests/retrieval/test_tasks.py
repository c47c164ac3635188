"""What stands around a question, by its activations: a task, or a frame in which an answer is wanted."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from memoir_retrieval.edits.judge import AGREED, TASK, shipped_judge
from memoir_retrieval.errors import StoreError
from memoir_retrieval.evaluation.train_tasks import fit, framed
from memoir_retrieval.model.base import load_model
from memoir_retrieval.model.forward import candidate_means, span_sum
from memoir_retrieval.question.candidates import Pieces, find_candidates
from memoir_retrieval.question.prompts import prompt_ids
from memoir_retrieval.question.span import Span, derive_span_rule
from memoir_retrieval.question.tasks import TaskProbe, Tasks, around, probe_of, read_tasks, shipped_tasks

D = 24


def pooled(rows: torch.Tensor, spans: list[Span]) -> tuple[torch.Tensor, torch.Tensor]:
    totals, weights = zip(*(span_sum(rows, span) for span in spans), strict=True)
    return torch.stack(totals) / torch.stack(weights)[:, None], torch.stack(weights)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_score_of_a_part_is_that_of_what_stands_around_it(weighted: bool) -> None:
    rows = torch.randn(9, D, generator=torch.Generator().manual_seed(3))
    spans = [Span(0, 9, weighted), Span(2, 5, weighted), Span(0, 9, weighted), Span(0, 4, weighted)]
    means, weights = pooled(rows, spans)
    counts = [2, 1, 1]
    direction = np.linspace(-1, 1, D).astype("<f4")
    scores = TaskProbe(Tasks(weights=direction.tobytes(), bias=0.5)).scores(means, weights, counts)
    rest = torch.cat([rows[:2], rows[5:]])
    ((mean,), _) = pooled(rest, [Span(0, 6, weighted)])
    assert scores[1] == pytest.approx(float(mean @ torch.from_numpy(direction)) + 0.5, abs=1e-4)
    assert np.isneginf(scores[[0, 2, 3]]).all()
    assert torch.allclose(around(means, weights, counts)[1], mean, atol=1e-5)
    assert not around(means, weights, counts)[0].any()


def test_the_activations_decide_alone_where_they_are_sure_and_else_with_the_words() -> None:
    judge = shipped_judge()
    question, rest = "Who runs Acme?", "Translate into French:"
    assert judge.verdict(question, question, rest).part == "task"
    assert judge.verdict(question, question, rest, speaks=AGREED - 0.1).same
    assert judge.verdict(question, question, rest, speaks=AGREED).part == "task"
    assert judge.verdict(question, question, "Good morning. Hand it over.", speaks=TASK - 0.1).same
    verdict = judge.verdict(question, question, "Good morning. Hand it over.", speaks=TASK)
    assert (verdict.same, verdict.part) == (False, "task") and verdict.task in ("good morning", "hand it over")
    assert judge.verdict(question, question, " ... ", speaks=9.0).same  # no word stands there


@pytest.mark.parametrize("data", [b"", b"[]", b'{"a": {"weights": "AAA=", "bias": 0}}', b'{"a": {"bias": 0}}'])
def test_a_damaged_file_of_directions_is_refused(data: bytes) -> None:
    with pytest.raises(StoreError, match=r"tasks.json is damaged .*: install memoir-retrieval again"):
        read_tasks(data)


def test_what_is_learnt_tells_apart_what_a_direction_can() -> None:
    rows = torch.randn(200, D, generator=torch.Generator().manual_seed(0))
    labels = rows[:, 3] - rows[:, 8] > 0.2
    weights, bias = fit(rows, labels)
    assert (((rows @ weights + bias) > 0) == labels).float().mean() > 0.97


def test_messages_to_learn_from_hold_their_question() -> None:
    messages = list(framed())
    assert all(message.question in message.text for message in messages)
    assert messages == list(framed()) != list(framed(seed=1))
    tasks = {message.sentence for message in messages if message.task}
    assert not tasks & {message.sentence for message in messages if not message.task}


def test_the_embedded_models_layer_has_a_probe_that_knows_tasks_it_was_not_shown() -> None:
    base = load_model("smollm2-135m")
    probe = probe_of(base.identity.layer)
    assert probe is not None and probe_of("no such layer") is None
    assert all(len(msgspec.to_builtins(tasks)["weights"]) for tasks in shipped_tasks().values())
    question = "Where did Ann Lee grow up?"
    frames = [f"Morning all! {question} Ta", f"My uncle and I could not settle this one.\n{question}"]
    tasks = [
        f"Swap the words of this into Norwegian.\n{question}",
        f"How many commas are in the line below?\n{question}",
    ]
    assert not {message.text for message in framed()} & {*frames, *tasks}
    rule = msgspec.structs.replace(derive_span_rule(base.tokenizer), candidates=True)
    rows = [prompt_ids(base.tokenizer, text, chat=True) for text in (*frames, *tasks)]
    spans = []
    for ids in rows:
        whole, *parts = [part.span for part in find_candidates(ids, rule, Pieces(base.tokenizer.decode))]
        asked = [p for p in parts if base.tokenizer.decode(ids[p.start : p.end]).strip() == question]
        spans.append([whole, asked[0]])
    means, weights = candidate_means([base], rows, spans)[0]
    scores = probe.scores(means, weights, [2] * 4)[1::2]
    assert (scores[:2] < TASK).all() and (scores[2:] >= TASK).all()
