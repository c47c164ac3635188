"""Tensor-parallel ranks on CPU, each with its share of the edited layer. Ranks spin while they wait for each other, so
more of them than cores take minutes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import EDITS, NEW_TOKENS, PROMPTS, Engine, Expected, flags, make_store, next_generation
from transformers import LlamaConfig, LlamaForCausalLM

from memoir_retrieval.model import load_model
from memoir_retrieval.reference import EditedModel

pytestmark = pytest.mark.engine

# Questions are split from what stands before them, long ones are computed twice.
SMALL_STEPS = {"max_num_seqs": 16, "max_num_batched_tokens": 26, "block_size": 32}


@pytest.fixture(scope="module")
def even_model(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with an even number of heads, a stand-in for the embedded one, which has nine."""
    folder = tmp_path_factory.mktemp("even") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=49152,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model_folder / name, folder / name)
    return folder


def test_two_ranks_answer_as_one(start: Callable[..., Engine], even_model: Path, tmp_path: Path) -> None:
    base = load_model(str(even_model), layer=1)
    folder = make_store(base, tmp_path / "edits", k=72, tau=0.9)
    model = EditedModel.open(folder, str(even_model))
    engine = start(**flags(even_model, folder, tensor_parallel_size=2, **SMALL_STEPS))
    prompts = [model.prompt_ids(prompt) for prompt in PROMPTS.values()]
    wanted = [model.generate([ids], max_new_tokens=NEW_TOKENS)[0] for ids in prompts]
    assert len(EDITS) < sum(answer.edit is not None for answer in wanted) < len(PROMPTS)
    for warm in (False, True):
        for name, answer, reply in zip(PROMPTS, wanted, engine.ask(prompts, warm=warm), strict=True):
            assert (reply.tokens, reply.memoir["edit"]) == (list(answer.tokens), answer.edit), name
    _agree(engine)
    generation = next_generation(folder, without=(1,))
    assert engine.llm.collective_rpc("memoir_reload") == [generation] * 2


def _agree(engine: Engine) -> None:
    """That every rank has decided, applied and repeated the same."""
    ranks = engine.llm.collective_rpc("memoir_stats")
    for key in ("routed", "matched", "recalled", "replayed", "rows", "live"):
        assert len({rank[key] for rank in ranks}) == 1, key
    assert ranks[0]["replayed"] > 0 and ranks[0]["recalled"] > 0


@pytest.mark.slow
def test_three_ranks_answer_as_one(
    start: Callable[..., Engine],
    model_folder: Path,
    store_folder: Path,
    expected: dict[str, Expected],
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(store_folder, tmp_path / "edits")
    engine = start(**flags(model_folder, folder, tensor_parallel_size=3, **SMALL_STEPS))
    prompts = [wanted.ids for wanted in expected.values()]
    for warm in (False, True):
        for name, reply in zip(PROMPTS, engine.ask(prompts, warm=warm), strict=True):
            assert reply.tokens == expected[name].tokens, name
            assert reply.memoir["edit"] == expected[name].edit, name
    _agree(engine)

    generation = next_generation(folder, without=(1,))
    assert engine.llm.collective_rpc("memoir_reload") == [generation] * 3
    model = EditedModel.open(folder, str(model_folder))
    for ids in prompts[:3]:
        (wanted,) = model.generate([ids], max_new_tokens=NEW_TOKENS)
        (reply,) = engine.ask([ids])
        assert (reply.tokens, reply.memoir["edit"]) == (list(wanted.tokens), wanted.edit)
        assert reply.memoir["generation"] == generation
