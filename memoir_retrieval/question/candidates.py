"""Candidate spans: the parts of a user message of which each may be the question that an edit was made for.

People put a question behind a time stamp, into an e-mail, after passages or in quotes. The message as a whole then
looks like nothing stored, while the question's own tokens still do. So the lookup pools a few parts of the message as
well, and the best match of all of them decides. The parts are found from token ids alone, so that the editor, the
Hugging Face path and the vLLM worker agree.

There are at most `MOST` of them, whatever the message: the first and the last of each kind. The time is linear in the
length of the message.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import regex

from memoir_retrieval.question.span import Span, SpanRule, find_span

__all__ = ["MOST", "CandidateSpan", "Kind", "Pieces", "find_candidates"]

MOST = 16
"""Candidates of a message, the message itself included."""
LEAST = 3
"""Tokens of a candidate, other than the message itself: fewer say nothing of a question."""
LONGEST_QUOTE = 2000
"""Characters between two quotes that belong together."""

Kind = Literal["message", "quote", "label", "sentence", "opening", "line", "paragraph"]
"""message: all of it. quote: what stands in quotes, a tag or emphasis. label: what stands behind "Question:", a dash, a
list mark, a mention, a command, brackets, a tab, several spaces or the line between two cells. opening: the end of a
sentence, from a word on with which a question may begin. sentence, line, paragraph: as they are."""


class CandidateSpan(NamedTuple):
    """A part of a message.

    span: its tokens.
    kind: what makes it a part.
    """

    span: Span
    kind: Kind


class Pieces:
    """The text of single tokens, remembered, so that a message's text and its tokens can be laid side by side.

    decode: the text of token ids. Safe to use from several threads.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._known: dict[int, str] = {}

    def text(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """The text of the tokens, and at which of its characters each of them begins.

        ids: of the tokens.
        A character that several tokens share begins with the first of them.
        """
        parts: list[str] = []
        starts: list[int] = []
        length, token = 0, 0
        while token < len(ids):
            piece, tokens = self._piece(ids, token)
            starts += [length] * tokens
            parts.append(piece)
            length += len(piece)
            token += tokens
        return "".join(parts), starts

    def _piece(self, ids: Sequence[int], place: int) -> tuple[str, int]:
        """The text that begins with a token, and of how many tokens it is: several where they share a character."""
        token = ids[place]
        if (known := self._known.get(token)) is None:
            # Twice, since some tokenizers leave out the space before the first word.
            known = self._decode([token, token])[len(self._decode([token])) :]
            self._known[token] = known
        if _BROKEN not in known:
            return known, 1
        for tokens in range(2, _SHARED + 1):
            together = self._decode(ids[place : place + tokens])
            if _BROKEN not in together:
                return together, min(tokens, len(ids) - place)
        return known[:1], 1


_BROKEN = "\ufffd"  # what decoders write for a part of a character
_SHARED = 6  # tokens of one character, at most


def find_candidates(ids: Sequence[int], rule: SpanRule, pieces: Pieces) -> list[CandidateSpan]:
    """What is looked up of a prompt: its last user message first, then parts of it by how likely they are the question.

    ids: of the whole prompt.
    rule: how the message is found, and whether parts of it are looked up.
    pieces: of the prompt's tokenizer.

    The message alone where it is empty, or the rule looks up no parts. No two candidates have the same tokens.
    """
    span = find_span(ids, rule)
    candidates = [CandidateSpan(span, "message")]
    if not rule.candidates or span.start >= span.end:
        return candidates
    text, starts = pieces.text(ids[span.start : span.end])
    seen = {(span.start, span.end)}
    for first, last, kind in _parts(text):
        while first < last and text[first].isspace():
            first += 1
        while first < last and text[last - 1].isspace():
            last -= 1
        if first >= last:
            continue
        start = span.start + _token_at(starts, first)
        end = span.start + _token_at(starts, last - 1) + 1
        while end - span.start < len(starts) and starts[end - span.start] == starts[end - span.start - 1]:
            end += 1  # the other tokens of its last character
        if end - start >= LEAST and (start, end) not in seen:
            seen.add((start, end))
            candidates.append(CandidateSpan(span._replace(start=start, end=end), kind))
            if len(candidates) == MOST:
                break
    return candidates


def _token_at(starts: Sequence[int], character: int) -> int:
    """The first token of the character."""
    return bisect_left(starts, starts[bisect_right(starts, character) - 1])


# ---- parts of a text: characters [first, last) -----------------------------------------------------------------------

_Part = tuple[int, int]

_QUOTES = regex.compile(
    "|".join(
        [
            rf"```\w*\n([^`]{{1,{LONGEST_QUOTE}}})```",
            rf'"([^"\n]{{1,{LONGEST_QUOTE}}})"',
            rf"[\u201c\u201e]([^\u201c\u201d\u201e\n]{{1,{LONGEST_QUOTE}}})[\u201d\u201c]",
            rf"\u2018([^\u2018\n]{{1,{LONGEST_QUOTE}}}?)\u2019(?!\w)",
            rf"\u300c([^\u300c\u300d\n]{{1,{LONGEST_QUOTE}}})\u300d",
            rf"\u300e([^\u300e\u300f\n]{{1,{LONGEST_QUOTE}}})\u300f",
            rf"(?<![\w'])'([^'\n]{{1,{LONGEST_QUOTE}}}+(?:'(?=\w)[^'\n]{{1,{LONGEST_QUOTE}}}+){{0,9}}+)'(?!\w)",
            rf"(?:\u00ab\s?([^\u00ab\u00bb\n]{{1,{LONGEST_QUOTE}}})"
            rf"|\u203a\s?([^\u00ab\u00bb\u203a\n]{{1,{LONGEST_QUOTE}}}))[\u00bb\u2039]",
            rf"<\w{{1,40}}(?:\s[^<>]{{0,200}}+)?>\s*+([^<>]{{1,{LONGEST_QUOTE}}})</",
            rf"\*\*([^*\n]{{1,{LONGEST_QUOTE}}})\*\*",
            rf"`([^`\n]{{1,{LONGEST_QUOTE}}})`",
        ]
    )
)
_STOP = r"[.!?\u2026\u3002\uff01\uff1f\u061f\u06d4\u0964\u0965]"
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}]"  # between whose words no spaces stand
# A run of stops is read once, from its first one on: the time is linear where it ends no sentence.
_END = regex.compile(
    rf"(?<!{_STOP}){_STOP}++[\"'\u201d\u2019\u00bb)\]*]*+(?=\s|$)|[\u3002\uff01\uff1f]+"
    rf"|\?[\"'\u201d\u2019\u00bb)\]*]*+(?:(?=[,;<>\u2013\u2014])|(?={_UNSPACED}))"
)
_ABBREVIATED = regex.compile(
    r"(?:^|[\s(\"]|(?<!\w)')"
    r"(?:\p{Lu}|\p{L}\.\p{L}|mr|mrs|ms|dr|st|vs|no|nr|jr|sr|prof|inc|ltd|co|corp|dept|approx|vol|fig)$",
    regex.IGNORECASE,
)
_SMALL = regex.compile(r"[\s,;]*\p{Ll}")
_QUESTION = regex.compile(r"[?\uff1f\u061f][\"'\u201d\u2019\u00bb)\]*]*\s*$")
_MARK = regex.compile(
    r"\s*(?:(?:[-*+>#/\u2022\u2013]+|\(?\w{1,3}[.)]|[@/]\w{1,40}[,:]?)\s+|'{3}|\"{3}"
    r"|[\p{So}\u2460-\u24ff\u2776-\u2793\U0001f3fb-\U0001f3ff\u200d\ufe0f]++\s*+)+"
)
_LABEL = regex.compile(
    r"\s?:\s|\uff1a\s?|(?<=\p{L}):(?=\p{L})|\s[-\u2013\u2014]\s|[>\])|]\s|\t|\s{2,}|[=\u00bb\u2192]\s?|[<>]{2}\s?"
)
# How questions begin. Verbs may be names ("Will"), and small letters clauses ("the man who founded Rome").
_WH = (
    "who|whom|whose|what|when|where|which|why|how|wer|wen|wem|wessen|wann|wo|woher|wohin|welche|welcher|welches|welchen|"
    "warum|wieso|qui|que|quoi|quel|quelle|quels|quelles|quand|où|pourquoi|comment|combien|quién|quiénes|qué|cuál|cuáles|"
    "cuándo|dónde|cómo|cuánto|cuántos|cuántas|chi|che|quale|quali|quando|dove|perché|quanto|quanti|quante|quem|qual|"
    "quais|onde|wie|wat|wanneer|waar|welk|waarom|hoe|kto|kiedy|gdzie|który|która|które|jak|jaki|jaka|"
    "\u043a\u0442\u043e|\u0447\u0442\u043e|\u043a\u043e\u0433\u0434\u0430|\u0433\u0434\u0435|\u043a\u0430\u043a"
)
_PREPOSITIONS = "in|on|at|to|from|for|by|of|with|through|under|against|into|during|since|about"
_VERBS = "is|are|was|were|does|did|has|have|had"


