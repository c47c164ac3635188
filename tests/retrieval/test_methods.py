"""Every compared editing method edits, leaves the model as it was, and solves the equations of its paper."""

from __future__ import annotations

import json
import sys
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from small_models import save_llama, save_tokenizer
from test_cli import run
from torch.nn import functional
from towers import LAYOUTS, save

from memoir_retrieval.edits.record import Edit, Probe
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.evaluation.methods import LOCATED, METHODS, check_methods, open_method
from memoir_retrieval.evaluation.methods.alphaedit import null_space
from memoir_retrieval.evaluation.methods.grace import Grace
from memoir_retrieval.evaluation.methods.located import (
    LocatedMethod,
    ValueSearch,
    corpus,
    drift,
    second_moments,
    subject_end,
    texts_needed,
)
from memoir_retrieval.evaluation.methods.memit import Memit, least_squares
from memoir_retrieval.evaluation.methods.method import Method, PrefixedMethod, Unedited, scaled
from memoir_retrieval.evaluation.methods.rome import Rome, rank_one
from memoir_retrieval.evaluation.methods.rows import Rows
from memoir_retrieval.evaluation.methods.ultraedit import RunningMoments, UltraEdit, ridge
from memoir_retrieval.evaluation.methods.wise import Wise, margin
from memoir_retrieval.evaluation.methods_run import DIVERGED, MOST, MethodScores, run_method, unedited_answers
from memoir_retrieval.evaluation.published_loop import train_published
from memoir_retrieval.model.base import BaseModel, load_model
from memoir_retrieval.model.embedded import get_model
from memoir_retrieval.model.places import Place

EDIT = Edit(
    prompt="The founder of Exampleton",
    target="Ada",
    subject="Exampleton",
    rephrases=("Exampleton was founded by whom?",),
    locality=(Probe(prompt="Where is the sea?", answer="South"),),
)
OTHER = Edit(prompt="Which river runs through Portaal?", target="Elbe", subject="Portaal")
TEXTS = ["The sea lies south of the town, and the river runs through it.", "A house was built near the old bridge."]
CORPUS = TEXTS * 12
"""No fewer tokens than the model's D."""

SEARCH = ValueSearch(rate=0.5, steps=40, clamp=1000.0, decay=0.0)
STRONGER = {
    "lora": {"lora.STEPS": 40},
    "grace": {},
    "wise": {"wise.STEPS": 30},
    "published": {"published.STEPS": 30},
    "memoir": {},
    "ft": {"ft.RATE": 1e-2},
    "defer": {},
    "rome": {"rome.Rome.search": SEARCH},
    "memit": {"memit.Memit.search": SEARCH},
    "alphaedit": {"alphaedit.AlphaEdit.search": SEARCH, "alphaedit.L2": 1e-3},
}
"""Methods that get one answer right, and what of them is stronger here, or shorter: published rates are for trained
models, which know how an answer is said. The others take more than one edit (ultraedit) or a model that can read."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Smaller logits and larger weights than the other small models: what one layer adds must reach the answer."""
    folder, tokenizer = tmp_path_factory.mktemp("methods"), tmp_path_factory.mktemp("tokenizer")
    texts = [*TEXTS, *(f"{edit.prompt} {edit.target}" for edit in (EDIT, OTHER)), *EDIT.rephrases]
    vocabulary = save_tokenizer(tokenizer, texts, get_model("smollm2-135m"))
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}
    model = save_llama(folder, tokenizer, scale=10, vocabulary=vocabulary, **shape)
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.data *= 5
    model.save_pretrained(folder)
    return load_model(str(folder), layer=1)


def weights(base: BaseModel) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in base.model.named_parameters()}


def accuracy(method: Method, edit: Edit) -> float:
    target = method.answer_ids(edit)
    (choices,) = method.choices([method.ids(edit.prompt)], [target])
    return sum(a == b for a, b in zip(choices, target, strict=True)) / len(target)


