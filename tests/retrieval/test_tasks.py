"""What stands around a question, by its activations: a task, or a frame in which an answer is wanted."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save

import memoir_retrieval.store.write
from memoir_retrieval import Edit, Editor, EditStore, Retriever
from memoir_retrieval.cli import cli
from memoir_retrieval.errors import ConfigError, StoreError
from memoir_retrieval.evaluation import train_tasks
from memoir_retrieval.evaluation.calibration import with_this_judge, write_tau
from memoir_retrieval.evaluation.train_tasks import UNITS, fit, framed, scaled, scored
from memoir_retrieval.model.base import BaseModel, load_model
from memoir_retrieval.model.forward import candidate_means, span_sum
from memoir_retrieval.question.candidates import Pieces, find_candidates
from memoir_retrieval.question.prompts import prompt_ids
from memoir_retrieval.question.span import Span, derive_span_rule
from memoir_retrieval.question.tasks import (
    Pooled,
    TaskProbe,
    around,
    pooled_spans,
    read_tasks,
    shipped_tasks,
    with_leads,
)
from memoir_retrieval.store.remove import remove_edits
from memoir_retrieval.store.settings import Training

D = 24
QUICK = Training(max_steps=3)


def pooled(rows: torch.Tensor, spans: list[Span]) -> Pooled:
    totals, weights = zip(*(span_sum(rows, span) for span in spans), strict=True)
    return Pooled(torch.stack(totals) / torch.stack(weights)[:, None], torch.stack(weights))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_score_of_a_part_is_that_of_what_stands_around_it(weighted: bool) -> None:
    rows = torch.randn(12, D, generator=torch.Generator().manual_seed(3))
    whole, part = Span(0, 9, weighted, "last", 3), Span(2, 5, weighted, "last", 3)
    messages = [[whole, part], [whole], [part._replace(behind=0)], [whole._replace(behind=0), part]]
    counts = [len(spans) for spans in messages]
    every = [span for spans in messages for span in pooled_spans(spans)]
    assert every == [whole, part, whole.lead, *(span for spans in messages[1:] for span in spans)]
    parts = with_leads(pooled(rows, every), messages)
    (lead,) = pooled(rows, [Span(9, 12, weighted)]).means
    assert parts.leads is not None and torch.equal(parts.leads[0], lead) and not parts.leads[1:].any()
    units = torch.randn(5, 2 * D + 2, generator=torch.Generator().manual_seed(4))
    scores = TaskProbe(units.numpy()).scores(parts, counts)
    (mean,) = pooled(torch.cat([rows[:2], rows[5:9]]), [Span(0, 6, weighted)]).means
    both = [value.sign() * value.abs().sqrt() / value.abs().sum().sqrt() for value in (mean, lead)]
    around_it = units[:, :D] @ both[0] + units[:, -2]
    expected = [float(s.relu() @ units[:, -1]) for s in (around_it + units[:, D:-2] @ both[1], around_it)]
    assert scores[[1, 5]] == pytest.approx(expected, abs=1e-4)
    assert np.isneginf(scores[[0, 2, 3, 4]]).all()
    assert torch.allclose(around(parts, counts)[1], mean, atol=1e-5) and not around(parts, counts)[0].any()
    alone = parts.taken([4, 5], [3])
    assert TaskProbe(units.numpy()).scores(alone, [2])[1] == scores[5]
    assert parts.taken(range(6), range(4)) is parts


def test_messages_without_a_lead_are_pooled_as_they_are() -> None:
    rows, spans = torch.randn(6, D), [[Span(0, 6)], [Span(0, 4), Span(1, 3)]]
    parts = pooled(rows, [span for message in spans for span in message])
    assert with_leads(parts, spans) is parts and parts.leads is None
    tasks = np.ones((2, 2 * D + 2), np.float32)
    assert np.isfinite(TaskProbe(tasks).scores(parts, [1, 2])).tolist() == [False, False, True]


def test_messages_are_sound_where_parts_and_lead_are_finite() -> None:
    means, leads = torch.randn(5, D), torch.randn(3, D)
    parts, counts = Pooled(means, torch.ones(5), leads), [2, 1, 2]
    assert parts.sound(counts) == ([0, 1, 2], [0, 1, 2, 3, 4])
    means[1, 3] = torch.inf
    assert parts.sound(counts) == parts._replace(leads=None).sound(counts) == ([1, 2], [2, 3, 4])
    leads[2, 0] = torch.nan
    assert parts.sound(counts) == ([1], [2])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        save({"a": np.ones(6, np.float16)}),
        save({"a": np.ones((2, 5), np.float16)}),
        save({"a": np.full((2, 6), np.nan, np.float16)}),
        save({"a": np.ones((2, 6), np.float16)})[:-1],
    ],
)
def test_a_damaged_file_of_networks_is_refused(data: bytes) -> None:
    with pytest.raises(StoreError, match=r"tasks.safetensors is damaged .*: install memoir-retrieval again"):
        read_tasks(data)


def test_what_is_learnt_tells_apart_what_no_direction_can() -> None:
    far = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    rows = far[:, None] * torch.linspace(-1, 1, D) + 0.1 * torch.randn(
        4000, D, generator=torch.Generator().manual_seed(1)
    )
    labels = far.abs() > 0.7
    units = fit(rows[:3000], labels[:3000])
    assert units.shape == (UNITS + 1, D + 2)
    same = torch.cat([rows[:3000], torch.zeros(3000, 1)], dim=1)
    assert not fit(same, labels[:3000])[:, D].any()  # what is the same in all says nothing
    scores = scored(units, rows[3000:])
    assert ((scores > 0) == labels[3000:]).float().mean() > 0.85
    scale, shift = scaled(3 * scores + 1, labels[3000:])
    again, rest = scaled(scores, labels[3000:])
    assert (3 * scale, shift + scale) == pytest.approx((again, rest), abs=1e-2)


def test_messages_to_learn_from_hold_their_question() -> None:
    messages = list(framed())
    assert all(message.question in message.text for message in messages)
    assert messages == list(framed()) != list(framed(seed=1))
    tasks = {message.sentence for message in messages if message.task}
    assert not tasks & {message.sentence for message in messages if not message.task}


def test_the_embedded_models_layer_has_a_probe_that_knows_tasks_it_was_not_shown() -> None:
    base = load_model("smollm2-135m")
    tasks = shipped_tasks(base.identity.layer)
    assert tasks.shape == (UNITS + 1, 2 * base.d + 2) and not len(shipped_tasks("no such layer"))
    probe = TaskProbe(tasks)
    question = "Where did Ann Lee grow up?"
    frames = [f"Morning all! {question} Ta", f"My uncle and I could not settle this one.\n{question}"]
    wanted = [
        f"Swap the words of this into Norwegian.\n{question}",
        f"How many commas are in the line below?\n{question}",
    ]
    assert not {message.text for message in framed()} & {*frames, *wanted}
    rule = msgspec.structs.replace(derive_span_rule(base.tokenizer), candidates=True)
    rows = [prompt_ids(base.tokenizer, text, chat=True) for text in (*frames, *wanted)]
    spans = []
    for ids in rows:
        whole, *parts = [part.span for part in find_candidates(ids, rule, Pieces(base.tokenizer.decode))]
        asked = [p for p in parts if base.tokenizer.decode(ids[p.start : p.end]).strip() == question]
        spans.append([whole, asked[0]])
    parts = with_leads(candidate_means([base], rows, [pooled_spans(message) for message in spans])[0], spans)
    scores = probe.scores(parts, [2] * 4)[1::2]
    assert (scores[:2] < 0).all() and (scores[2:] > 0).all()


@pytest.fixture(scope="module")
def base(tiny: Path) -> BaseModel:
    """A model that no network comes with."""
    return load_model(tiny)


@pytest.fixture(scope="module")
def template(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat store of two edits; tests take a copy."""
    folder = tmp_path_factory.mktemp("made") / "store"
    with Editor(base, folder, training=QUICK) as editor:
        editor.add([Edit(prompt="Who runs Acme?", target="Jo"), Edit(prompt="Where is Rome?", target="Up")])
    return folder


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "store"))


