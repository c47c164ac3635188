"""Cutting a decoder at the edited block must not change what it computes, whatever its architecture."""

from __future__ import annotations

from pathlib import Path
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

from memoir_retrieval.errors import ModelError
from memoir_retrieval.forward import (
    FrozenPast,
    frozen_past,
    frozen_run,
    layer_means,
    question_means,
    right_pad,
    run_from_block,
)
from memoir_retrieval.model import BaseModel, _blocks, _projection
from memoir_retrieval.train import Training, edit_activations, train_edit

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
    blocks = _blocks(model)
    name, projection = _projection(model, blocks[2])
    assert name == module
    return BaseModel(model, None, Path(), request.param, blocks, 2, name, projection)


def plain_logits(base: BaseModel, delta: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Logits of the tail in every context, one whole sequence at a time; delta is added to the tail's projection."""

    def add(_m: Any, _a: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[:, -len(TAIL) :] += delta
        return out

    handle = base.projection.register_forward_hook(add) if delta is not None else None
    found = [base.model(input_ids=torch.tensor([c + TAIL])).logits[0, -len(TAIL) :] for c in CONTEXTS]
    if handle:
        handle.remove()
    return found


def test_a_frozen_past_gives_the_logits_of_the_whole_sequence(base: BaseModel) -> None:
    past = frozen_past(base, CONTEXTS)
    logits = base.model(**past.inputs(torch.tensor([TAIL] * 3))).logits
    for got, want in zip(logits, plain_logits(base), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    bare = base.model(**frozen_past(base, CONTEXTS[1:]).first().inputs(torch.tensor([TAIL]))).logits[0]
    torch.testing.assert_close(bare, plain_logits(base)[1], atol=1e-5, rtol=1e-4)


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


def test_an_edit_is_trained_in_rows_of_different_length_as_if_each_stood_alone(base: BaseModel) -> None:
    columns, answer = torch.arange(0, 64, 3), [30, 31, 32]
    questions = [TAIL, [5, 6, 7, *TAIL], [8, *TAIL]]
    past = FrozenPast(None, torch.zeros(3, dtype=torch.int64))
    weights, used = torch.zeros(32, len(columns)), torch.zeros(len(columns), len(columns))
    trained = train_edit(base, past, questions, answer, columns, weights, used, Training(max_steps=3))
    assert trained.steps == 3 and trained.activations.shape == (len(TAIL) + 2, len(columns))

    def add(_m: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out + args[0][..., columns] @ trained.columns.T

    def mean_loss() -> float:
        losses = []
        for question in questions:
            logits = base.model(input_ids=torch.tensor([[*question, *answer[:-1]]])).logits[0, len(question) - 1 :]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item())
        return sum(losses) / len(losses)

    before = mean_loss()
    handle = base.projection.register_forward_hook(add)
    after = mean_loss()
    handle.remove()
    assert after == pytest.approx(trained.loss, abs=1e-3) != before
    torch.testing.assert_close(trained.activations, edit_activations(base, past, TAIL, answer, columns))


def test_question_means_do_not_depend_on_batching(base: BaseModel) -> None:
    prompts = [[1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11, 12]]
    spans = [(2, 6), (0, 2), (1, 3)]
    together = question_means(base, prompts, spans, batch_size=3)
    alone = torch.cat([question_means(base, [p], [s]) for p, s in zip(prompts, spans, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_one_pass_gives_the_means_of_several_layers(base: BaseModel) -> None:
    prompts, spans = [[1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11, 12]], [(2, 6), (0, 2), (1, 3)]
    bases = [base.at(layer) for layer in (3, 0, 2)]
    for one, means in zip(bases, layer_means(bases, prompts, spans, batch_size=2), strict=True):
        torch.testing.assert_close(means, question_means(one, prompts, spans, batch_size=2))
    with pytest.raises(ModelError, match=r"layer 4 does not exist: .* has layers 0 to 3"):
        base.at(4)


def test_right_pad() -> None:
    ids, lengths = right_pad([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]] and lengths.tolist() == [3, 1]


def test_a_model_without_a_plain_projection_is_refused(base: BaseModel) -> None:
    with pytest.raises(ModelError, match="not plain"):
        _projection(base.model, torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(64, 32)))
    with pytest.raises(ModelError, match="no list of decoder blocks"):
        _blocks(torch.nn.Linear(2, 2))
