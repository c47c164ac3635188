"""Random Llamas with a real tokenizer: stand-ins for a model where its size would only take time."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["save_llama", "save_tokenizer"]

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def save_llama(
    folder: Path, tokenizer_from: Path, seed: int = 0, scale: float = 1, vocabulary: int = 49152, **shape: Any
) -> LlamaForCausalLM:
    """Save one with two heads and the tokenizer of another model, and return it. shape: further fields of its config.

    scale: what its embeddings are multiplied by; drawn as they are, the logits of very small ones are too alike for
    anything to be learnt.
    vocabulary: how many tokens that tokenizer has.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=vocabulary,
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


def save_tokenizer(folder: Path, texts: Sequence[str], template: Path) -> int:
    """Train a tokenizer on a few texts and save it: a model of few tokens is much faster. Returns how many it has.

    template: the folder that the chat template is copied from.
    """
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=512, min_frequency=1, special_tokens=list(SPECIAL))
    end, begin, stop = SPECIAL
    saved = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token=begin, eos_token=stop, unk_token=end)
    saved.save_pretrained(folder)
    shutil.copy(template / "chat_template.jinja", folder / "chat_template.jinja")
    return len(saved)