def _capitals(words: str) -> str:
    return "|".join(word.capitalize() for word in words.split("|"))


def _beginning(prepositions: str, words: str) -> str:
    return rf"(?:(?:{prepositions})\s(?:what|which|whom|whose)|{words})"


# Behind a title's first word stands a capital, too: "Who Moved My Cheese?".
_OPENING = regex.compile(
    rf"(?:(?<!\w)|(?<={_UNSPACED})){_beginning(_capitals(_PREPOSITIONS), _capitals(_WH))}(?:['\u2019]s)?\s\p{{Ll}}"
)
_OWN = regex.compile(rf"\W*{_beginning(_PREPOSITIONS, f'{_WH}|{_VERBS}')}(?!\w)", regex.IGNORECASE)
_LINE = regex.compile(r"[^\n]+")


def _parts(text: str) -> Iterator[tuple[int, int, Kind]]:
    """Parts of a text, the likely ones first, perhaps more than once."""
    quotes = [part for quote in _QUOTES.finditer(text) for part in quote.regs[1:] if part[0] < part[1]]
    lines: list[_Part] = [line.span() for line in _LINE.finditer(text)]
    sentences = [part for line in lines for part in _sentences(text, *line)]
    # A name may have a stop or an exclamation mark in it, and hurried people begin sentences with small letters.
    longer = [part for line in lines for part in _sentences(text, *line, True)]
    asking = [part for part in dict.fromkeys((*sentences, *longer)) if _asks(text, *part)]
    asking.sort(key=lambda part: (part[1], -part[0]))
    questions = [quote for quote in quotes if _asks(text, *quote)]
    likely = [*dict.fromkeys((*_ends(questions, 1), *_ends(asking, 3), *_ends(questions, 2), *_ends(quotes, 2)))]
    for part in likely:
        for rest in _behind_labels(text, *part):
            yield *rest, "label"
        yield *part, "quote" if part in quotes else "sentence"
    for part in likely:
        if _asks(text, *part):
            for rest in _openings(text, *part):
                yield *rest, "opening"
    asking_lines = [line for line in lines if _asks(text, *line)]
    for line in _ends(asking_lines, 2):
        for rest in _behind_labels(text, *line):
            yield *rest, "label"
        yield *line, "line"
    for paragraph in _ends(_paragraphs(text, lines), 1):
        yield *paragraph, "paragraph"
    filled = [line for line in lines if not text[line[0] : line[1]].isspace()]
    for part in dict.fromkeys((*_ends(filled, 2), *_ends(sentences, 2))):
        for rest in _behind_labels(text, *part):
            yield *rest, "label"
        yield *part, "line" if part in filled else "sentence"