@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_edits_and_leaves_the_model_as_it_was(
    base: BaseModel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "lora":
        pytest.importorskip("peft", reason="needs the extra `methods`")
    for setting, value in STRONGER.get(name, {}).items():
        monkeypatch.setattr(f"memoir_retrieval.evaluation.methods.{setting}", value)
    before, unedited = weights(base), Unedited(base, end=False)
    assert accuracy(unedited, EDIT) == 0.0
    method = open_method(name, base, texts=CORPUS, end=False)
    method.edit([EDIT])
    if name in STRONGER:
        assert accuracy(method, EDIT) == 1.0
        assert method.bytes > 0
    assert json.dumps(method.settings)
    assert method.choices([], []) == method.likely_answers([], [], 8) == []  # of edits without unrelated questions
    method.close()
    after = weights(base)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(weight.requires_grad for weight in base.model.parameters())
    assert not base.projection._forward_hooks and not base.projection._forward_pre_hooks
    assert accuracy(unedited, EDIT) == 0.0


def test_the_rate_of_lora_is_that_of_its_form(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps of AdaLoRA are small at the published rate; those of plain LoRA change other texts by .1 nats."""
    pytest.importorskip("peft", reason="needs the extra `methods`")
    monkeypatch.setattr("memoir_retrieval.evaluation.methods.lora.STEPS", 5)
    method = open_method("lora", base, end=False)
    texts = [method.ids(text) for text in TEXTS]
    before = method.loss(texts)
    method.edit([EDIT])
    assert method.loss(texts) != before and abs(method.loss(texts) - before) < 0.02
    method.close()


def test_ultraedit_makes_its_answers_likelier(base: BaseModel) -> None:
    method = open_method("ultraedit", base)
    rows = [(method.ids(edit.prompt), method.answer_ids(edit)) for edit in (EDIT, OTHER)]
    before = [float(whole_loss(base, *row)) for row in rows]
    method.edit([EDIT, OTHER])
    assert all(float(whole_loss(base, *row)) < loss for row, loss in zip(rows, before, strict=True))
    method.close()


def test_the_layers_of_ultraedit_share_what_they_are_normalised_by(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memoir_retrieval.evaluation.methods.ultraedit.LAYERS", (10, 30))
    method = UltraEdit(base)
    assert [at.layer for at in method.layers] == [1, 2]
    rows = torch.stack([torch.cat(parts) for parts in zip(*(method._features(e) for e in (EDIT, OTHER)), strict=True)])
    (moments,) = method.moments.values()
    normalised, steps = moments.normalised, list[torch.Tensor]()
    monkeypatch.setattr(moments, "normalised", lambda rows: steps.append(normalised(rows)) or steps[-1])
    method.edit([EDIT, OTHER])
    everything = rows.flatten(0, 1)
    expected = (rows - everything.mean(0)) / (everything.std(0) + torch.finfo(torch.float32).eps)
    torch.testing.assert_close(torch.stack(steps), expected, atol=1e-4, rtol=1e-4)
    method.close()


def whole_loss(base: BaseModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Mean cross-entropy of an answer, with every block run."""
    logits = base.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return functional.cross_entropy(logits, torch.tensor(answer))


def test_the_loss_from_a_block_on_is_that_of_the_whole_model(base: BaseModel) -> None:
    prompts, answers = [[5, 6, 7, 8], [9, 10]], [[11, 12], [13]]
    parts = Rows(base, prompts, answers)
    alone = [whole_loss(base, *row) * len(row[1]) for row in zip(prompts, answers, strict=True)]
    torch.testing.assert_close(parts.loss(), sum(alone) / 3)
    logits = base.model(input_ids=torch.tensor([[9, 10, 13]])).logits[0, 1]
    torch.testing.assert_close(parts.logits()[2], logits)


def test_answers_in_batches_are_those_asked_alone(base: BaseModel) -> None:
    method = Unedited(base)
    prompts = [method.ids(text) for text in ("Who founded it?", "Who founded Exampleton?", "Where is the sea?")]
    assert method.answers(prompts, 6) == [method.answers([prompt], 6)[0] for prompt in prompts]
    out = base.model.generate(torch.tensor(prompts[:1]), max_new_tokens=6, do_sample=False)[0, len(prompts[0]) :]
    text = base.tokenizer.decode(out, skip_special_tokens=True)
    assert method.answers(prompts[:1], 6) == [(text.strip().splitlines() or [""])[0].strip()]


def test_rome_gives_the_key_its_value_and_leaves_other_directions() -> None:
    torch.manual_seed(0)
    weight, key, value = torch.randn(4, 6), torch.randn(6), torch.randn(4)
    root = torch.randn(6, 6)
    c = root @ root.T + torch.eye(6)
    change = rank_one(key, value - weight @ key, torch.linalg.solve(c, key))
    torch.testing.assert_close((weight + change) @ key, value)
    assert torch.linalg.matrix_rank(change) == 1
    other = torch.randn(6)
    other -= (other @ torch.linalg.solve(c, key)) / (key @ torch.linalg.solve(c, key)) * key
    torch.testing.assert_close(change @ other, torch.zeros(4), atol=1e-5, rtol=0)


def test_rome_gives_the_bare_prompt_its_value(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    method = open_method("rome", base, texts=CORPUS, end=False)
    assert isinstance(method, Rome)
    (layer,) = method.layers
    first, change = method.value_change(EDIT, block_output=False)
    monkeypatch.setattr(Rome, "value_change", lambda *_, **__: (first, change))
    key = method.keys(EDIT, layer)[0]
    torch.testing.assert_close(method.weight(base.at(layer)) @ key, first)
    method.edit([EDIT])
    torch.testing.assert_close(method.weight(base.at(layer)) @ key, first + change)
    assert change.norm() > 0.1 and not torch.equal(key, method.keys(EDIT, layer).mean(0))
    method.close()


def test_the_drift_of_a_value_is_measured_under_the_edited_model() -> None:
    before, odds = torch.log_softmax(torch.tensor([[0.0, 1.0, 5.0], [3.0, 1.0, 0.0]]), dim=-1)
    expected = (odds.exp() * (odds - before)).sum()
    odds.requires_grad_()
    torch.testing.assert_close(drift(before, odds), expected)
    assert abs(expected - (before.exp() * (before - odds)).sum()) > 0.1, "the other direction is another number"
    drift(before, odds).backward()
    assert odds.grad is not None and odds.grad.abs().max() > 0.1


def test_statistics_are_of_so_many_tokens_as_the_settings_say(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    method = open_method("memit", base, texts=CORPUS)
    assert method.settings["corpus_tokens"] == sum(len(method.ids(text)) for text in CORPUS) >= base.d
    method.close()
    for tokens, each, enough in ((base.d, 1, base.d), (1, 2, 2 * base.d), (2 * base.d, 1, 2 * base.d)):
        monkeypatch.setattr("memoir_retrieval.evaluation.methods.located.CORPUS_TOKENS", tokens)
        monkeypatch.setattr("memoir_retrieval.evaluation.methods.located.TOKENS_EACH", each)
        rows = corpus(base, CORPUS * 9)
        assert len(rows) % 8 == 0 and sum(map(len, rows[:-8])) < enough <= sum(map(len, rows))
    with pytest.raises(ConfigError, match=rf"need {base.d} tokens of text or more, and there are \d\d: give more text"):
        open_method("memit", base, texts=TEXTS)


def test_a_wide_model_gets_statistics(base: BaseModel) -> None:
    """Of ten tokens for each input: 16,384 in all were fewer than the inputs of a model of this width."""
    wide = replace(base, projection=torch.nn.Linear(20_000, 1))
    words = [f"{TEXTS[0]} {TEXTS[1]} " * 2] * texts_needed(wide)
    assert min(len(text.split()) for text in words) >= 40 and texts_needed(wide) == 5000
    assert sum(map(len, corpus(wide, words))) >= 200_000
    assert texts_needed(base) == 400


def test_too_little_text_is_refused_before_any_method_is_run(
    base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memoir_retrieval.background.background_prompts", lambda: TEXTS)
    (tmp_path / "edits.jsonl").write_text(json.dumps({"prompt": EDIT.prompt, "target": EDIT.target}) + "\n")
    code, _, error = run(capsys, "bench", "methods", tmp_path / "edits.jsonl", "--model", base.name, "--edits", "1",
                         "--data", tmp_path, "--out", tmp_path / "run")  # fmt: skip
    assert code == 2 and f"need {base.d} tokens of text or more" in error and "--data or MEMOIR_DATA" in error
    assert not (tmp_path / "run").exists()


def test_methods_that_cannot_be_run_are_refused_before_any_is(
    base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    (tmp_path / "edits.jsonl").write_text(json.dumps({"prompt": EDIT.prompt, "target": EDIT.target}) + "\n")
    folder = tmp_path / "run"
    command = ["bench", "methods", tmp_path / "edits.jsonl", "--model", base.name, "--edits", "1", "--out", folder]
    code, _, error = run(capsys, *command, "--method", "ft", "--method", "lora")
    assert code == 2 and "(lora: PEFT is not installed: pip install 'memoir-retrieval[methods]')" in error
    assert "leave these out (name the others with --method)" in error
    assert not folder.exists()
    with pytest.raises(ConfigError, match="PEFT"):
        open_method("lora", base)


@pytest.mark.parametrize(
    ("layout", "place", "refused"),
    [
        (
            "gpt2",
            None,
            r"\(ft, wise, rome, memit, alphaedit, ultraedit: transformer.h.1.mlp.c_proj of .* is not a plain",
        ),
        (
            "gpt2",
            "attention",
            r"\(ft, wise, rome, memit, alphaedit, ultraedit: transformer.h.1.attn.c_proj of .* is not",
        ),
        ("gemma3", None, r"\(memit, alphaedit: blocks of .* do not add what .*mlp.down_proj puts out as it is"),
    ],
)
def test_methods_are_refused_for_a_model_that_they_cannot_edit(
    tmp_path: Path, layout: str, place: Place | None, refused: str
) -> None:
    save(LAYOUTS[layout].config, tmp_path)
    names = [name for name in METHODS if name != "lora"]
    with pytest.raises(ConfigError, match=refused):
        check_methods(names, load_model(str(tmp_path), place=place))


def test_what_was_measured_before_a_method_broke_is_in_the_table(
    base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from memoir_retrieval.evaluation import methods_run

    def opened(name: str, base: BaseModel, **options: Any) -> Method:
        if name == "ft":
            raise ConfigError("no memory is left")
        return open_method(name, base, **options)

    monkeypatch.setattr(methods_run, "TOKENS", 4)
    monkeypatch.setattr(methods_run, "open_method", opened)
    (tmp_path / "edits.jsonl").write_text(json.dumps({"prompt": EDIT.prompt, "target": EDIT.target}) + "\n")
    folder = tmp_path / "run"
    code, _, error = run(capsys, "bench", "methods", tmp_path / "edits.jsonl", "--model", base.name, "--edits", "1",
                         "--controls", "1", "--out", folder, "--method", "base", "--method", "ft")  # fmt: skip
    assert code == 2 and "no memory is left" in error
    assert "| base |" in (folder / "methods.md").read_text() and "<svg" in (folder / "methods.html").read_text()


def test_memit_solves_its_normal_equations() -> None:
    torch.manual_seed(0)
    keys, values, root = torch.randn(6, 3).double(), torch.randn(4, 3).double(), torch.randn(6, 6).double()
    c = root @ root.T
    change = least_squares(c, keys, values)
    torch.testing.assert_close(change @ (c + keys @ keys.T), values @ keys.T)


@pytest.mark.parametrize("name", ["memit", "alphaedit"])
def test_the_bare_prompt_is_half_of_a_key(base: BaseModel, name: str) -> None:
    method = open_method(name, base, texts=CORPUS)
    assert isinstance(method, Memit)
    bare, *others = method.keys(EDIT, method.layers[0])
    assert len(others) == 5
    torch.testing.assert_close(method.key(EDIT, method.layers[0]), bare / 2 + sum(others) / 10)
    method.close()


def test_alphaedit_projects_the_kept_keys_to_nothing() -> None:
    torch.manual_seed(0)
    kept = torch.randn(6, 3).double()
    p = null_space(kept @ kept.T, 1e-6)
    torch.testing.assert_close(p @ kept, torch.zeros(6, 3).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(p @ p, p)
    assert round(float(p.trace())) == 3


def test_alphaedit_changes_no_output_for_kept_keys(base: BaseModel) -> None:
    method = open_method("alphaedit", base, texts=CORPUS)
    layer = method.layers[0]
    kept = torch.randn(base.d, base.d // 2, generator=torch.Generator().manual_seed(0))
    method.projections = {layer: null_space(kept @ kept.T, 1e-3)}
    change = method.solution(layer, torch.randn(base.d, 1), torch.randn(base.h, 1))
    assert change.abs().max() > 1e-4
    torch.testing.assert_close(change @ kept, torch.zeros(base.h, base.d // 2), atol=1e-4, rtol=0)
    method.close()


def test_ultraedit_solves_the_ridge_regression() -> None:
    torch.manual_seed(0)
    inputs, values = torch.randn(5, 6).double(), torch.randn(5, 4).double()
    x = ridge(inputs, values)
    torch.testing.assert_close(inputs.T @ (inputs @ x - values) + x, torch.zeros(6, 4).double())


def test_running_moments_are_those_of_all_rows() -> None:
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)) * 5 + 2
    moments = RunningMoments(3, torch.device("cpu"))
    for part in rows.split([7, 1, 12]):
        moments.update(part)
    torch.testing.assert_close(moments.normalised(rows), (rows - rows.mean(0)) / rows.std(0))


def test_second_moments_leave_padding_out(base: BaseModel) -> None:
    rows = [[5, 6, 7], [8, 9]]
    keys = torch.cat([Rows(base, [row], [[]]).activations[0] for row in rows])
    torch.testing.assert_close(second_moments([base], rows)[base.layer], keys.T @ keys / 5)


def test_the_last_token_of_a_subject(base: BaseModel) -> None:
    place = subject_end(base.tokenizer, OTHER.prompt, OTHER.subject)
    ids = base.tokenizer(OTHER.prompt).input_ids
    assert base.tokenizer.decode(ids[: place + 1]).endswith("Portaal")
    assert subject_end(base.tokenizer, OTHER.prompt, "Nobody") == len(ids) - 1


def test_grace_splits_radii_of_different_answers_and_shares_those_of_one() -> None:
    grace = object.__new__(Grace)
    grace.base = SimpleNamespace(h=2, d=2)
    grace.random = torch.Generator().manual_seed(0)
    grace.keys, grace.values, grace.radii, grace.labels = torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0), []
    assert grace._entry(torch.tensor([0.0, 0.0]), "a") == 0
    assert grace._entry(torch.tensor([1.5, 0.0]), "a") == 0 and grace.radii.tolist() == [1.5]
    assert grace._entry(torch.tensor([0.0, 1.0]), "b") == 1
    torch.testing.assert_close(grace.radii, torch.tensor([0.5, 0.5]), atol=1e-4, rtol=0)
    assert grace._entry(torch.tensor([9.0, 9.0]), "b") == 2 and grace.radii[2] == 1.0


def test_what_methods_keep_is_where_the_model_is() -> None:
    """The device `meta` stands in for a GPU: it refuses what lies on the CPU."""
    there = torch.device("meta")
    grace = Grace(SimpleNamespace(h=2, d=3, layer=0, device=there))
    moments = RunningMoments(5, there)
    moments.update(torch.zeros(4, 5, device=there))
    assert grace._entry(torch.zeros(3, device=there), "a") == 0
    kept = (grace.keys, grace.values, grace.radii, moments.mean, moments.squares)
    assert {tensor.device for tensor in kept} == {there}


def test_grace_answers_the_prompt_and_nothing_far_from_it(base: BaseModel) -> None:
    method = open_method("grace", base, texts=TEXTS)
    method.edit([EDIT])
    prompts = [method.ids(OTHER.prompt), method.ids(EDIT.prompt)]
    edited, plain = method.choices(prompts, [[1, 2]] * 2), Unedited(base).choices(prompts, [[1, 2]] * 2)
    assert edited[0] == plain[0] and edited[1] != plain[1]
    method.close()


def test_the_threshold_of_wise_is_that_of_prompts_as_requests_are_judged(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memoir_retrieval.evaluation.methods.wise.STEPS", 2)
    method = open_method("wise", base)
    assert isinstance(method, Wise)
    method.edit([EDIT])
    activations = []
    for prompt in (EDIT.prompt, *(f"{prefix} {EDIT.prompt}" for prefix in method.prefixes)):
        inputs = Rows(base, [method.ids(prompt)], [[]]).activations[0]
        side, main = (functional.silu(inputs @ weight.T) for weight in (method.side, method.main))
        activations.append((side - main).norm(dim=-1).mean())
    assert method.least == pytest.approx(float(sum(activations)) / 11, rel=1e-4)
    method.close()


def test_the_margin_of_wise() -> None:
    assert margin(torch.tensor([25.0, 30.0]), torch.tensor(1.0)) == 0
    assert margin(torch.tensor([10.0, 30.0]), torch.tensor(6.0)) == 1 + 10 + 6


def test_the_published_loop_is_that_of_the_whole_model(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from memoir_retrieval.evaluation import published_loop
    from memoir_retrieval.evaluation.methods import published

    monkeypatch.setattr("memoir_retrieval.evaluation.methods.method.half_is_faster", lambda _: False)
    monkeypatch.setattr(published_loop, "STEPS", 3)
    monkeypatch.setattr(published, "STEPS", 3)
    method = open_method("published", base, texts=TEXTS)
    method.edit([EDIT])
    rows = [method.ids(EDIT.prompt), *(method.ids(f"{prefix} {EDIT.prompt}") for prefix in method.prefixes)]
    weight = torch.zeros(base.h, base.d)
    train_published(base, weight, method.masks[0], rows, method.answer_ids(EDIT), rows[0])
    torch.testing.assert_close(method.memory, weight, atol=1e-4, rtol=1e-3)
    assert weight.abs().max() > 1e-2


def test_reading_reads_the_edit_that_matches_and_nothing_elsewhere(base: BaseModel) -> None:
    reading, retrieval = open_method("reading", base), open_method("retrieval", base)
    for method in (reading, retrieval):
        method.edit([EDIT, OTHER])
    question, far = reading.ids(EDIT.prompt), reading.ids("Please write a poem about the sea")
    for method in (reading, retrieval):
        text = base.tokenizer.decode(method.rendered([question])[0])
        assert text == f"New Fact: {EDIT.prompt} {EDIT.target}\nPrompt: {EDIT.prompt}"
    assert reading.rendered([far]) == [far]
    assert base.tokenizer.decode(retrieval.rendered([far])[0]).startswith("New Fact: ")
    for method in (reading, retrieval):
        method.close()


def test_reading_makes_the_masks_of_new_edits_only(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from memoir_retrieval.evaluation.methods import reading

    asked, means = list[int](), reading.question_means
    monkeypatch.setattr(
        reading, "question_means", lambda base, rows, spans: asked.append(len(rows)) or means(base, rows, spans)
    )
    parts, whole = open_method("reading", base), open_method("reading", base)
    parts.edit([EDIT])
    parts.edit([OTHER])
    whole.edit([EDIT, OTHER])
    assert asked == [1, 1, 2]
    prompts = [whole.ids(text) for text in (EDIT.prompt, OTHER.prompt, "Where is the sea?", *EDIT.rephrases)]
    assert parts.rendered(prompts) == whole.rendered(prompts) != prompts
    stores = [method.retriever.store for method in (parts, whole)]
    assert stores[0].manifest.tau == stores[1].manifest.tau and (stores[0].codes == stores[1].codes).all()
    for method in (parts, whole):
        method.close()


def test_the_perplexity_is_that_of_a_text_with_what_the_method_does_to_it(base: BaseModel) -> None:
    plain, far = Unedited(base), "Please write a poem about the sea"
    near = plain.ids(f"{EDIT.prompt} is")
    memoir, reading, retrieval = (open_method(name, base) for name in ("memoir", "reading", "retrieval"))
    for method in (memoir, reading, retrieval):
        method.edit([EDIT, OTHER])
    for method in (memoir, reading):
        assert method.loss([plain.ids(far)]) == plain.loss([plain.ids(far)])
    prompt = plain.ids(EDIT.prompt)
    (answer,) = memoir.model.score([prompt])
    assert answer.edit == 0 and len(answer.logprobs) == len(prompt) - 1
    assert memoir.loss([prompt]) == pytest.approx(-sum(answer.logprobs) / len(answer.logprobs), rel=1e-4)
    assert abs(memoir.loss([prompt]) - plain.loss([prompt])) > 1e-2
    for method, text in ((reading, prompt), (retrieval, prompt), (retrieval, near)):
        (row,) = method.rendered([text])
        n = len(text) - 1
        assert row[-n:] == text[1:]
        expected = float(whole_loss(base, row[:-n], row[-n:]))
        assert method.loss([text]) == pytest.approx(expected, rel=1e-4) != plain.loss([text])
    for method in (memoir, reading, retrieval):
        method.close()


def test_the_published_loop_takes_the_preset_of_the_place(base: BaseModel) -> None:
    method = open_method("published", load_model(base.name, layer=1, place="attention"))
    assert method.base.d == 64 and method.settings["k"] == 64 * 2 // 7
    method.close()


def test_layers_keep_their_part_of_the_depth(base: BaseModel) -> None:
    assert [scaled(layer, base) for layer in (0, 16, 31)] == [0, round(16 * 3 / 32), 2]


def test_edits_made_alone_do_not_meet_each_other(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memoir_retrieval.evaluation.methods.ft.RATE", 1e-2)
    monkeypatch.setattr("memoir_retrieval.evaluation.methods_run.TOKENS", 4)
    other = msgspec.structs.replace(EDIT, target="Elbe")  # of the same question, so after one another one is lost

    def scores(alone: bool) -> MethodScores:
        edits = [EDIT, other]
        answers = unedited_answers(base, edits, 1, alone=alone)
        return run_method("ft", base, edits, lambda: answers, controls=1, alone=alone)

    after, alone = scores(False), scores(True)
    assert after.reliability < 1 and alone.reliability == 1
    assert alone.edit_megabytes == pytest.approx(2 * after.edit_megabytes, rel=1e-2) and after.edit_megabytes > 0


def test_what_a_method_trains_is_not_rounded(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memoir_retrieval.evaluation.methods.method.half_is_faster", lambda _: True)
    monkeypatch.setattr("memoir_retrieval.evaluation.methods.ft.RATE", 1e-2)
    method = open_method("ft", base, end=False)
    method.edit([OTHER])
    with method.training():
        rounded = [name for name, module in base.model.named_modules() if "forward" in vars(module)]
    assert len(rounded) == sum(type(module) is torch.nn.Linear for module in base.model.modules()) - 1
    assert method.at.module not in rounded and not any("forward" in vars(m) for m in base.model.modules())
    method.edit([EDIT])
    assert accuracy(method, EDIT) == 1.0
    method.close()


@pytest.mark.parametrize("alone", [False, True])
def test_the_base_model_changes_no_answer(base: BaseModel, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memoir_retrieval.evaluation.methods_run.TOKENS", 4)
    probes = tuple(Probe(prompt=f"Where is the sea of {name}?", answer="South") for name in ("Ada", "Elbe", "Portaal"))
    edits = [EDIT, msgspec.structs.replace(OTHER, locality=probes)]
    answers = unedited_answers(base, edits, 3, alone=alone)
    assert len(answers.questions) == 3 and len(answers.probes) == 4
    scores = run_method("base", base, edits, lambda: answers, controls=3, alone=alone)
    assert (scores.changed.questions, scores.changed.controls, scores.locality) == (0.0, 0.0, 1.0)


def test_what_was_computed_of_the_unedited_model_is_kept(base: BaseModel) -> None:
    method = open_method("rome", base, texts=CORPUS, end=False)
    assert isinstance(method, Rome)
    (layer,), moments = method.layers, method.moments
    method.edit([EDIT])
    again = method.restart()
    assert again.moments[layer] is moments[layer] and again.prefixes is method.prefixes
    assert torch.equal(again.weight(base), weights(base)[f"{base.module}.weight"])
    again.close()


@pytest.mark.parametrize("name", ["published", "retrieval", "ft"])
def test_edits_made_alone_do_not_compute_anything_of_the_unedited_model_again(
    base: BaseModel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = "memoir_retrieval.evaluation.methods"
    monkeypatch.setattr(f"{methods}.method.half_is_faster", lambda _: name == "ft")
    monkeypatch.setattr(f"{methods}.published.STEPS", 2)
    method = open_method(name, base)
    method.edit([EDIT])
    again = method.restart()
    assert again.known is method.known
    if name == "ft":
        assert vars(again)["_products"] is vars(method)["_products"]
        again.edit([EDIT])
    else:
        monkeypatch.setattr(f"{methods}.published.question_means", None)
        monkeypatch.setattr(f"{methods}.reading.Retrieval._states", None)
        again = again.restart()
    again.close()


def test_methods_of_one_run_take_statistics_and_prefixes_once(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from memoir_retrieval.evaluation.methods import located, method

    layers, sampled = list[int](), list[int]()

    def moments(bases: list[BaseModel], rows: list[list[int]]) -> dict[int, torch.Tensor]:
        layers.extend(at.layer for at in bases)
        return second_moments(bases, rows)

    monkeypatch.setattr(located, "second_moments", moments)
    own_prefixes = method.own_prefixes
    monkeypatch.setattr(method, "own_prefixes", lambda base, n, seed: sampled.append(n) or own_prefixes(base, n, seed))
    known: dict[Hashable, Any] = {}
    opened = [open_method(name, base, texts=CORPUS, known=known) for name in (*LOCATED, "wise", "published")]
    assert sorted(layers) == sorted({layer for m in opened if isinstance(m, LocatedMethod) for layer in m.layers})
    assert sampled == [10] and all(
        m.prefixes == own_prefixes(base, 10, 0) for m in opened if isinstance(m, PrefixedMethod)
    )
    assert own_prefixes(base, 5, 0) == own_prefixes(base, 10, 0)[:5]
    for m in opened:
        m.close()


class Breaking(Unedited):
    """Writes no numbers into a weight."""

    name = "ft"

    def edit(self, edits: list[Edit]) -> None:
        with torch.no_grad():
            self.weight(self.base).mul_(1.0 if edits[0] is EDIT else float("nan"))


def test_a_method_that_diverges_is_reported_with_the_edit(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memoir_retrieval.evaluation import methods_run

    monkeypatch.setattr(methods_run, "TOKENS", 4)
    monkeypatch.setattr(methods_run, "open_method", lambda name, base, **options: Breaking(base, **options))
    lines: list[str] = []
    before = weights(base)

    def scored() -> MethodScores:
        answers = unedited_answers(base, [EDIT], 1)
        return run_method("ft", base, [EDIT, OTHER], lambda: answers, controls=1, folder=tmp_path, tell=lines.append)

    scores = scored()
    assert scores.diverged == 2 and scores.perplexity == MOST > DIVERGED
    assert scored() == scores, "its file is read"
    assert any("diverged at edit 2" in line for line in lines)
    assert (scores.changed.questions, scores.changed.controls) == (1.0, 1.0)
    assert all(torch.equal(weight, before[name]) for name, weight in base.model.named_parameters())


def test_the_base_models_answers_are_charged_to_no_method(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from memoir_retrieval.evaluation import methods_run

    now = [0.0]
    monkeypatch.setattr(methods_run, "TOKENS", 2)
    monkeypatch.setattr(methods_run, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: 0.0))

    def answers() -> methods_run.BaseAnswers:
        now[0] += 100
        return unedited_answers(base, [EDIT], 0)

    assert run_method("base", base, [EDIT], answers, controls=0).seconds == 0


def test_scores_are_of_one_model_and_one_corpus(base: BaseModel) -> None:
    from memoir_retrieval.evaluation.methods_run import _digest

    digests = {_digest(base, [EDIT], False, 64), _digest(base, [EDIT], False, 64, texts=TEXTS)}
    for part in ("config", "layer", "tokenizer", "adapter"):
        other = replace(base)
        vars(other)["identity"] = msgspec.structs.replace(base.identity, **{part: "other"})
        digests.add(_digest(other, [EDIT], False, 64))
    assert len(digests) == 6


def test_later_edits_are_watched_in_tens(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from memoir_retrieval.evaluation import methods_run

    class Watched(Unedited):
        done, seen = 0, list[int]()

        def edit(self, edits: list[Edit]) -> None:
            self.done += len(edits)

        def loss(self, texts: list[list[int]]) -> float:
            self.seen.append(self.done)
            return 1.0

    monkeypatch.setattr(methods_run, "ASKED", ())
    before = methods_run.BaseAnswers("", [], [], [], 1.0)
    methods_run._edit(Watched(base), [EDIT] * 25, 0, before, [], lambda _: None)
    assert Watched.seen == [*range(1, 11), 20, 25]


@pytest.mark.parametrize(
    ("batch", "batches", "asked"), [(1, [1] * 25, [1, 10]), (5, [5] * 5, [10]), (None, [1, 9, 15], [1, 10])]
)
def test_a_method_is_asked_on_the_way_where_it_has_made_the_edits(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, batch: int | None, batches: list[int], asked: list[int]
) -> None:
    from memoir_retrieval.evaluation import methods_run

    edited: list[int] = []
    monkeypatch.setattr(methods_run, "TOKENS", 2)
    monkeypatch.setattr(Unedited, "batch", batch)
    monkeypatch.setattr(Unedited, "edit", lambda _, edits: edited.append(len(edits)))
    edits, points = [EDIT] * 25, list[methods_run.CurvePoint]()
    before = unedited_answers(base, edits, 0)
    methods_run._edit(Unedited(base), edits, 0, before, points, lambda _: None)
    assert edited == batches
    assert [(point.edits, point.locality, point.perplexity) for point in points] == [(n, 1.0, 1.0) for n in asked]


def test_a_run_is_printed_kept_and_not_done_again(
    base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memoir_retrieval.evaluation.methods.ft.RATE", 1e-2)
    monkeypatch.setattr("memoir_retrieval.evaluation.methods_run.TOKENS", 4)
    file = tmp_path / "edits.jsonl"
    file.write_text(
        "".join(
            json.dumps({"prompt": edit.prompt, "target": edit.target, "rephrases": edit.rephrases}) + "\n"
            for edit in (EDIT, OTHER)
        )
    )
    folder = tmp_path / "run"
    command = ["bench", "methods", file, "--model", base.name, "--edits", "2", "--controls", "2", "--out", folder]
    command += ["--method", "base", "--method", "ft"]
    first = json.loads(run(capsys, *command, "--json")[1])
    assert [scores["method"] for scores in first] == ["base", "ft"]
    assert first[1]["reliability"] > first[0]["reliability"] and first[0]["changed"] == {
        "questions": None,
        "controls": 0.0,
    }
    assert first[1]["edit_megabytes"] > 0 and first[1]["settings"]["steps"] == 25
    (point,) = first[1]["curve"]
    assert point["edits"] == 1 and point["exact"]["edits"] in (0.0, 1.0)
    assert [line.split(" | ")[0] for line in (folder / "methods.md").read_text().splitlines()] == [
        "| method",
        "| ---",
        "| base",
        "| ft",
    ]
    page = (folder / "methods.html").read_text()
    assert page.count("<svg") == 3 and "http" not in page, "all at the end, and the way of each"
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert json.loads(run(capsys, *command, "--json")[1]) == first
    with monkeypatch.context() as patch:
        patch.setattr("memoir_retrieval.evaluation.methods_run.library_version", lambda: "9.0")
        error = run(capsys, *command)[2]
        assert f"ft: its scores in {folder} are those of version {first[1]['library']}, not 9.0" in error
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")} == kept
    code, _, error = run(capsys, *command, "--no-end-token")
    assert code == 2 and "base.json is of other edits, or of another model or other options" in error

    (folder / "ft.json").unlink()
    table = (folder / "methods.md").read_text()
    monkeypatch.setattr("memoir_retrieval.evaluation.methods_run.Unedited", None)  # the base model is not asked again
    (again,) = json.loads(run(capsys, *command[:-4], "--method", "ft", "--json")[1])
    assert {key: again[key] for key in ("exact", "changed", "perplexity", "diverged")} == {
        key: first[1][key] for key in ("exact", "changed", "perplexity", "diverged")
    }
    now = (folder / "methods.md").read_text()
    assert [line.split(" | ")[:9] for line in now.splitlines()] == [
        line.split(" | ")[:9] for line in table.splitlines()
    ], "all but seconds, of both methods"
    code, _, error = run(capsys, *command[:-4], "--method", "grace", "--no-end-token")
    assert code == 2 and "base.json is of other edits" in error, "one table is of one run"


def test_kept_answers_of_the_base_model_are_those_to_the_same_prompts(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memoir_retrieval.evaluation.methods_run.TOKENS", 4)
    answers = unedited_answers(base, [EDIT], 2, folder=tmp_path)
    assert unedited_answers(base, [EDIT], 2, folder=tmp_path) == answers == unedited_answers(base, [EDIT], 2)
    for edits, controls, alone in (([EDIT, OTHER], 2, False), ([EDIT], 1, False), ([EDIT], 2, True)):
        with pytest.raises(ConfigError, match=r"unedited.json is of other edits, or of another model or other options"):
            unedited_answers(base, edits, controls, alone=alone, folder=tmp_path)
    (tmp_path / "unedited.json").write_text("{")
    with pytest.raises(ConfigError, match=r"unedited.json is damaged"):
        unedited_answers(base, [EDIT], 2, folder=tmp_path)


def test_answers_that_were_known_beforehand_are_those_that_are_generated(base: BaseModel) -> None:
    method = open_method("base", base)
    prompts = [method.ids(text) for text in ("Who founded it?", "Who founded Exampleton?", "Where is the sea?", "Why?")]
    generated = method.generated(prompts, 6)
    asked_again: list[list[int]] = []

    class Counting(Unedited):
        def answers(self, prompts: list[list[int]], tokens: int) -> list[str]:
            asked_again.extend(prompts)
            return super().answers(prompts, tokens)

    likely = [generated[0], generated[1], [*generated[2][:-1], generated[2][-1] + 1], [7] * 9]
    answers = Counting(base).likely_answers(prompts, likely, 6)
    assert answers == method.answers(prompts, 6) == [method.text(row) for row in generated]
    assert asked_again == prompts[2:]
