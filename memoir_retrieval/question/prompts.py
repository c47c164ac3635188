"""From what a user asks (a string or chat messages) to the token ids the model sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

from memoir_retrieval.errors import ConfigError, Reason
from memoir_retrieval.question.thinking import closing

__all__ = [
    "Message",
    "Prompt",
    "as_messages",
    "end_token",
    "given_ids",
    "not_utf8",
    "prompt_ids",
    "target_ids",
    "text_ids",
]

Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | Sequence[Message]


def prompt_ids(tokenizer: Any, prompt: Prompt, *, chat: bool, options: Mapping[str, Any] | None = None) -> list[int]:
    """Token ids of a prompt, as an OpenAI-compatible server would make them.

    tokenizer: of Hugging Face.
    prompt: text or messages; messages always go through the chat template.
    chat: whether text is one user message, else it is raw.
    options: what the chat template is given besides the messages.

    Raises ConfigError where messages have no template to go through, or a text cannot be written in UTF-8.
    """
    for text in [prompt] if isinstance(prompt, str) else [part for message in prompt for part in message.values()]:
        if isinstance(text, str) and (wrong := not_utf8(text)):
            raise ConfigError(wrong)
    if isinstance(prompt, str) and not chat:
        return list(tokenizer(prompt).input_ids)
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "this tokenizer has no chat template", cure="ask raw prompts (chat=False)", reason=Reason.NO_TEMPLATE
        )
    messages = as_messages(prompt)
    rendered = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, **options or {}
    )
    return list(rendered["input_ids"])


def not_utf8(text: str) -> str:
    """Why a text cannot be written in UTF-8; "" where it can. It may come from bytes that were none, or be cut.

    text: any.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        return f"{text[:60]!r} has half a surrogate pair, {half!r}; remove it, or give text in UTF-8"
    return ""


def as_messages(prompt: Prompt) -> list[Message]:
    """The messages of a chat.

    prompt: text is one user message.
    """
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def given_ids(prompt: Prompt | list[int], render: Callable[[Prompt], list[int]]) -> list[int]:
    """Token ids as they are, or a prompt rendered to them.

    prompt: token ids, text or messages.
    render: what makes token ids of the last two.
    """
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return list(prompt)
    return render(cast(Prompt, prompt))


def end_token(tokenizer: Any) -> int:
    """The token that ends an answer.

    tokenizer: of Hugging Face.

    Raises ConfigError where it names none.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("this tokenizer has no end-of-text token, so an edit could not learn where to stop")
    return int(tokenizer.eos_token_id)


def target_ids(tokenizer: Any, target: str, *, chat: bool) -> list[int]:
    """Token ids of an answer without the end token. After raw text the answer begins with a space.

    Where the chat template has the model think first, the answer closes that at once (see `question.thinking`).

    tokenizer: of Hugging Face.
    target: the answer's text.
    chat: whether the answer stands in a chat.
    """
    return text_ids(tokenizer, closing(tokenizer) + target if chat else " " + target)


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a part of an answer.

    tokenizer: of Hugging Face.
    text: what it is to be.
    """
    return list(tokenizer(text, add_special_tokens=False).input_ids)
