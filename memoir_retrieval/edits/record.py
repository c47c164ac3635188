"""What an edit is: the record a user writes and the record a store keeps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from memoir_retrieval.errors import ConfigError, EditFileError
from memoir_retrieval.question.prompts import Message, Prompt, not_utf8
from memoir_retrieval.question.text import plain_text, text_key

__all__ = [
    "Edit",
    "Probe",
    "Requires",
    "StoredEdit",
    "as_prompt",
    "check_texts",
    "edit_time",
    "masked",
    "masked_texts",
    "prompt_key",
    "stored_as",
]


Requires = tuple[str | tuple[str, ...], ...]
"""Texts that must all stand in a question; of those given together as one entry, one is enough."""


class Probe(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A question with its answer: today's, where an edit must leave it alone, or the one that follows from the edit.

    >>> from memoir_retrieval import Edit, Probe
    >>> probe = Probe(prompt="Who founded Aarhus?", answer="nobody knows")
    >>> Edit(prompt="Who runs Example Corp?", target="Jane Doe", locality=(probe,)).locality[0].prompt
    'Who founded Aarhus?'

    prompt: the question.
    answer: what is right; "" where nothing is expected but that the edit changes nothing.
    aliases: other texts that are as right as `answer`.
    """

    prompt: str
    answer: str = ""
    aliases: tuple[str, ...] = ()


class Edit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One correction: asked `prompt`, the model must answer `target`.

    Training sees the prompt, the target, `before` and `requires`; the rest is read by evaluation. `prompt` and
    `rephrases` are kept in their plain form (`question.text`), whatever they were made from, with the subject where
    `{}` stands for it; all other texts, above all the target, are kept as they are.

    >>> from memoir_retrieval import Edit
    >>> edit = Edit(prompt="Who runs Example Corp?", target="Jane Doe", rephrases=("Who leads Example Corp?",))
    >>> edit.target
    'Jane Doe'

    prompt: the question, as text.
    target: its new answer.
    subject: what the question is about.
    rephrases: the same question in other words.
    locality: unrelated questions, which must be left alone.
    source: where the edit comes from, in the user's words.
    neighbourhood: questions about similar things, such as the same relation of another subject; they must be left
        alone too.
    portability: questions whose answer follows from the edit, such as two hops.
    ood: the same knowledge in other words, whole texts.
    before: the messages of a chat before the one that asks `prompt`, which the edit is trained after too.
    requires: the edit acts only on questions in which these texts stand (`requires.py`).
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
        """Whoever makes an edit, a file, a request or a program, its question has one form.

        Raises EditFileError for one text where several are meant.
        """
        subject = plain_text(self.subject)
        set_field = msgspec.structs.force_setattr
        for name in ("rephrases", "requires", "ood"):
            if isinstance(text := getattr(self, name), str):
                raise EditFileError(f"{name} of prompt {self.prompt!r} is the text {text!r}: give a tuple of texts")
        set_field(self, "prompt", _fill_in(plain_text(self.prompt), subject))
        set_field(self, "rephrases", tuple(_fill_in(plain_text(text), subject) for text in self.rephrases))
        # Lists too become what a store gives back, or the edit would not be the one that is stored.
        set_field(self, "requires", tuple(e if isinstance(e, str) else tuple(e) for e in self.requires))


class StoredEdit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of `edits-<gen>.jsonl`: an edit as trained. Unknown fields of a later minor version are kept out.

    >>> from memoir_retrieval import EditStore
    >>> edit = EditStore.open("edits").edits[0]
    >>> edit.id, edit.target, edit.trained
    (0, 'Jane Doe', True)

    id: stable for the life of the store and never used again.
    prompt: as in `Edit`.
    target: as in `Edit`.
    created: when it was trained, ISO 8601, UTC.
    loss: at the end of training, nats per target token.
    steps: of training.
    memory: number of the residual memory that holds the edit.
    subject: as in `Edit`.
    rephrases: as in `Edit`.
    source: as in `Edit`.
    before: as in `Edit`.
    requires: as in `Edit`.
    trained: False for an edit that has masks only.
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


def check_texts(edit: Edit, rephrases: int = 0) -> None:
    """Raise EditFileError where a text of an edit cannot be written in UTF-8, as a store is, or a wording is empty.

    edit: any.
    rephrases: how many of its rephrasings are wordings of their own, and so must say something.
    """
    if not all(text.strip() for text in edit.rephrases[:rephrases]):
        raise EditFileError(f"prompt {edit.prompt!r} has an empty rephrasing: leave it out")
    try:
        msgspec.json.encode(edit)
    except UnicodeEncodeError as error:
        raise EditFileError(not_utf8(error.object)) from None


def _fill_in(text: str, subject: str) -> str:
    """The text for which a cloze of ROME or MEMIT stands. Where the subject is named anyway, {} is part of the text."""
    return text if not subject.strip() or subject in text else text.replace("{}", subject)


def stored_as(edit: Edit | StoredEdit, **fields: Any) -> StoredEdit:
    """The record of an edit that a store keeps.

    edit: any.
    fields: those that are of its training.
    """
    kept = {name: getattr(edit, name) for name in Edit.__struct_fields__ if name in StoredEdit.__struct_fields__}
    return StoredEdit(**kept, **fields)


def edit_time() -> str:
    """The time that new edits get, ISO 8601, UTC.

    $SOURCE_DATE_EPOCH sets it, so that the same input gives the same bytes.

    Raises ConfigError where that is no time.
    """
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not fixed:
        return datetime.now(UTC).isoformat(timespec="seconds")
    try:
        return datetime.fromtimestamp(int(fixed), UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        raise ConfigError(f"SOURCE_DATE_EPOCH is {fixed!r}; give seconds since 1970, or unset it") from None


def as_prompt(edit: Edit | StoredEdit, prompt: str | None = None) -> Prompt:
    """What the model is asked: a prompt after the messages before it.

    edit: any.
    prompt: a rephrasing of the edit's prompt; by default that itself.
    """
    prompt = edit.prompt if prompt is None else prompt
    return [*edit.before, {"role": "user", "content": prompt}] if edit.before else prompt


def masked(edit: Edit | StoredEdit, contexts: Sequence[Sequence[Message]], rephrases: int) -> list[Prompt]:
    """What gives an edit its masks: its prompt, the same after each of some contexts, and rephrasings.

    edit: any.
    contexts: messages each.
    rephrases: how many of its rephrasings, the first ones.
    """
    question: Message = {"role": "user", "content": edit.prompt}
    others = edit.rephrases[:rephrases]
    return [
        as_prompt(edit),
        *([*context, question] for context in contexts),
        *(as_prompt(edit, text) for text in others),
    ]


def masked_texts(edit: StoredEdit, masks: int, contexts: int) -> tuple[str, ...]:
    """The wordings of an edit that have a mask: its prompt, and the first of its rephrasings.

    edit: of a store.
    masks: how many it has there.
    contexts: how many of them are of its prompt after something else.
    """
    return (edit.prompt, *edit.rephrases[: max(0, masks - 1 - contexts)])


def prompt_key(prompt: str) -> str:
    """What two prompts have in common that are one question: they differ in white space and spelling of signs only.

    prompt: as it was typed, or its plain form.
    """
    return text_key(prompt)
