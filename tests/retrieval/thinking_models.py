"""The embedded model under chat templates that have it think: with think tags in its vocabulary, which it lacks."""

from __future__ import annotations

import json
import os
from pathlib import Path

from memoir_retrieval.model.embedded import get_model

__all__ = ["ENDS", "save_thinking"]

_START = "{{ '<|im_start|>assistant\n' }}"
_OFF = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
# What a template writes behind the messages: those of DeepSeek-R1, Qwen3, GLM or Qwen3.5, and DeepSeek-V3.1.
ENDS = {
    "opened": "{{ '<|im_start|>assistant\n<think>\n' }}",
    "switched off": _START + _OFF + "{% endif %}",
    "opened or switched off": _START + _OFF + "{% else %}{{ '<think>\n' }}{% endif %}",
    "switched on": _START
    + "{% if thinking is defined and thinking %}{{ '<think>' }}{% else %}{{ '</think>' }}{% endif %}",
}
# These two have embeddings of their own. Most of the model's special tokens share one, so that it cannot say which.
_TOKENS = {"<repo_name>": "<think>", "<filename>": "</think>"}


def save_thinking(folder: Path, ending: str) -> Path:
    """Save one, with the embedded model's weights.

    folder: made for it.
    ending: a name of `ENDS`.
    """
    source = get_model("smollm2-135m")
    folder.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    os.symlink(source / "model.safetensors", folder / "model.safetensors")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        if token["content"] in _TOKENS:
            token |= {"content": _TOKENS[token["content"]], "special": False}
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {_TOKENS.get(token, token): number for token, number in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    messages = (source / "chat_template.jinja").read_text().partition("{% if add_generation_prompt %}")[0]
    messages = messages.replace("message['content'] +", "message['content'].split('</think>')[-1] +")
    (folder / "chat_template.jinja").write_text(
        messages + "{% if add_generation_prompt %}" + ENDS[ending] + "{% endif %}"
    )
    return folder
