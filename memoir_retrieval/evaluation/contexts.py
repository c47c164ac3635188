"""Contexts in which edits are asked while they are measured, none of which is used in training."""

from __future__ import annotations

import json
from collections.abc import Sequence

from memoir_retrieval.background import shipped
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.question.prompts import Message, Prompt, as_messages

__all__ = ["CONTEXTS", "UNSEEN", "in_context"]

UNSEEN = ("system", "turn", "passages")
"""system: under a long system prompt. turn: as the third turn of a conversation. passages: after retrieved passages in
a system message."""
CONTEXTS = ("plain", *UNSEEN, "inline")
"""plain: the prompt as it is. inline: after retrieved passages inside the user's own message, where the question cannot
be distinguished from them: not one of those in which edits are expected to be found."""


def in_context(name: str, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts as a context asks them.

    name: one of `CONTEXTS`.
    prompts: text or messages each.

    Raises ConfigError for an unknown name.
    """
    if name not in CONTEXTS:
        raise ConfigError(f"context {name!r} is not known: choose one of {', '.join(CONTEXTS)}")
    if name == "plain":
        return list(prompts)
    around = json.loads(shipped("unseen.json"))[name]
    return [_wrap(around, prompt) for prompt in prompts]


def _wrap(around: list[Message], prompt: Prompt) -> list[Message]:
    messages = as_messages(prompt)
    *before, last = around
    *earlier, question = messages
    said = last["content"].replace("{question}", question["content"])
    return [*before, *earlier, {**question, "content": said}]