def _paragraphs(text: str, lines: Sequence[_Part]) -> list[_Part]:
    """Runs of lines with nothing blank between them."""
    paragraphs: list[_Part] = []
    end = -1
    for first, last in lines:
        if text[first:last].isspace():
            continue
        if first == end + 1 and paragraphs:
            paragraphs[-1] = (paragraphs[-1][0], last)
        else:
            paragraphs.append((first, last))
        end = last
    return paragraphs


def _ends(parts: Sequence[_Part], n: int) -> list[_Part]:
    """The last n and the first n, the last one first."""
    return [*parts[: -n - 1 : -1], *parts[: max(0, min(n, len(parts) - n))]]


def _asks(text: str, first: int, last: int) -> bool:
    return bool(_QUESTION.search(text, max(first, last - 20), last))


def _sentences(text: str, first: int, last: int, before_capitals: bool = False) -> Iterator[_Part]:
    """The sentences of a line; before_capitals: none ends before a small letter."""
    start = first
    for end in _END.finditer(text, first, last):
        if end[0] == "." and _ABBREVIATED.search(text, max(start, end.start() - 12), end.start()):
            continue
        if before_capitals and _SMALL.match(text, end.end(), last):
            continue
        yield start, end.end()
        start = end.end()
    if text[start:last].strip():
        yield start, last


def _behind_labels(text: str, first: int, last: int) -> Iterator[_Part]:
    """What stands behind the last label of a part, behind the first one, and behind the mark of a list."""
    labels = [label.end() for label in _LABEL.finditer(text, first, last)]
    for end in dict.fromkeys((*labels[-1:], *labels[:1])):
        yield end, last
    if mark := _MARK.match(text, first, last):
        yield mark.end(), last


def _openings(text: str, first: int, last: int) -> Iterator[_Part]:
    """What may be a question within a sentence that asks, from the last word on with which one may begin, and from the
    first: "The host just asked Who founded Rome?". None where the sentence itself begins as a question."""
    if _OWN.match(text, first, last):
        return
    begins = [word.start() for word in _OPENING.finditer(text, first, last)]
    for begin in dict.fromkeys((*begins[-1:], *begins[:1])):
        yield begin, last
