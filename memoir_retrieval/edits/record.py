"""What an edit is: the record a user writes and the record a store keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from memoir_retrieval.question.prompts import Message, Prompt
from memoir_retrieval.question.text import plain_text, text_key

__all__ = ["Edit", "Probe", "Requires", "StoredEdit", "as_prompt", "masked", "prompt_key", "stored_as"]


Requires = tuple[str | tuple[str, ...], ...]
"""Texts that must all stand in a question; of those given together as one entry, one is enough."""


class Probe(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A question with its answer: today's, where an edit must leave it alone, or the one that follows from the edit.

    `aliases`: other texts that are as right as `answer`.
    """

    prompt: str
    answer: str = ""
    aliases: tuple[str, ...] = ()


class Edit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One correction: asked `prompt`, the model shall answer `target`.

    Training sees the prompt and the target; most of the rest is only read by evaluation. `locality`: unrelated
    questions. `neighbourhood`: questions about like things, such as the same relation of another subject; they must
    be left alone too. `portability`: questions whose answer follows from the edit, such as two hops. `ood`: the
    same knowledge in other words, whole texts. `requires`: the edit acts only on questions in which these
    texts stand (see `names`). `source` says where the edit comes from, in the user's words. `before`: the messages
    of a chat before the one that asks `prompt`, which the edit is trained after too.

    `prompt` and `rephrases` are kept in their plain form (`question.text`), whatever they were made from, with the
    subject where `{}` stands for it; all other texts, above all the target, are kept as they are.
    """

    prompt: str
    target: str
    subject: str = ""
    rephrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    source: str = ""
    neighbourhood: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    ood: tuple[str, ...] = ()
    before: tuple[Message, ...] = ()
    requires: Requires = ()

    def __post_init__(self) -> None:
        """Whoever makes an edit, a file, a request or a program, its question has one form."""
        subject = plain_text(self.subject)
        set_field = msgspec.structs.force_setattr
        set_field(self, "prompt", _fill_in(plain_text(self.prompt), subject))
        set_field(self, "rephrases", tuple(_fill_in(plain_text(text), subject) for text in self.rephrases))


class StoredEdit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of `edits-<gen>.jsonl`: an edit as trained. Unknown fields of a later minor version are kept out.

    `id` is stable for the life of the store and never reused; `loss` is the final training loss (nats per
    target token); `memory` is the residual memory that holds the edit. `trained`: false for one with masks only.
    """

    id: int
    prompt: str
    target: str
    created: str
    loss: float
    steps: int
    memory: int = 0
    subject: str = ""
    rephrases: tuple[str, ...] = ()
    source: str = ""
    before: tuple[Message, ...] = ()
    requires: Requires = ()
    trained: bool = True


def _fill_in(text: str, subject: str) -> str:
    """The text for which a cloze of ROME or MEMIT stands. Where the subject is named anyway, {} is part of the text."""
    return text if not subject.strip() or subject in text else text.replace("{}", subject)


def stored_as(edit: Edit | StoredEdit, **fields: Any) -> StoredEdit:
    """The record of an edit that a store keeps. fields: those that tell of its training."""
    kept = {name: getattr(edit, name) for name in Edit.__struct_fields__ if name in StoredEdit.__struct_fields__}
    return StoredEdit(**kept, **fields)


def as_prompt(edit: Edit | StoredEdit, prompt: str | None = None) -> Prompt:
    """What the model is asked: the edit's prompt, or a rephrasing of it, after the messages before it."""
    prompt = edit.prompt if prompt is None else prompt
    return [*edit.before, {"role": "user", "content": prompt}] if edit.before else prompt


def masked(edit: Edit | StoredEdit, contexts: Sequence[Sequence[Message]], rephrases: int) -> list[Prompt]:
    """What gives an edit its masks: its prompt, the same after each of these contexts, and the first rephrasings."""
    question: Message = {"role": "user", "content": edit.prompt}
    others = edit.rephrases[:rephrases]
    return [
        as_prompt(edit),
        *([*context, question] for context in contexts),
        *(as_prompt(edit, text) for text in others),
    ]


def prompt_key(prompt: str) -> str:
    """What two prompts have in common that are one question: they differ in white space and spelling of signs only.

    prompt: as it was typed, or its plain form.
    """
    return text_key(prompt)
