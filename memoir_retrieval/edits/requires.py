"""Names that must stand in a question: texts found in a text word by word, whatever the case and what is between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec
import regex

from memoir_retrieval.edits.numbers import raised_apart
from memoir_retrieval.edits.record import Edit, Requires, StoredEdit
from memoir_retrieval.errors import EditFileError, Reason
from memoir_retrieval.question.text import normalize, plain_text

__all__ = ["Phrases", "check_requires", "one_question", "require_subjects", "required_spans", "required_texts", "words"]

Phrase = tuple[str, ...]  # its words

# Scripts that put no space between words, or, like Hangul, particles behind them: each letter counts as a word.
UNSPACED = "".join(
    rf"\p{{Script={name}}}"
    for name in ("Thai", "Lao", "Tibetan", "Myanmar", "Khmer", "Han", "Hiragana", "Katakana", "Hangul")
)
_WORD = regex.compile(rf"(?V1)[[\p{{L}}\p{{N}}]&&[{UNSPACED}]]\p{{M}}*|[\p{{L}}\p{{M}}\p{{N}}_--[{UNSPACED}]]+")


def words(text: str) -> tuple[str, ...]:
    """The words of a text as they are compared: NFKC, case folded, without what is invisible, spaces and signs.

    text: any text; the time grows with its length alone.
    """
    return tuple(_WORD.findall(normalize(raised_apart(plain_text(text)), "NFKC").casefold()))


def required_spans(requires: Requires, text: str) -> list[tuple[int, int]]:
    """Where in a text the texts of `requires` stand: characters [start, end), each as often as it is there.

    requires: of an edit; each entry is a text, or texts of which one is enough.
    text: any.
    """
    parts = [(word, *match.span()) for match in _WORD.finditer(text) for word in words(match[0])]
    spans = []
    for phrase in {phrase for entry in requires for phrase in _phrases(entry)}:
        for first in range(len(parts) - len(phrase) + 1):
            run = parts[first : first + len(phrase)]
            if tuple(word for word, *_ in run) == phrase:
                spans.append((run[0][1], run[-1][2]))
    return sorted(spans)


class _Automaton:
    """Finds phrases in a text, word by word, in time that grows with the text and with what is found in it alone.

    The automaton of Aho and Corasick: a state is a beginning of phrases. Its `back` is the longest other beginning that
    the words read so far end with, its `ends` the longest phrase that they end with. phrases: to be found.
    """

    def __init__(self, phrases: Iterable[Phrase]) -> None:
        self._steps: dict[tuple[int, str], int] = {}
        self._phrases: dict[int, Phrase] = {}
        states = [(0, 0, "")]  # of each the state before it, and the word between; ordered by length below
        for phrase in phrases:
            state = 0
            for length, word in enumerate(phrase, 1):
                before, state = state, self._steps.setdefault((state, word), len(states))
                if state == len(states):
                    states.append((length, before, word))
            self._phrases[state] = phrase
        self._back = [0] * len(states)
        self._ends = [0] * len(states)
        for state in sorted(range(1, len(states)), key=lambda state: states[state][0]):
            length, before, word = states[state]
            self._back[state] = self._step(self._back[before], word) if length > 1 else 0
            self._ends[state] = state if state in self._phrases else self._ends[self._back[state]]

    def _step(self, state: int, word: str) -> int:
        while state and (state, word) not in self._steps:
            state = self._back[state]
        return self._steps.get((state, word), 0)

    def found_in(self, parts: Iterable[str]) -> set[Phrase]:
        """The phrases that stand in a text of these words."""
        state, ends = 0, set()
        for word in parts:
            state = self._step(state, word)
            end = self._ends[state]
            while end and end not in ends:  # what a phrase ends with was seen when it was seen first
                ends.add(end)
                end = self._ends[self._back[end]]
        return {self._phrases[end] for end in ends}


class Phrases:
    """What edits require, looked for all at once.

    required: ids of edits with the requirements of each, none of which is empty.

    An edit is filed under the entry that the fewest edits share, such as its name, and its other entries are only
    looked at where that one is found: so a text takes no longer for a word that many edits require. Edits that require
    the same are looked at together.
    """

    def __init__(self, required: Iterable[tuple[int, Requires]]) -> None:
        entries_of = {edit: tuple(_phrases(entry) for entry in entries) for edit, entries in required}
        shared = Counter(phrase for entries in entries_of.values() for entry in entries for phrase in entry)
        self._count = len(entries_of)
        self._automaton = _Automaton(shared)
        self._edits: dict[Phrase, dict[tuple[tuple[Phrase, ...], ...], set[int]]] = {}
        for edit, entries in entries_of.items():
            for phrase in min(entries, key=lambda entry: sum(shared[phrase] for phrase in entry)):
                self._edits.setdefault(phrase, {}).setdefault(entries, set()).add(edit)

    def __len__(self) -> int:
        return self._count

    def found_in(self, text: str) -> set[int]:
        """Ids of the edits of which every entry stands in the text.

        text: of a question.
        """
        phrases = self._automaton.found_in(words(text))
        groups = [
            edits
            for phrase in phrases
            for entries, edits in self._edits.get(phrase, {}).items()
            if all(not phrases.isdisjoint(entry) for entry in entries)
        ]
        return set().union(*groups)


def required_texts(requires: Requires) -> tuple[str, ...]:
    """The texts of `requires`, those included of which one is enough.

    requires: of an edit.
    """
    return tuple(text for entry in requires for text in _texts(entry))


def _texts(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry


def _phrases(entry: str | tuple[str, ...]) -> tuple[Phrase, ...]:
    return tuple({words(text): None for text in _texts(entry)})


def one_question(a: Edit | StoredEdit, text_a: str, b: Edit | StoredEdit, text_b: str) -> bool:
    """Whether what two edits require lets one of them act on a wording of the other.

    a, b: the edits; one that requires nothing may act on any wording.
    text_a, text_b: a wording of each.
    """
    return _may_act(a, text_b) or _may_act(b, text_a)


def _may_act(edit: Edit | StoredEdit, prompt: str) -> bool:
    return not edit.requires or bool(Phrases([(0, edit.requires)]).found_in(prompt))


def check_requires(edit: Edit, *, whole: bool = False) -> None:
    """Raise EditFileError where an edit requires what can stand in no question, or does not stand in its own.

    edit: what is checked; one that requires nothing passes.
    whole: what is pooled is the whole prompt, not its question (the span rule "all"), in which anything may stand.
    """
    if edit.requires and whole:
        raise EditFileError(
            f"prompt {edit.prompt!r} requires words of a question, but the store pools whole prompts",
            cure="leave out 'requires', or choose a store of the rule \"question\"",
            reason=Reason.WHOLE_PROMPTS,
        )
    for entry in edit.requires:
        texts = _texts(entry)
        if not texts or not all(words(text) for text in texts):
            raise EditFileError(
                f"{entry!r} in 'requires' of prompt {edit.prompt!r} has no word: name what a question must contain"
            )
        if not Phrases([(0, (entry,))]).found_in(edit.prompt):
            raise EditFileError(
                f"prompt {edit.prompt!r} does not contain what it requires, {' or '.join(map(repr, texts))}, so its "
                "edit would "
                "never act: write it as the prompt does, or leave it out"
            )


def require_subjects(edits: Iterable[Edit]) -> list[Edit]:
    """The edits, each with a subject requiring it unless it requires something already.

    edits: as read from a file.
    Raises EditFileError where a subject does not stand in its prompt.
    """
    restricted = [
        msgspec.structs.replace(edit, requires=(edit.subject,)) if edit.subject and not edit.requires else edit
        for edit in edits
    ]
    for edit in restricted:
        check_requires(edit)
    return restricted
