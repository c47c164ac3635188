"""Names that must stand in a question: texts found in a text word by word, whatever the case and what is between."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

import msgspec

from memoir_retrieval.edit import Edit, StoredEdit
from memoir_retrieval.errors import EditFileError

__all__ = ["Phrases", "check_requires", "one_question", "require_subjects", "words"]

# Scripts that put no space between words, or, like Hangul, particles behind them: each character counts as a word.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def words(text: str) -> tuple[str, ...]:
    """The words of a text as they are compared: NFKC, case folded, without what stands between them."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


class Phrases:
    """Texts that are looked for all at once, each with the id of the edit that requires it."""

    def __init__(self, texts: Iterable[tuple[int, str]]) -> None:
        self._ids: dict[tuple[str, ...], list[int]] = {}
        for edit, text in texts:
            self._ids.setdefault(words(text), []).append(edit)
        self._lengths = sorted({len(phrase) for phrase in self._ids})

    def __len__(self) -> int:
        return len(self._ids)

    def found_in(self, text: str) -> set[int]:
        """The edits that require what stands in the text."""
        there, found = words(text), set[int]()
        for n in self._lengths:
            for at in range(len(there) - n + 1):
                found.update(self._ids.get(there[at : at + n], ()))
        return found


def one_question(a: Edit | StoredEdit, b: Edit | StoredEdit) -> bool:
    """Whether what two edits require lets one of them act on the other's prompt."""
    return _may_act(a, b.prompt) or _may_act(b, a.prompt)


def _may_act(edit: Edit | StoredEdit, prompt: str) -> bool:
    return not edit.requires or bool(Phrases((0, text) for text in edit.requires).found_in(prompt))


def check_requires(edit: Edit) -> None:
    """Raise EditFileError where an edit requires what can stand in no question, or does not stand in its own."""
    for text in edit.requires:
        if not words(text):
            raise EditFileError(
                f"{text!r} in 'requires' of prompt {edit.prompt!r} has no word: name what a question must have"
            )
    if not _may_act(edit, edit.prompt):
        raise EditFileError(
            f"prompt {edit.prompt!r} has none of what it requires, {', '.join(map(repr, edit.requires))}, so its edit "
            "would never act: write it as the prompt does, or leave it out"
        )


def require_subjects(edits: Iterable[Edit]) -> list[Edit]:
    """The edits, each with a subject requiring it unless it requires something already.

    Raises EditFileError where a subject does not stand in its prompt.
    """
    bound = [
        msgspec.structs.replace(edit, requires=(edit.subject,)) if edit.subject and not edit.requires else edit
        for edit in edits
    ]
    for edit in bound:
        check_requires(edit)
    return bound