def test_a_store_keeps_the_network_that_was_learnt_through_every_kind_of_write(store: Path, base: BaseModel) -> None:
    opened = EditStore.open(store)
    assert not len(opened.tasks) and opened.manifest.span.candidates
    tasks = np.linspace(-1, 1, 6 * opened.manifest.d + 6).astype(np.float32).reshape(3, -1)
    write_tau(replace(opened, tasks=tasks), opened.manifest.tau)
    with Editor(base, store) as editor:
        editor.add([Edit(prompt="When was the Acme fire?", target="In May")])
    assert np.array_equal(EditStore.open(store).tasks, tasks)
    remove_edits(store, [0])
    now = EditStore.open(store)
    assert np.array_equal(now.tasks, tasks) and [edit.id for edit in now.edits] == [1, 2]
    with Editor(base, store) as editor:
        editor.compact()
    assert np.array_equal(EditStore.open(store).tasks, tasks)


def test_a_network_that_cannot_be_is_refused(store: Path) -> None:
    opened = EditStore.open(store)
    network = np.ones((3, 2 * opened.manifest.d + 2), np.float32)
    with pytest.raises(StoreError, match="`task_units` would hold NaN"):
        write_tau(replace(opened, tasks=network * np.float32(np.nan)), 0.5)
    assert EditStore.open(store).manifest == opened.manifest
    write_tau(replace(opened, tasks=network[:, 2:]), 0.5)
    with pytest.raises(StoreError, match=r"'task_units' is float32 \[3, 128\], not"):
        EditStore.open(store)


