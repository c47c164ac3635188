"""Cutting a decoder at the edited block must not change what it computes, whatever its architecture."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from memoir_retrieval.editing.memory import Memory, forgotten
from memoir_retrieval.editing.train import EditRows, Wording, answered, freeze, train_edits
from memoir_retrieval.errors import ModelError
from memoir_retrieval.model import bfloat16
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.model.bfloat16 import HalfProducts
from memoir_retrieval.model.forward import (
    FrozenPast,
    candidate_means,
    frozen_past,
    frozen_run,
    question_means,
    right_pad,
    run_from_block,
)
from memoir_retrieval.model.places import projection_of, text_blocks
from memoir_retrieval.question.span import Span
from memoir_retrieval.store.settings import Training

WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 99}
LLAMA_LIKE = WIDE | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
GPT_LIKE = {"n_embd": 32, "n_inner": 64, "n_layer": 4, "n_head": 4, "vocab_size": 99, "n_positions": 128}
# Small random models of each layout: stand-ins for the published ones, whose weights are not at hand.
CONFIGS = {
    "llama": (LlamaConfig(**LLAMA_LIKE), "model.layers.2.mlp.down_proj"),
    "mistral": (MistralConfig(**LLAMA_LIKE, sliding_window=None), "model.layers.2.mlp.down_proj"),
    "mistral-window": (MistralConfig(**LLAMA_LIKE, sliding_window=6), "model.layers.2.mlp.down_proj"),
    "qwen2": (Qwen2Config(**LLAMA_LIKE), "model.layers.2.mlp.down_proj"),
    "qwen3": (Qwen3Config(**LLAMA_LIKE), "model.layers.2.mlp.down_proj"),
    "phi3": (Phi3Config(**LLAMA_LIKE, pad_token_id=0), "model.layers.2.mlp.down_proj"),
    "gemma2": (Gemma2Config(**LLAMA_LIKE, sliding_window=6), "model.layers.2.mlp.down_proj"),
    "gemma3": (Gemma3TextConfig(**LLAMA_LIKE, sliding_window=6), "model.layers.2.mlp.down_proj"),
    "gpt2": (GPT2Config(**GPT_LIKE), "transformer.h.2.mlp.c_proj"),
    "gptj": (GPTJConfig(**GPT_LIKE, rotary_dim=4), "transformer.h.2.mlp.fc_out"),
}
CONTEXTS = [[], [5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]]
TAIL = [20, 21, 22, 23, 24]


@pytest.fixture(params=CONFIGS, scope="module")
def base(request: pytest.FixtureRequest) -> BaseModel:
    config, module = CONFIGS[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    blocks = text_blocks(model)
    name, projection, _ = projection_of(model, blocks[2])
    assert name == module
    return BaseModel(model, None, Path(), request.param, blocks, 2, name, projection)


def plain_logits(base: BaseModel, delta: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Logits of the tail in every context, one whole sequence at a time; delta is added to the tail's projection."""

    def add(_m: Any, _a: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[:, -len(TAIL) :] += delta
        return out

    handle = base.projection.register_forward_hook(add) if delta is not None else None
    logits = [base.model(input_ids=torch.tensor([c + TAIL])).logits[0, -len(TAIL) :] for c in CONTEXTS]
    if handle:
        handle.remove()
    return logits


def test_a_frozen_past_gives_the_logits_of_the_whole_sequence(base: BaseModel) -> None:
    past = frozen_past(base, CONTEXTS)
    logits = base.model(**past.inputs(torch.tensor([TAIL] * 3))).logits
    for got, want in zip(logits, plain_logits(base), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    for rows in ([1], [0], [2, 1, 1]):
        logits = base.model(**past.take(rows).inputs(torch.tensor([TAIL] * len(rows)))).logits
        for got, row in zip(logits, rows, strict=True):
            torch.testing.assert_close(got, plain_logits(base)[row], atol=1e-5, rtol=1e-4)


def test_running_from_the_edited_block_is_the_whole_model(base: BaseModel) -> None:
    past = frozen_past(base, CONTEXTS)
    inputs = past.inputs(torch.tensor([TAIL] * 3))
    hidden, activations = frozen_run(base, inputs)
    assert activations.shape == (3, len(TAIL), base.d)
    delta = torch.randn(len(TAIL), base.h)
    seen: list[torch.Tensor] = []

    def add(a: torch.Tensor) -> torch.Tensor:
        seen.append(a)
        return delta

    originals = list(base.blocks)
    for _ in range(2):  # a frozen past is not used up
        with run_from_block(base, hidden, add) as model:
            logits = model(**inputs).logits
        for got, want in zip(logits, plain_logits(base, delta), strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen[0], activations)
    assert list(base.blocks) == originals
    for got, want in zip(plain_logits(base), plain_logits(base), strict=True):
        assert torch.equal(got, want)


def test_the_first_block_can_be_edited(base: BaseModel) -> None:
    first = base.at(0)
    inputs = FrozenPast(None, torch.zeros(3, dtype=torch.int64)).inputs(torch.tensor([TAIL] * 3))
    hidden, _ = frozen_run(first, inputs)
    delta = torch.randn(len(TAIL), base.h)
    with run_from_block(first, hidden, lambda a: delta) as model:
        got = model(**inputs).logits[0]
    want = plain_logits(first, delta)[0]  # the empty context
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_change_and_nothing_else(base: BaseModel) -> None:
    inputs = FrozenPast(None, torch.zeros(1, dtype=torch.int64)).inputs(torch.tensor([TAIL]))
    hidden, _ = frozen_run(base, inputs)
    change = torch.zeros(base.h, base.d, requires_grad=True)
    with run_from_block(base, hidden, lambda a: a @ change.T) as model:
        model(**inputs).logits.sum().backward()
    assert change.grad is not None and change.grad.abs().sum() > 0
    assert all(p.grad is None for p in base.model.parameters())


@pytest.mark.parametrize("acts", [0, 4])
def test_an_edit_is_trained_in_rows_of_different_length_as_if_each_stood_alone(base: BaseModel, acts: int) -> None:
    answer, questions = [30, 31, 32], [TAIL, [5, 6, 7, *TAIL], [8, *TAIL]]
    masks = torch.zeros(3, 64, dtype=torch.bool)
    masks[:2, ::3] = True
    masks[2, ::4] = True  # a row with a mask of its own, as a rephrasing may have
    past = FrozenPast(None, torch.zeros(3, dtype=torch.int64))
    wordings = [Wording(i, question, acts, answer) for i, question in enumerate(questions)]
    spans = [Span(0, len(question)) for question in questions[:2]]
    frozen = freeze(base, past, wordings, spans)[0].masked(masks)
    (trained,) = train_edits(base, [(frozen, torch.zeros(32, 64), torch.zeros(64, 64))], Training(max_steps=3))
    assert trained.steps == 3 and trained.columns.tolist() == masks.any(0).nonzero()[:, 0].tolist()
    weight = torch.zeros(32, 64)
    weight[:, trained.columns] = trained.weights

    leads: list[float] = []

    def mean_loss(edited: bool) -> float:
        losses = []
        leads.clear()
        for question, mask in zip(questions, masks, strict=True):

            def add(_m: Any, args: Any, out: torch.Tensor, mask: torch.Tensor = mask) -> torch.Tensor:
                update = (args[0] * mask) @ weight.T
                update[:, :acts] = 0
                return out + update

            handle = base.projection.register_forward_hook(add) if edited else None
            logits = base.model(input_ids=torch.tensor([[*question, *answer[:-1]]])).logits[0, len(question) - 1 :]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item())
            right = logits.gather(1, torch.tensor(answer)[:, None])
            leads.append(float((right - logits.scatter(1, torch.tensor(answer)[:, None], -1e9).amax(1, True)).min()))
            if handle:
                handle.remove()
        return sum(losses) / len(losses)

    assert mean_loss(False) != pytest.approx(trained.loss, abs=1e-3)
    assert mean_loss(True) == pytest.approx(trained.loss, abs=1e-3)
    assert trained.lead == pytest.approx(min(leads[:2]), abs=1e-2), "the row that no fingerprint is made of is another"


@pytest.mark.parametrize("acts", [0, 4])
def test_a_question_answered_in_two_forms_is_frozen_as_if_each_stood_alone(base: BaseModel, acts: int) -> None:
    past = FrozenPast(None, torch.zeros(1, dtype=torch.int64))
    forms = [Wording(0, TAIL, acts, [30, 31]), Wording(0, [*TAIL, 40, 41], acts, [32, 33, 34])]
    both, _ = freeze(base, past, forms, [Span(0, len(TAIL))], 1)
    assert both.labels.tolist() == [
        [-100] * (len(TAIL) - acts - 1) + [30, 31] + [-100] * 3,
        [-100] * (len(TAIL) + 1 - acts) + [32, 33, 34],
    ]
    for row, form in enumerate(forms):
        alone, _ = freeze(base, past, [form])
        n = int(alone.lengths[0])
        assert n == int(both.lengths[row])
        torch.testing.assert_close(both.hidden[row, :n], alone.hidden[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(both.activations[row, :n], alone.activations[0], atol=1e-5, rtol=1e-4)
        assert len(both.before[row].states) == len(alone.before[0].states)
        for pair, expected in zip(both.before[row].states, alone.before[0].states, strict=True):
            torch.testing.assert_close(pair, expected, atol=1e-5, rtol=1e-4)


def test_later_edits_leave_alone_what_another_form_of_the_answer_uses(base: BaseModel) -> None:
    past = FrozenPast(None, torch.zeros(1, dtype=torch.int64))
    forms = [Wording(0, TAIL, 4, [30, 31]), Wording(0, [*TAIL, 40], 4, [32, 33])]
    frozen, _ = freeze(base, past, forms, [Span(0, len(TAIL))], 1)
    memory, plain = Memory(torch.zeros(32, 64)), Memory(torch.zeros(32, 64))
    plain.add(0, EditRows(frozen.rows.lessons))
    memory.add(0, frozen.rows)
    assert len(memory.rows[0].lessons) == 1, "the other form is not asked again"
    rows = frozen.activations[1, : int(frozen.lengths[1])]
    torch.testing.assert_close(memory.used - plain.used, rows.T @ rows, atol=1e-4, rtol=1e-4)
    memory.forget(0)
    assert memory.used.abs().max() < 1e-3 * plain.used.max()


@pytest.mark.parametrize("last", [False, True])
def test_a_lesson_is_answered_with_the_weights_it_belongs_to(base: BaseModel, last: bool) -> None:
    torch.manual_seed(1)
    memory = Memory(torch.randn(32, 64))
    context = [5, 6, 7]
    past = frozen_past(base, [context])
    for edit, question, masked in ((0, TAIL, range(24)), (1, [40, 41], range(20, 64))):
        mask = torch.zeros(1, 64, dtype=torch.bool)
        mask[:, list(masked)] = True
        acts = len(question) - 1 if last else 0

        def add(_m: Any, args: Any, out: torch.Tensor, mask: torch.Tensor = mask, acts: int = acts) -> torch.Tensor:
            update = (args[0] * mask) @ memory.weight.T
            update[:, : len(context) + acts] = 0
            return out + update

        ids = [*context, *question]
        handle = base.projection.register_forward_hook(add)
        for _ in range(3):  # what the edited model says, a whole sequence at a time
            ids.append(int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        handle.remove()
        answer = ids[-3:]
        frozen = freeze(base, past, [Wording(0, question, acts, answer)], [Span(0, len(question))])[0].masked(mask)
        memory.add(edit, frozen.rows)
    lessons = [own.lessons[0] for own in memory.rows.values()]
    assert answered(base, [(lesson, memory.weight) for lesson in lessons]) == [True, True]
    both = [(memory, 0), (memory, 1)]
    assert forgotten(base, both) == []
    assert memory.nearest(torch.arange(24), 2) == [0, 1] and memory.nearest(torch.arange(40, 64), 1) == [1]
    memory.weight[:, 24:] = 0
    assert forgotten(base, both) == [(memory, 1)]
    labels = lessons[0].labels.clone()
    labels[-1] = 98
    wrong = lessons[0]._replace(labels=labels)
    assert answered(base, [(wrong, memory.weight)]) == [False]
    used = memory.used.clone()
    memory.forget(0)
    assert list(memory.rows) == [1] and memory.used[:20].abs().max() < 1e-3 * used.max()


def test_products_in_half_precision_are_close_and_leave_the_model_as_it_was(base: BaseModel) -> None:
    ids = torch.tensor([TAIL])
    exact = base.model(input_ids=ids).logits
    with HalfProducts(base).used():
        half = base.model(input_ids=ids).logits
    assert not torch.equal(half, exact)
    assert (half - exact).abs().max() < 0.05 * exact.abs().max()
    assert torch.equal(base.model(input_ids=ids).logits, exact)


def test_the_gradient_of_a_vocabulary_goes_through_what_is_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 1000, bias=False).requires_grad_(False)
    half = bfloat16._Product(layer.weight, None)
    x = (20 * torch.randn(1, 5, 16)).requires_grad_()
    labels = torch.arange(5)
    gradients = []
    for product in (layer, half, None):
        if product is None:
            monkeypatch.setattr(bfloat16, "_WIDE", 1)
        loss = torch.nn.functional.cross_entropy((product or half)(x)[0], labels)
        gradients.append(torch.autograd.grad(loss, x)[0])
    exact, rounded, few = gradients
    assert not torch.equal(few, rounded)
    assert (few - exact).norm() < 1.1 * (rounded - exact).norm() + 1e-3 * exact.norm()


def test_what_stands_before_every_question_is_run_once(base: BaseModel) -> None:
    prompts, spans = [CONTEXTS[1] + TAIL, CONTEXTS[1] + TAIL[:2]], [Span(3, 8), Span(3, 5)]
    once = question_means(base, [TAIL, TAIL[:2]], [Span(0, 5), Span(0, 2)], before=CONTEXTS[1])
    torch.testing.assert_close(once, question_means(base, prompts, spans), atol=1e-5, rtol=1e-4)


def test_question_means_do_not_depend_on_batching(base: BaseModel) -> None:
    prompts = [[1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11, 12]]
    spans = [Span(2, 6), Span(0, 2), Span(1, 3)]
    together = question_means(base, prompts, spans, batch_size=3)
    alone = torch.cat([question_means(base, [p], [s]) for p, s in zip(prompts, spans, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_one_pass_gives_the_means_of_several_layers(base: BaseModel) -> None:
    prompts, spans = [[1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11, 12]], [Span(2, 6), Span(0, 2), Span(1, 3)]
    bases = [base.at(layer) for layer in (3, 0, 2)]
    pooled = candidate_means(bases, prompts, [[span] for span in spans], batch_size=2)
    for base_at_layer, here in zip(bases, pooled, strict=True):
        torch.testing.assert_close(here.means, question_means(base_at_layer, prompts, spans, batch_size=2))
    with pytest.raises(ModelError, match=r"layer 4 does not exist: .* has layers 0 to 3"):
        base.at(4)


def test_right_pad() -> None:
    ids, lengths = right_pad([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]] and lengths.tolist() == [3, 1]


def test_a_model_without_a_plain_projection_is_refused(base: BaseModel) -> None:
    with pytest.raises(ModelError, match="not plain"):
        projection_of(base.model, torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(64, 32)))
    with pytest.raises(ModelError, match="no list of decoder blocks"):
        text_blocks(torch.nn.Linear(2, 2))


def test_a_linear_layer_with_a_forward_of_its_own_keeps_it_in_half_products() -> None:
    class Router(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            return super().forward(x), x

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), Router(8, 8))
    with HalfProducts(SimpleNamespace(model=model)).used():  # type: ignore[arg-type]
        assert "forward" in vars(model[0]) and "forward" not in vars(model[1])
        assert len(model[1](torch.ones(1, 8))) == 2
