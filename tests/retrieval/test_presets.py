"""Presets are found by the shapes of the published models, and name a projection that those models have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from memoir_retrieval.model import embedded
from memoir_retrieval.model.base import BaseModel, _edited
from memoir_retrieval.model.embedded import get_model
from memoir_retrieval.model.places import text_blocks
from memoir_retrieval.model.presets import PRESETS, preset_for

# The configurations as published. Settings: arXiv 2506.07899, appendix: layer, k, tau.
LLAMA_3 = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192,
)  # fmt: skip
LLAMA_2 = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, max_position_embeddings=4096,
)  # fmt: skip
MISTRAL = MistralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=32768, sliding_window=4096,
)  # fmt: skip
GPT_J = GPTJConfig(vocab_size=50400, n_embd=4096, n_inner=None, n_layer=28, n_head=16, rotary_dim=64, n_positions=2048)
PUBLISHED = {
    "LLaMA-3-8B-Instruct": (LLAMA_3, "model.layers.27.mlp.down_proj", 14336, 0.40),
    "LLaMA-2-7B": (LLAMA_2, "model.layers.27.mlp.down_proj", 11008, 0.46),
    "Mistral-7B": (MISTRAL, "model.layers.27.mlp.down_proj", 14336, 0.40),
    "GPT-J-6B": (GPT_J, "transformer.h.21.mlp.fc_out", 16384, 0.45),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_edited_where_the_paper_edits_it(name: str) -> None:
    config, module, d, tau = PUBLISHED[name]
    preset = preset_for(config)
    assert preset.source == f"published, {name}"
    assert (preset.k, preset.tau, preset.tau_chat) == (4096, tau, tau)
    with torch.device("meta"):  # every layer at its real shape, without memory for weights
        model = AutoModelForCausalLM.from_config(config)
    blocks = text_blocks(model)
    layer, projection, _ = _edited(model, blocks, preset.layer, name)
    base = BaseModel(model, None, Path(), name, blocks, preset.layer, layer, projection)
    assert (layer, base.d, base.h) == (module, d, 4096)
    assert d % 8 == 0 and preset.k < d


def test_the_embedded_model_has_a_preset() -> None:
    preset = preset_for(AutoConfig.from_pretrained(get_model("smollm2-135m")))
    assert preset.source == "measured, SmolLM2-135M-Instruct" and (preset.layer, preset.k) == (24, 438)
    assert len(PRESETS) == len(PUBLISHED) + 1  # a preset that is added needs its own line here


def test_the_weights_of_the_embedded_model_are_read_by_whoever_reads_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    for mode in (0o644, 0o640, 0o600):
        (tmp_path / "config.json").chmod(mode)
        embedded._open_to_readers(tmp_path)
        assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == mode


def test_answers_of_the_embedded_model_end_as_its_configuration_says() -> None:
    folder = get_model("smollm2-135m")
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == AutoConfig.from_pretrained(folder).eos_token_id == 2


@pytest.mark.parametrize(
    ("config", "layer", "k"),
    [
        # one number off a published shape is another model
        (LlamaConfig(**(LLAMA_3.to_dict() | {"num_hidden_layers": 30})), 25, 4096),
        (Qwen2Config(hidden_size=896, intermediate_size=4864, num_hidden_layers=24), 20, 1389),
        (GPT2Config(n_embd=768, n_layer=12, n_inner=None), 10, 877),
        (GPT2Config(n_embd=8, n_layer=1, n_head=1), 0, 9),
    ],
    ids=["llama", "qwen2", "gpt2", "one block"],
)
def test_any_other_model_gets_the_published_proportions(config: Any, layer: int, k: int) -> None:
    preset = preset_for(config)
    assert (preset.layer, preset.k, preset.source) == (layer, k, "default")
