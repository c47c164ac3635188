"""The question span: which tokens of a prompt are pooled, and from which one on the residual acts.

A chat prompt is mostly template, system prompt and earlier turns. The fingerprint must only see the question, so
that an edit is found again whatever surrounds it. The span is found from token ids alone, by the markers that the
chat template itself puts around the last user message: the editor, the Hugging Face path and the vLLM worker (which
sees nothing but token ids) run this same function.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from memoir_retrieval.errors import ConfigError
from memoir_retrieval.question.thinking import prompt_ends

__all__ = ["ActingToken", "ChatSpanRule", "Span", "SpanRule", "derive_span_rule", "find_span"]

ActingToken = Literal["first token of the question", "last token of the question", "last token before the answer"]
"""From which token on the residual acts, in words."""


class Span(NamedTuple):
    """Tokens `[start, end)` of a prompt, which are pooled.

    start, end: positions in the prompt, from 0 on; equal where there is no question.
    weighted: each token counts by the squared norm of its activation, which is large for what is rare, such as names,
    and small for the words that questions share. Else every token counts once.
    acts: whether the residual acts from the first of these tokens on, or from the last; and then on every later one.
    behind: by how many tokens later it begins to act: those of the template that are alike behind all questions.
    """

    start: int
    end: int
    weighted: bool = False
    acts: Literal["first", "last"] = "first"
    behind: int = 0

    def moved(self, by: int) -> Span:
        """The same tokens where so many stand before the first one.

        by: number of tokens put in front; negative for tokens taken away.
        """
        return self._replace(start=self.start + by, end=self.end + by)

    @property
    def decided_from(self) -> int:
        """The position of the first token that must pass the layer for the question to be decided."""
        return self.start if self.acts == "first" else max(self.start, self.end - 1)

    @property
    def acts_from(self) -> int:
        """The position from which on the residual acts, if an edit matches."""
        return self.decided_from + self.behind

    @property
    def lead(self) -> Span:
        """The tokens that lead from the question to the answer, the acting one the last; none where none are spared."""
        return self._replace(start=self.end, end=self.end + self.behind)


class SpanRule(msgspec.Struct, frozen=True, kw_only=True):
    """How the span is found. Stored with the edits, so that serving cannot use another rule.

    rule: "question" pools the last user message, or the whole prompt where no marker is found (raw text); "all" pools
    every token, as the paper does.
    starts: token sequences that end right before a user message.
    newlines: tokens that may stand between a start marker and the message.
    end: the token sequence that follows the message.
    leading: special tokens (BOS) at the front of a raw prompt, which are not part of the question.
    weighted, acts: see `Span`.
    behind: see `Span`. Fewer tokens where fewer stand behind a question.
    tools: token sequences that, right behind a start marker, say that the turn is a tool's.
    candidates: whether parts of the message are looked up too, see `find_candidates`.
    """

    rule: Literal["question", "all"] = "question"
    starts: tuple[tuple[int, ...], ...] = ()
    newlines: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    leading: tuple[int, ...] = ()
    weighted: bool = False
    acts: Literal["first", "last"] = "first"
    behind: int = 0
    tools: tuple[tuple[int, ...], ...] = ()
    candidates: bool = False

    @property
    def acting_token(self) -> ActingToken:
        """From which token on the edits of a store act; of raw text the last of the question ends the prompt, too."""
        if self.acts == "first":
            return "first token of the question"
        return "last token before the answer" if self.behind else "last token of the question"


class ChatSpanRule(SpanRule, frozen=True, kw_only=True):
    """The rule under which a server finds the span where edits were made in chats: raw text has no question.

    An edit that was trained in a chat would be found by raw text, but its answer is only right in a chat.
    """


def find_span(ids: Sequence[int], rule: SpanRule) -> Span:
    """The span of one prompt.

    ids: token ids of the whole prompt.
    rule: as the store keeps it.
    An empty span (`start == end`) means that there is no question to look up, such as a chat whose last user message is
    empty.
    """
    n = len(ids)
    if rule.rule == "all":
        return Span(0, n, rule.weighted, rule.acts)
    tokens = np.asarray(ids, dtype=np.int32)
    turns = sorted(end for marker in rule.starts for end in _ends(tokens, marker))
    if not turns:
        if isinstance(rule, ChatSpanRule) and rule.starts:
            return Span(n, n, rule.weighted, rule.acts)
        start = 0
        while start < n and ids[start] in rule.leading:
            start += 1
        return Span(start, n, rule.weighted, rule.acts)
    starts = [turn + (turn < n and ids[turn] in rule.newlines) for turn in turns]
    of_users = (start for start in reversed(starts) if not _is_tool(ids, start, rule))
    start = next(of_users, starts[-1])
    end = _find_first(tokens, rule.end, start) if rule.end else -1
    end = end if end >= 0 else n
    return Span(start, end, rule.weighted, rule.acts, min(rule.behind, n - end))


def _matches(tokens: np.ndarray, marker: Sequence[int]) -> np.ndarray:
    """Positions at which the marker begins, ascending."""
    m = len(marker)
    if not m or len(tokens) < m:
        return np.empty(0, dtype=np.int64)
    hit = tokens[: len(tokens) - m + 1] == marker[0]
    for offset in range(1, m):
        hit &= tokens[offset : len(tokens) - m + 1 + offset] == marker[offset]
    return np.flatnonzero(hit)


def _ends(tokens: np.ndarray, marker: Sequence[int]) -> list[int]:
    """The positions right after each occurrence."""
    ends: list[int] = (_matches(tokens, marker) + len(marker)).tolist()
    return ends


def _is_tool(ids: Sequence[int], start: int, rule: SpanRule) -> bool:
    """Whether the turn that begins here brings what a tool has answered."""
    return any(tuple(ids[start : start + len(mark)]) == mark for mark in rule.tools)


def _find_first(tokens: np.ndarray, marker: Sequence[int], start: int) -> int:
    """The position of the first occurrence at or after `start`, or -1."""
    positions = _matches(tokens[start:], marker)
    return int(positions[0]) + start if len(positions) else -1


def derive_span_rule(tokenizer: Any, rule: Literal["question", "all"] = "question", *, chat: bool = True) -> SpanRule:
    """Read the markers out of a Hugging Face tokenizer's chat template.

    The template is rendered with placeholder messages in four settings (question only, after a system prompt, as
    a later turn, with tools); what always stands right before the question is a start marker, what follows it the end
    marker. Where the template puts what a tool answers into a user's turn, what it writes before it is the mark of a
    tool. A tokenizer without a template gives a rule that takes every prompt as raw text. The residual acts from the
    token before the answer on, so that nothing before it depends on what was decided; under "all" on every token. (Raw
    stores are made to act from the first, see `editing.open_store`.)
    tokenizer: of transformers.
    rule: what is pooled, see `SpanRule`.
    chat: whether the questions will stand in chats.
    Raises ConfigError where they will, and the markers do not lead back to a question in one.
    """
    specials = set(tokenizer.all_special_ids)
    leading = tuple(t for t in tokenizer("").input_ids if t in specials)
    if rule == "all" or not getattr(tokenizer, "chat_template", None):
        question = rule == "question"
        return SpanRule(rule=rule, leading=leading, weighted=question, acts="last" if question else "first")
    settings = [[_rendered(tokenizer, messages) for messages in setting] for setting in _SETTINGS]
    known = [[rendered for rendered in setting if rendered] for setting in settings]
    chats = [setting for setting in known if setting]
    with_tools = [rendered for tools in _TOOLS if (rendered := _rendered(tokenizer, [], tools=tools))]
    before = [_common_suffix([rendered.head for rendered in setting]) for setting in chats]
    after = chats[-1][0].tail if chats else []
    tokens = {token for rendered in (*chain.from_iterable(chats), *with_tools) for token in rendered.ids}
    # Tokens that were added for themselves, such as roles, may not be named as special; runs of spaces are added, too.
    added = tokens & set(getattr(tokenizer, "added_tokens_decoder", ()))
    marks = specials | {token for token in added if not _is_space(tokenizer, token)}
    starts = {tuple(_core(tokenizer, head, after, specials, marks)) for head in before}
    if with_tools:
        core = _core(tokenizer, _common_suffix([rendered.head for rendered in with_tools]), after, specials, marks)
        if not marks.isdisjoint(core):  # else it is how the description of a tool ends
            starts.add(tuple(core))
    rule_of_turns = SpanRule(
        rule=rule,
        starts=tuple(sorted(s for s in starts if s)),
        newlines=tuple(sorted({t for head in before for t in head[-1:] if _is_space(tokenizer, t)})),
        end=tuple(_end_marker(tokenizer, after, marks)),
        leading=leading,
        weighted=True,
        acts="last",
        behind=len(after),
    )
    for rendered in chain.from_iterable(chats if chat else ()):
        span = find_span(rendered.ids, rule_of_turns)
        if not span.start <= rendered.start < rendered.end <= span.end:
            raise ConfigError(
                "the chat template has no mark that tells a user's message from the others, so no question is found "
                "in a chat: ask without the template (--no-chat), or pool whole prompts (--span all)"
            )
    mark = _tool_mark(tokenizer, rule_of_turns)
    return msgspec.structs.replace(rule_of_turns, tools=(mark,)) if mark else rule_of_turns


_QUESTIONS = ("Which river is it?", "Who painted that door?")
# For each setting two contexts that differ, so that only the template's own tokens are common to both.
_SETTINGS: tuple[tuple[list[dict[str, str]], ...], ...] = (
    ([],),
    ([{"role": "system", "content": "Be brief."}], [{"role": "system", "content": "Answer as a pirate would"}]),
    (
        [{"role": "user", "content": "Hello there."}, {"role": "assistant", "content": "Good day."}],
        [{"role": "user", "content": "Is it late?"}, {"role": "assistant", "content": "Not yet, it is noon"}],
    ),
)


def _tool(name: str, **parameters: Any) -> dict[str, Any]:
    properties = {"type": "object", "properties": {}, **parameters}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": properties}}


_TOOLS = ([_tool("look_up")], [_tool("measure", properties={"of": {"type": "string"}}, required=["of"])])


class _Rendered(NamedTuple):
    """A chat as a template renders it.

    ids: its tokens.
    start, end: the first of them that differs from those of another question, and that behind the question.
    """

    ids: list[int]
    start: int
    end: int

    @property
    def head(self) -> list[int]:
        """What stands before the question."""
        return self.ids[: self.start]

    @property
    def tail(self) -> list[int]:
        """What stands behind it."""
        return self.ids[self.end :]


def _rendered(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> _Rendered | None:
    """A question behind some messages, or None where the template refuses them."""
    try:
        a, b = (
            list(
                tokenizer.apply_chat_template(
                    [*messages, {"role": "user", "content": q}],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    **options,
                )["input_ids"]
            )
            for q in _QUESTIONS
        )
    except Exception:  # templates raise their own errors, e.g. for a system message they do not know
        return None
    head = 0
    while a[head] == b[head]:
        head += 1
    tail = 0
    while a[-1 - tail] == b[-1 - tail]:
        tail += 1
    # Both questions end in "?", which belongs to the question, not to the marker.
    question_end = tokenizer("?", add_special_tokens=False).input_ids
    end = len(a) - tail
    if a[end : end + len(question_end)] == question_end:
        end += len(question_end)
    return _Rendered(a, head, end)


_CALL = {"type": "function", "id": "call00001", "function": {"name": "look_up", "arguments": {}}}
_TOOL_TURN: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "Which river is it?"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "name": "look_up", "tool_call_id": "call00001"},
)


def _tool_mark(tokenizer: Any, rule: SpanRule) -> tuple[int, ...]:
    """What the template writes between a user's marker and what a tool answers; nothing where tools have turns of their
    own, or their answers no mark."""
    try:
        a, b = (
            tokenizer.apply_chat_template(
                [*_TOOL_TURN[:-1], {**_TOOL_TURN[-1], "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
            )["input_ids"]
            for content in ("Elbe", "12 metres")
        )
    except Exception:  # templates raise their own errors, e.g. for a role they do not know
        return ()
    head = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if head is None:
        return ()  # the template leaves out what tools answer
    tokens = np.asarray(a[:head], dtype=np.int32)
    turns = sorted(end for marker in rule.starts for end in _ends(tokens, marker))
    if not turns:
        return ()
    mark = a[turns[-1] + (turns[-1] < head and a[turns[-1]] in rule.newlines) : head]
    if _TOOL_TURN[0]["content"] in tokenizer.decode(mark):
        return ()  # the last turn of a user is the question: tools have their own
    while mark and _is_space(tokenizer, mark[-1]):
        mark = mark[:-1]
    return tuple(mark)


def _common_suffix(heads: list[list[int]]) -> list[int]:
    shortest = min(len(h) for h in heads)
    n = 0
    while n < shortest and len({h[-1 - n] for h in heads}) == 1:
        n += 1
    return heads[0][len(heads[0]) - n :]


def _core(tokenizer: Any, head: list[int], after: list[int], specials: set[int], marks: set[int]) -> list[int]:
    """The marker without the white space that may melt into the message, from its last special token on.

    Where none is special it begins with the first mark. What begins an answer, too, is no marker of a user: then it
    begins with an earlier mark.
    """
    end = len(head)
    while end and _is_space(tokenizer, head[end - 1]):
        end -= 1
    begins = [i for i in range(end) if head[i] in marks]
    start = next((i for i in reversed(begins) if head[i] in specials), begins[0] if begins else 0)
    tail = np.asarray(after, dtype=np.int32)
    while start and len(_matches(tail, head[start:end])):
        start = max((i for i in begins if i < start), default=0)
    return head[start:end]


def _end_marker(tokenizer: Any, after: list[int], marks: set[int]) -> list[int]:
    """What follows a question, up to its first mark: enough to find it. Without any it is what all ends of a prompt
    have in common, as a request may switch thinking on and off."""
    for i, token in enumerate(after):
        if token in marks:
            return after[: i + 1]
    ends = [_rendered(tokenizer, [], **end.options) for end in prompt_ends(tokenizer)[1:]]
    common = _common_suffix([after[::-1], *(end.tail[::-1] for end in ends if end)])[::-1]
    return after if all(_is_space(tokenizer, token) for token in common) else common


def _is_space(tokenizer: Any, token: int) -> bool:
    return not tokenizer.decode([token], skip_special_tokens=False).strip()
