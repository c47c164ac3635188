"""How a chat template has a model think before it answers, and with what an answer closes that thinking.

An edit is a fact, which nothing has to be thought about for: its answer closes the thinking at once. So it stands where
a client looks for it, behind the think tags, whether thinking is on or off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

__all__ = ["PromptEnd", "behind_thinking", "closing", "described", "prompt_ends", "thinks"]

# The names under which templates let a request switch thinking on and off.
SWITCHES = ("enable_thinking", "thinking")
_NAMES = r"(?:[a-z]+:)?(?:think|thinking|thought|reasoning)"
_OPEN = re.compile(rf"<{_NAMES}>|\[THINK\]")
_CLOSE = re.compile(rf"</{_NAMES}>|\[/THINK\]")


class PromptEnd(NamedTuple):
    """How a prompt may end, where a template renders it with a switch or without.

    options: what the template is given besides the messages.
    closing: what an answer begins with behind that end: the thinking, empty, as far as the prompt has not written it.
    """

    options: dict[str, bool]
    closing: str


def closing(tokenizer: Any) -> str:
    """What an answer begins with where a request says nothing about thinking; "" where the template opens none.

    tokenizer: of Hugging Face.
    """
    return prompt_ends(tokenizer)[0].closing


def thinks(tokenizer: Any) -> bool:
    """Whether the template opens or closes a think tag at the end of a prompt, by itself or by a switch.

    tokenizer: of Hugging Face.
    """
    ends = prompt_ends(tokenizer)
    return len(ends) > 1 or bool(ends[0].closing)


def described(tokenizer: Any) -> str:
    """What edits do about the thinking of a template, in one line; "" where it has none.

    tokenizer: of Hugging Face.
    """
    ends = prompt_ends(tokenizer)
    if not thinks(tokenizer):
        if _CLOSE.search(str(getattr(tokenizer, "chat_template", None) or "")):
            return "the chat template knows think tags, but opens none: edits answer at once, without any"
        return ""
    switched = [f"{name}={str(on).lower()}" for end in ends[1:] for name, on in end.options.items()]
    closes = f"answers begin with {ends[0].closing!r}" if ends[0].closing else "answers begin at once"
    also = f"; also trained with {', '.join(switched)}" if switched else ""
    return f"the chat template has the model think before it answers: edits do not, their {closes}{also}"


def behind_thinking(tokenizer: Any, text: str) -> str:
    """An answer without the thinking before it.

    tokenizer: of Hugging Face.
    text: the whole answer.
    """
    last = max((match.end() for match in _CLOSE.finditer(text)), default=0) if thinks(tokenizer) else 0
    return text[last:].lstrip() if last else text


def prompt_ends(tokenizer: Any) -> tuple[PromptEnd, ...]:
    """The ends that a prompt may have, each other than those before it; first that of a request without a switch.

    tokenizer: of Hugging Face.
    """
    return _prompt_ends(tokenizer, str(getattr(tokenizer, "chat_template", None) or ""))


@lru_cache(maxsize=16)
def _prompt_ends(tokenizer: Any, template: str) -> tuple[PromptEnd, ...]:
    if not _CLOSE.search(template):
        return (PromptEnd({}, ""),)
    texts: dict[str, dict[str, bool]] = {}
    for options in ({}, *({name: on} for name in SWITCHES for on in (True, False))):
        text = _end(tokenizer, options)
        if text is not None:
            texts.setdefault(text, options)
    block = next((match.group() for text in texts if (match := _EMPTY.search(text))), "")
    tag = next((match.group() for match in _CLOSE.finditer(template)), "")
    return tuple(PromptEnd(options, _rest(text, block, tag)) for text, options in texts.items())


# An end that says that there is no thinking: a closing tag, behind an opening one or not, and nothing but space.
_EMPTY = re.compile(rf"(?:{_OPEN.pattern})?\s*(?:{_CLOSE.pattern})\s*\Z")


def _rest(end: str, block: str, tag: str) -> str:
    """What is still to be written of an empty thinking.

    end: of the prompt.
    block: the empty thinking as the template writes it; "" where it has none.
    tag: the closing one.
    """
    if _EMPTY.search(end):
        return ""
    opened = list(_OPEN.finditer(end))
    if not opened or _CLOSE.search(end, opened[-1].end()):
        return block  # as the model opens its thinking by itself
    begun = end[opened[-1].start() :]
    if block.startswith(begun):
        return block[len(begun) :]
    closed = _CLOSE.search(block)
    space = begun[len(opened[-1].group()) :]
    return space + (block[closed.start() :] if closed else tag + 2 * space)


def _end(tokenizer: Any, options: Mapping[str, bool]) -> str | None:
    """What the template writes behind a user's message, or None where it refuses the options."""
    question = "Which river is it?"
    messages = [{"role": "user", "content": question}]
    try:
        text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
    except Exception:  # templates raise their own errors
        return None
    return text.rpartition(question)[2]