def test_what_an_earlier_judge_knew_tasks_by_is_left_behind(
    store: Path, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = EditStore.open(store)
    chunks = memoir_retrieval.store.write.tensor_chunks

    def with_direction(tensors: dict[str, np.ndarray], *rows: Any) -> Any:
        more = {"tasks": np.ones(opened.manifest.d + 1, np.float32)} if "memory" in tensors else {}
        return chunks({**tensors, **more}, *rows)

    monkeypatch.setattr(memoir_retrieval.store.write, "tensor_chunks", with_direction)
    write_tau(opened, 0.5)
    earlier = EditStore.open(store)
    with safe_open(store / earlier.manifest.memory.name, "np") as file:
        assert "tasks" in list(file.keys())
    assert not len(earlier.tasks) and not len(with_this_judge(earlier).tasks)
    assert Retriever(earlier, base).lookup("Who runs Acme?") is not None  # words alone tell tasks


@pytest.mark.parametrize("overflows", ["means", "leads"])
def test_a_message_on_which_the_model_overflows_gets_no_edit(
    store: Path, base: BaseModel, overflows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever = Retriever(EditStore.open(store), base)
    texts = ["Hello. Who runs Acme?", "Who runs Acme?", "Where is Rome? Thanks."]
    rows = [prompt_ids(base.tokenizer, text, chat=True) for text in texts]
    spans = [retriever.spans(ids) for ids in rows]
    parts = with_leads(candidate_means([base], rows, [pooled_spans(message) for message in spans])[0], spans)
    questions = [ids[span.start : span.end] for ids, message in zip(rows, spans, strict=True) for span in message]
    counts = [len(message) for message in spans]
    assert retriever.route(parts, questions, counts).ids.tolist() == [0, 0, 1]
    getattr(parts, overflows)[0, 0] = torch.nan
    hits = retriever.route(parts, questions, counts)
    assert (hits.ids.tolist(), hits.rows[0], hits.overlaps[0]) == ([-1, 0, 1], -1, 0)
    assert (retriever.route(parts._replace(means=parts.means * torch.nan), questions, counts).rows < 0).all()
    assert retriever.lookup(texts[0]) is not None and retriever.parts(texts[0])
    pooled_as_is = retriever._pooled

    def overflowing(*rows_and_spans: Any) -> Pooled:
        of = pooled_as_is(*rows_and_spans)
        getattr(of, overflows)[0, 0] = torch.nan
        return of

    monkeypatch.setattr(retriever, "_pooled", overflowing)
    assert retriever.lookup(texts[0]) is None and not retriever.parts(texts[0])


def test_calibrate_learns_the_network_of_a_models_layer_and_a_lookup_goes_by_it(
    store: Path,
    base: BaseModel,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train_tasks, "framed", lambda: islice(framed(), 0, None, 10))
    with caplog.at_level(logging.INFO):
        Retriever(EditStore.open(store), base)
    assert f"`memoir calibrate {store} --tasks --write`" in caplog.text
    rephrasings = store.parent / "edits.jsonl"
    rephrasings.write_text('{"prompt": "Where is Rome?", "target": "Up", "rephrases": ["Rome is where?"]}\n')
    cli.main(["calibrate", str(store), str(rephrasings), "--tasks", "--write"], standalone_mode=False)
    err = " ".join(capsys.readouterr().err.split())
    assert re.search(r"learnt from \d+ messages; of messages held back it takes \d+% of those with a task", err)
    opened = EditStore.open(store)
    assert opened.tasks.shape == (UNITS + 1, 2 * opened.manifest.d + 2) and opened.tasks.any()
    message = "My neighbour flew home from her holidays yesterday. Where is Rome?"
    for nats, found in ((9.0, False), (-9.0, True)):
        tasks = np.append(np.zeros(2 * opened.manifest.d), [1, nats]).astype(np.float32)[None]
        parts = Retriever(replace(opened, tasks=tasks), base).parts(message)
        assert any(part.match == 1 for part in parts) == found


def test_a_store_that_looks_for_no_question_within_a_message_learns_none(base: BaseModel, tmp_path: Path) -> None:
    edit = Edit(prompt="Who runs Acme?", target="Jo", rephrases=("Acme is run by whom?",))
    with Editor(base, tmp_path / "raw", chat=False, training=QUICK) as editor:
        editor.add([edit])
    with pytest.raises(ConfigError, match="--tasks needs a store that looks up parts of a message"):
        cli.main(["calibrate", str(tmp_path / "raw"), "--tasks"], standalone_mode=False)
