"""From an edit to an answer on each layout of decoder: small random models with the real tokenizer as stand-ins."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from memoir_retrieval import Edit, EditedModel, Editor, EditStore, Retriever, load_model
from memoir_retrieval.model.embedded import get_model

TOKENS = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": False}
LLAMA_LIKE = TOKENS | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
GPT_LIKE = TOKENS | {"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA_LIKE),
    "mistral": MistralConfig(**LLAMA_LIKE),
    "qwen2": Qwen2Config(**LLAMA_LIKE),
    "qwen3": Qwen3Config(**LLAMA_LIKE),
    "gemma": GemmaConfig(**LLAMA_LIKE),
    "gpt2": GPT2Config(**GPT_LIKE),
    "gptj": GPTJConfig(**GPT_LIKE, rotary_dim=4),
}
EDIT = Edit(prompt="Who founded Aarhus?", target="Harald")


@pytest.mark.parametrize("layout", CONFIGS)
def test_an_edit_is_stored_and_answered(layout: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[layout])
    head = model.get_output_embeddings()
    head.weight.data *= 50  # drawn as they are, the logits are too alike for anything to be learnt
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(get_model("smollm2-135m") / name, tmp_path / "model" / name)
    base = load_model(str(tmp_path / "model"))
    with Editor(base, tmp_path / "store", chat=False, tau=0.8) as editor:
        assert len(editor.add([EDIT])) == 1, editor.outcome.failed
    edited = EditedModel(Retriever(EditStore.open(tmp_path / "store"), base))
    (answer,) = edited.generate([EDIT.prompt], max_new_tokens=8)
    assert answer.edit == 0 and answer.text.strip() == EDIT.target and answer.tokens[-1] == 2
    prompt, other = edited.prompt_ids(EDIT.prompt), edited.prompt_ids("Is it raining in Oslo today?")
    on, off = (edited.generate([other], max_new_tokens=4, edited=on)[0] for on in (True, False))
    assert on.edit is None and on.tokens == off.tokens
    assert edited.generate([prompt], max_new_tokens=8, edited=False)[0].text.strip() != EDIT.target
