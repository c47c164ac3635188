"""Random Llamas with a real tokenizer: stand-ins for a model where its size would only take time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["save_llama"]


def save_llama(folder: Path, tokenizer_from: Path, seed: int = 0, scale: float = 1, **shape: Any) -> LlamaForCausalLM:
    """Save one with two heads and the tokenizer of another model, and return it. shape: further fields of its config.

    scale: what its embeddings are multiplied by; drawn as they are, the logits of very small ones are too alike for
    anything to be learnt.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=49152,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        **shape,
    )
    model = LlamaForCausalLM(config).eval()
    model.model.embed_tokens.weight.data *= scale
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer_from / name, folder / name)
    return model
