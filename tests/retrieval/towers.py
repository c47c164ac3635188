"""Small random models of each layout of decoder: dense, with a mixture of experts, or with a vision tower beside it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf

from memoir_retrieval.model.base import model_class
from memoir_retrieval.model.embedded import get_model
from memoir_retrieval.model.places import text_blocks

__all__ = ["LAYOUTS", "MOE", "TEXT", "TOKENS", "VISION", "Layout", "save", "write"]

TOKENS = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": False}
TEXT: dict[str, Any] = TOKENS | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
GPT = TOKENS | {"n_embd": 128, "n_inner": 256, "n_layer": 2, "n_head": 4, "n_positions": 512}
MOE = TEXT | {"moe_intermediate_size": 96, "num_experts_per_tok": 2}
# Deeper than the text tower, and as wide: what a search by length or by width would take.
VISION: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "out_hidden_size": 128,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
GEMMA4 = {"sliding_window": 64, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "global_head_dim": 32}


class Layout(NamedTuple):
    """config: makes it. module: that is edited by default."""

    config: Any
    module: str


def layouts() -> dict[str, Layout]:
    ffn, attention = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"
    text_ffn = "model.language_model.layers.1.mlp.down_proj"
    return {
        "llama": Layout(hf.LlamaConfig(**TEXT), ffn),
        "mistral": Layout(hf.MistralConfig(**TEXT), ffn),
        "qwen2": Layout(hf.Qwen2Config(**TEXT), ffn),
        "qwen3": Layout(hf.Qwen3Config(**TEXT), ffn),
        "gemma": Layout(hf.GemmaConfig(**TEXT), ffn),
        "gpt2": Layout(hf.GPT2Config(**GPT), "transformer.h.1.mlp.c_proj"),
        "gptj": Layout(hf.GPTJConfig(**GPT, rotary_dim=4), "transformer.h.1.mlp.fc_out"),
        "qwen3-moe": Layout(hf.Qwen3MoeConfig(**MOE, num_experts=4), attention),
        "mixtral": Layout(hf.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2), attention),
        "gpt-oss": Layout(
            hf.GptOssConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2, sliding_window=64), attention
        ),
        "deepseek-v3": Layout(
            hf.DeepseekV3Config(
                **MOE | {"num_key_value_heads": 4}, n_routed_experts=4, n_group=1, topk_group=1,
                first_k_dense_replace=1, q_lora_rank=32,
                kv_lora_rank=32, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32,
            ),
            attention,
        ),
        "llama4": Layout(
            hf.Llama4TextConfig(**TEXT, intermediate_size_mlp=256, num_local_experts=4, num_experts_per_tok=1),
            attention,
        ),
        "gemma3": Layout(
            hf.Gemma3Config(text_config=TEXT | {"sliding_window": 64}, vision_config=VISION, **TOKENS), text_ffn
        ),
        "gemma4": Layout(
            hf.Gemma4Config(
                text_config=TEXT | GEMMA4,
                vision_config=VISION, audio_config=None, **TOKENS,
            ),
            text_ffn,
        ),
        "qwen2.5-vl": Layout(
            hf.Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": ROPE}, vision_config=QWEN_VISION, **TOKENS),
            text_ffn,
        ),
        "qwen3-vl": Layout(
            hf.Qwen3VLConfig(
                text_config=TEXT | {"rope_parameters": ROPE},
                vision_config=QWEN_VISION | {"deepstack_visual_indexes": [0]}, **TOKENS,
            ),
            text_ffn,
        ),
        "mistral3": Layout(
            hf.Mistral3Config(
                text_config=hf.MistralConfig(**TEXT), vision_config=hf.PixtralVisionConfig(**VISION), **TOKENS
            ),
            text_ffn,
        ),
    }  # fmt: skip


LAYOUTS = layouts()


def save(config: Any, folder: Path) -> None:
    """A random model in which something can be learnt: as it is drawn, attention looks at all tokens alike, and logits
    are alike; and behind a norm of its own the edited block would be one voice of four."""
    torch.manual_seed(0)
    model = model_class(config).from_config(config)
    model.get_output_embeddings().weight.data *= 12
    for name, parameter in text_blocks(model).named_parameters():
        if parameter.ndim > 1:
            parameter.data *= 6
        elif name == "1.post_feedforward_layernorm.weight":
            parameter.data += 4
    write(model, folder)


def write(model: Any, folder: Path) -> None:
    """Save a model with the tokenizer of the embedded one."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(get_model("smollm2-135m") / name, folder / name)
