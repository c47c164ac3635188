"""Names that must stand in a question: texts found in a text word by word, whatever the case and what is between."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

import msgspec

from memoir_retrieval.edit import Edit, Requires, StoredEdit
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
    """What edits require, looked for all at once. required: by the id of each edit."""

    def __init__(self, required: Iterable[tuple[int, Requires]]) -> None:
        self._entries: dict[tuple[str, ...], list[tuple[int, int]]] = {}
        self._needed: dict[int, int] = {}
        for edit, entries in required:
            self._needed[edit] = len(entries)
            for entry, texts in enumerate(map(_texts, entries)):
                for text in texts:
                    self._entries.setdefault(words(text), []).append((edit, entry))
        self._lengths = sorted({len(phrase) for phrase in self._entries})

    def __len__(self) -> int:
        return len(self._needed)

    def found_in(self, text: str) -> set[int]:
        """The edits of which every entry stands in the text."""
        there, found = words(text), set[tuple[int, int]]()
        for n in self._lengths:
            for at in range(len(there) - n + 1):
                found.update(self._entries.get(there[at : at + n], ()))
        return {edit for edit, n in Counter(edit for edit, _ in found).items() if n == self._needed[edit]}


def _texts(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry


def one_question(a: Edit | StoredEdit, b: Edit | StoredEdit) -> bool:
    """Whether what two edits require lets one of them act on the other's prompt."""
    return _may_act(a, b.prompt) or _may_act(b, a.prompt)


def _may_act(edit: Edit | StoredEdit, prompt: str) -> bool:
    return not edit.requires or bool(Phrases([(0, edit.requires)]).found_in(prompt))


def check_requires(edit: Edit) -> None:
    """Raise EditFileError where an edit requires what can stand in no question, or does not stand in its own."""
    for entry in edit.requires:
        texts = _texts(entry)
        if not texts or not all(words(text) for text in texts):
            raise EditFileError(
                f"{entry!r} in 'requires' of prompt {edit.prompt!r} has no word: name what a question must have"
            )
        if not Phrases([(0, (entry,))]).found_in(edit.prompt):
            raise EditFileError(
                f"prompt {edit.prompt!r} has not what it requires, {' or '.join(map(repr, texts))}, so its edit would "
                "never act: write it as the prompt does, or leave it out"
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
