"""From the masks of questions to the edits that act on them: the nearest of those that may.

Masks may be alike for questions that differ in a name, or ask something else about the same one. So the nearest edits
are candidates, and the store's judge decides from the words of a question which of them it asks for, if any. An edit
that `requires` texts acts only on questions in which they stand. Of the edits that may act on a question the one
matches for which most speaks, so another edit in its way, however near, does not hide it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from memoir_index import Hits, hamming_radius, popcount
from memoir_retrieval.edits.judge import Verdict, judge_named, letters, letters_and_words
from memoir_retrieval.edits.record import StoredEdit, masked_texts
from memoir_retrieval.edits.requires import Phrases, required_texts
from memoir_retrieval.edits.task_words import PLACE
from memoir_retrieval.lookup.decision import JudgedPart
from memoir_retrieval.lookup.vocabulary import Vocabulary
from memoir_retrieval.question.tasks import TaskProbe
from memoir_retrieval.store.read import EditStore
from memoir_retrieval.store.threshold import CANDIDATES

__all__ = ["Candidate", "Decode", "EditLookup", "around_of", "task_probe"]

Decode = Callable[[Sequence[int]], str]
"""The text of token ids, as the tokenizer of the store's model decodes them."""

_log = logging.getLogger(__name__)

_MOST = 1 << 14  # rows that are compared at a time
_LARGE = 256  # of more rows the index finds the nearest
_SHOWN = 200  # characters of a part's text in a decision
AROUND = 2000
"""Characters before a span, and behind it, that may say that something else is asked for."""
PER_OVERLAP = 8.0
"""Nats that an overlap of 1 more weighs when several edits pass the judge."""


class Candidate(NamedTuple):
    """An edit that is near to a question.

    edit: its id.
    row: of its nearest mask, in the store.
    overlap: of the masks, in [0, 1].
    verdict: what the judge says.
    """

    edit: int
    row: int
    overlap: float
    verdict: Verdict


class _Passage(NamedTuple):
    """A part of a message, before it is judged.

    code: uint8 [D/8], its mask.
    text: of its tokens.
    rest: the text around it.
    speaks: what `TaskProbe` says of what stands around it, or None.
    nearest: edit, row and overlap of the nearest mask that reaches tau, of edits that require nothing; edit -1: none.
    edits: more of these edits, the nearest first.
    """

    code: NDArray[np.uint8]
    text: str
    rest: str
    speaks: float | None
    nearest: tuple[int, int, float]
    edits: Sequence[int]


def task_probe(store: EditStore, device: torch.device | str) -> TaskProbe | None:
    """What tells tasks in the messages of a store; None where words alone do.

    store: whose network it is.
    device: on which means come.
    """
    if len(store.tasks):
        return TaskProbe(store.tasks, device)
    if store.manifest.judge and store.manifest.span.candidates:
        _log.info(
            "store %s knows tasks, such as a translation, by words alone: `memoir calibrate %s --tasks --write` has it "
            "use the activations of %s, too",
            store.path,
            store.path,
            store.manifest.model,
        )
    return None


_FAR = Verdict(False, 0.0, 0.0, (), (), "", "mask")


class EditLookup:
    """The masks of a store, what its edits require, and the judge of their questions. Safe to use from several threads.

    index: all masks, in the order of the store's rows.
    judge: None in a store that was made without one.
    """

    def __init__(self, store: EditStore, decode: Decode) -> None:
        """Raises StoreMismatch for a store whose questions another judge decides.

        store: whose masks are searched; its memories are not kept.
        decode: the text of token ids. It is called once here, for no ids, and then for every part of a message where
            the words of it decide.
        """
        self.index = store.index()
        self.judge = judge_named(store.manifest.judge, store.path)
        if self.judge is None and store.manifest.span.rule == "question":
            _log.warning(
                "store %s was made without a judge of questions, so masks alone decide: `memoir calibrate %s --write` "
                "adds one",
                store.path,
                store.path,
            )
        self._decode = decode
        # Not the store itself: a server lets go of its memories.
        self._edits, self._edit_of, self._contexts = store.edits, store.ids, len(store.manifest.masked_contexts)
        self._prompts = lru_cache(maxsize=1 << 14)(self._wordings)
        bound, numbers = [], np.empty(len(store.edits), np.int64)
        for place, edit in enumerate(store.edits):
            numbers[place] = edit.id
            if edit.requires:
                bound.append(edit)
        self._place = np.argsort(numbers)
        self._numbers = numbers[self._place]
        self._phrases = Phrases((edit.id, edit.requires) for edit in bound)
        self._free = self.index
        self._order = np.argsort(store.ids, kind="stable") if bound or self.judge else np.empty(0, np.int64)
        self._ids = store.ids[self._order]
        self._keys, self._edits_of_keys, self._vocabulary = self._spellings()
        if bound or self.judge:
            decode(())  # whatever it has to load is loaded now, not in the first lookup
        if not bound:
            return
        self._free_rows = np.flatnonzero(~np.isin(store.ids, [edit.id for edit in bound]))
        self._free = self.index.only(self._free_rows)

    def _spellings(self) -> tuple[NDArray[np.int64], NDArray[np.int64], Vocabulary]:
        """What `letters` makes of the questions that have masks, hashed and in order, the edit of each, and the words
        of all; nothing without a judge."""
        pairs, words = [], set()
        for edit in self._edits if self.judge else ():
            for prompt in (edit.prompt,) if not edit.rephrases else self._prompts(edit.id)[0]:
                key, spelt = letters_and_words(prompt)
                pairs.append((hash(key), edit.id))
                words.update(spelt)
        keys, numbers = np.array(pairs, np.int64).reshape(-1, 2).T
        order = np.argsort(keys, kind="stable")
        return keys[order], numbers[order], Vocabulary(words)

    def prepare(self, tau: float) -> None:
        """See `HammingIndex.prepare`.

        tau: overlap in (0, 1] that the searches will use.
        """
        self._free.prepare(tau)

    def search(
        self, codes: NDArray[np.uint8], tau: float, questions: Sequence[Sequence[int]], *, exact: bool = False
    ) -> Hits:
        """The edit that acts on each question, as `HammingIndex.search` returns it, among those that may.

        codes: uint8 [Q, D/8], the masks of the questions.
        tau: least overlap of a match, in (0, 1].
        questions: of each the token ids of its span.
        exact: as `HammingIndex.search`, and so are the errors.
        Overlaps of questions that match nothing are those of the nearest edit of which the texts that it requires stand
        there; of one that requires nothing they may be a little less, see `Hits`.
        """
        return self.decide(codes, tau, questions, [1] * len(questions), exact=exact)[0]

    def decide(
        self,
        codes: NDArray[np.uint8],
        tau: float,
        questions: Sequence[Sequence[int]],
        counts: Sequence[int],
        around: NDArray[np.float32] | None = None,
        *,
        exact: bool = False,
    ) -> tuple[Hits, NDArray[np.int64]]:
        """`search` of messages of which several spans are looked up: a decision for each, and which span made it.

        codes, tau, questions, exact: as in `search`; Q counts the spans of all messages.
        counts: how many of the questions are spans of each message, in turn; the first is the whole of it, and what
        stands there around another span counts too.
        around: float32 [Q], what `TaskProbe` says of that; without it the words of it decide.

        The span decides for which most speaks; where none matches, the one that is nearest to an edit. Returns the
        hits of M messages, and int64 [M], the number of a question for each.
        """
        hits, edits = self._nearest(codes, tau, exact=exact)
        ids, overlaps, rows = hits.ids, hits.overlaps, hits.rows
        speaks = np.where(ids >= 0, PER_OVERLAP * overlaps, -np.inf)
        ends = np.cumsum(counts)
        for first, end in zip((ends - counts).tolist(), ends.tolist(), strict=True):
            if not self._phrases and self.judge is None:
                break  # nothing but the mask counts
            part = slice(first, end)
            says = None if around is None else around[part]
            near = Hits(ids[part], overlaps[part], rows[part])
            judged = self._judge(self._read(codes[part], questions[part], says, near, edits[part]), tau)
            for q, candidates in enumerate(judged, first):
                if candidates is None:
                    continue  # nothing is near
                best = _best(candidates)
                overlaps[q] = max([overlaps[q], *(candidate.overlap for candidate in candidates)])
                ids[q], rows[q], speaks[q] = -1, -1, -np.inf
                if best is not None:
                    ids[q], rows[q], overlaps[q], speaks[q] = best.edit, best.row, best.overlap, _weight(best)[0]
        if len(ids) == len(counts):
            return hits, np.arange(len(ids))
        order = np.lexsort((-np.arange(len(ids)), overlaps, speaks))  # the last of a message decides
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        chosen = np.array([end - n + int(rank[end - n : end].argmax()) for end, n in zip(ends, counts, strict=True)])
        chosen = chosen.astype(np.int64)
        return Hits(ids[chosen], overlaps[chosen], rows[chosen]), chosen

    def _nearest(self, codes: NDArray[np.uint8], tau: float, *, exact: bool = True) -> tuple[Hits, list[list[int]]]:
        """The edit that requires nothing and is nearest to each mask, with its row in the store; and where they are
        judged the nearest `CANDIDATES` that reach tau."""
        if self.judge:
            hits, edits = self._free.search_edits(codes, tau, CANDIDATES, exact=exact)
        else:
            hits, edits = self._free.search(codes, tau, exact=exact), [[] for _ in codes]
        if self._phrases:
            hits.rows[hits.rows >= 0] = self._free_rows[hits.rows[hits.rows >= 0]]
        return hits, edits

    def _read(
        self,
        codes: NDArray[np.uint8],
        questions: Sequence[Sequence[int]],
        around: NDArray[np.float32] | None,
        hits: Hits,
        edits: Sequence[Sequence[int]],
    ) -> list[_Passage]:
        """The parts of one message, the whole of it first. hits, edits: as `_nearest` gives them for these parts."""
        texts = [self._decode(question) for question in questions]
        nearest = zip(hits.ids.tolist(), hits.rows.tolist(), hits.overlaps.tolist(), strict=True)
        says = [None] * len(texts) if around is None else around.tolist()
        rests = ["", *(around_of(texts[0], text) for text in texts[1:])]
        return [_Passage(*row) for row in zip(codes, texts, rests, says, nearest, edits, strict=True)]

    def _judge(self, parts: Sequence[_Passage], tau: float) -> list[list[Candidate] | None]:
        """For each part of one message the edits that are judged for it; None for a part to which nothing is near.

        A message that holds an edit's question beside a task is that task, however well the words of the whole fit.
        """
        judged: list[list[Candidate] | None] = []
        tasks: dict[int, str] = {}
        for part in parts:
            literal = self._literal(part.text)
            if not self._phrases and part.nearest[0] < 0 and not literal:
                judged.append(None)
                continue
            candidates = list(self._candidates(part, tau, literal))
            judged.append(candidates)
            tasks |= {near.edit: near.verdict.task for near in candidates if near.verdict.task}
        if not tasks:
            return judged
        if judged[0] and any(candidate.verdict.part == "same words" for candidate in judged[0]):
            return judged  # the message has no other words
        return [candidates and [_beside(candidate, tasks) for candidate in candidates] for candidates in judged]

    def candidates(
        self,
        codes: NDArray[np.uint8],
        tau: float,
        questions: Sequence[Sequence[int]],
        around: NDArray[np.float32] | None = None,
    ) -> list[list[Candidate]]:
        """For each part of one message the edits that are judged for it.

        codes, tau, questions, around: see `judged`.
        """
        parts = self._read(codes, questions, around, *self._nearest(codes, tau))
        return [candidates or [] for candidates in self._judge(parts, tau)]

    def judged(
        self,
        codes: NDArray[np.uint8],
        tau: float,
        questions: Sequence[Sequence[int]],
        around: NDArray[np.float32] | None = None,
    ) -> list[Candidate | None]:
        """For each part of one message the edit whose question it asks, or else the nearest; None where none is near.

        codes: uint8 [Q, D/8].
        tau: the least overlap that matches.
        questions: the token ids of each part, the whole message first.
        around: float32 [Q], what `TaskProbe` says of what stands around each (default: words decide).
        """
        return [
            _best(candidates) or min(candidates, key=lambda near: (-near.overlap, near.row), default=None)
            for candidates in self.candidates(codes, tau, questions, around)
        ]

    def parts(
        self,
        codes: NDArray[np.uint8],
        tau: float,
        questions: Sequence[Sequence[int]],
        decisive: int,
        around: NDArray[np.float32] | None = None,
    ) -> tuple[JudgedPart, ...]:
        """What is said of each part of one message.

        codes, tau, questions, around: see `judged`.
        decisive: the one that `decide` names.
        """
        overlaps = self.index.nearest(codes, 1)[1][:, 0]
        parts = []
        for i, best in enumerate(self.judged(codes, tau, questions, around)):
            verdict = best.verdict if best else _FAR
            words = (verdict.task,) if verdict.task else tuple(word for word, _ in verdict.added)
            parts.append(
                JudgedPart(
                    text=self._decode(questions[i]).strip()[:_SHOWN],
                    edit=best.edit if best else None,
                    overlap=round(best.overlap if best else float(overlaps[i]), 4),
                    same=verdict.same,
                    reason=verdict.part,
                    words=words,
                    decides=i == decisive,
                )
            )
        return tuple(parts)

    def _literal(self, text: str) -> set[int]:
        """The edits whose question a text is, letter by letter, in whatever case and signs; where there are none, those
        whose question it may be but for one mistyped word."""
        if self.judge is None:
            return set()
        key, words = letters_and_words(text)
        edits = self._spelt_as(key)
        if not edits and (word := self._vocabulary.stranger(words)):
            edits = set().union(*(self._spelt_as(key.replace(word, other)) for other in self._vocabulary.like(word)))
        return edits

    def _spelt_as(self, key: str) -> set[int]:
        """The edits with a question of these letters. key: as `letters` gives it."""
        if not key:
            return set()
        first, last = (int(np.searchsorted(self._keys, hash(key), side=side)) for side in ("left", "right"))
        edits = self._edits_of_keys[first:last].tolist()
        return {edit for edit in edits if any(letters(prompt) == key for prompt in self._prompts(edit)[0])}

    def _candidates(self, part: _Passage, tau: float, literal: set[int]) -> Iterator[Candidate]:
        """The edits near enough to a part, or of the same words, and what is said of each.

        literal: see `_literal`. The same words in capitals, mistyped or after another answer may have a mask that is
        far.
        """
        k, radius = self.index.k, hamming_radius(tau, self.index.k)
        nearest, row, overlap = part.nearest
        verdict = _FAR
        if nearest >= 0:
            verdict = self._judged(nearest, part)
            yield Candidate(nearest, row, overlap, verdict)
        tied = self._phrases.found_in(part.text) if self._phrases else set()
        literal = {edit for edit in literal if edit in tied or not self._prompts(edit)[1]}  # a rephrasing may lack it
        # Apart, for nearer edits of the same phrase must not crowd out the one whose words these are.
        for edit, row, bits in self._nearest_of(part.code, literal - {nearest}, tau):
            yield Candidate(edit, row, bits / k, self._judged(edit, part))
        for edit, row, bits in self._nearest_of(part.code, tied - literal - {nearest}, tau):
            near = 2 * (k - bits) <= radius
            yield Candidate(edit, row, bits / k, self._judged(edit, part) if near else _FAR)
        if nearest < 0 or self.judge is None or verdict.part in ("same words", "task"):
            return
        for edit, row, bits in self._nearest_of(part.code, set(part.edits) - {nearest} - literal, tau):
            yield Candidate(edit, row, bits / k, self._judged(edit, part))

    def _judged(self, edit: int, part: _Passage) -> Verdict:
        if self.judge is None:
            return Verdict(True, 0.0, 0.0, (), (), "", "mask")
        prompts, requires = self._prompts(edit)
        verdicts = [self.judge.verdict(prompt, part.text, part.rest, requires, part.speaks) for prompt in prompts]
        # What stands around a question makes it a task in whatever wording it is the edit's.
        task = next((verdict for verdict in verdicts if verdict.task), None)
        return task or max(verdicts, key=lambda verdict: verdict.score)

    def _wordings(self, edit: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The texts that have a mask of an edit, and the words that it requires."""
        stored: StoredEdit = self._edits[int(self._place[np.searchsorted(self._numbers, edit)])]
        first, last = np.searchsorted(self._ids, [edit, edit + 1])
        return masked_texts(stored, int(last - first), self._contexts), required_texts(stored.requires)

    def _nearest_of(self, code: NDArray[np.uint8], edits: set[int], tau: float) -> list[tuple[int, int, int]]:
        """The nearest of these edits, at most `CANDIDATES`: each edit, its nearest row, the earliest among equals, and
        the bits in common; the nearest first. Of edits with many rows those that reach tau alone, or else the nearest.
        """
        if not edits:
            return []
        most = CANDIDATES if self.judge else 1
        rows = self._rows_of(edits)
        if len(rows) > _LARGE and len(edits) > most:
            among = self.index.only(rows)
            near = among.search_edits(code[None], tau, most)[1][0]
            rows = self._rows_of(near or among.nearest(code[None], 1)[0][0].tolist())
        bits = np.concatenate(
            [popcount(self.index.take(rows[start : start + _MOST]) & code) for start in range(0, len(rows), _MOST)]
        )
        best: dict[int, tuple[int, int, int]] = {}
        for place in np.lexsort((rows, -bits.astype(np.int64))).tolist():
            edit = int(self._edit_of[rows[place]])
            best.setdefault(edit, (edit, int(rows[place]), int(bits[place])))
            if len(best) == most:
                break
        return list(best.values())

    def _rows_of(self, edits: Collection[int]) -> NDArray[np.int64]:
        """The rows of some edits, int64 [N], ascending."""
        numbers = np.sort(np.fromiter(edits, np.int64, len(edits)))
        first = np.searchsorted(self._ids, numbers)
        counts = np.searchsorted(self._ids, numbers, side="right") - first
        behind = np.repeat(first - np.cumsum(counts) + counts, counts)  # what to add to a position in what follows
        return np.sort(self._order[behind + np.arange(len(behind))])


def around_of(message: str, part: str) -> str:
    """The text of a message around one of its parts, as far as it is judged, with `PLACE` for the part; "" if none.

    message: the whole of it.
    part: where it stands several times, what is around its first place and around its last counts.
    """
    text = message.replace(part.strip() or message, PLACE)
    first, last = text.find(PLACE), text.rfind(PLACE)
    around = text[max(0, first - AROUND) : first + AROUND], text[max(first + AROUND, last - AROUND) : last + AROUND]
    return "" if text.strip() == PLACE else "".join(around)


def _best(candidates: Sequence[Candidate]) -> Candidate | None:
    """That which a question asks for, of the edits that are judged."""
    return max((near for near in candidates if near.verdict.same), key=_weight, default=None)


def _beside(candidate: Candidate, tasks: Mapping[int, str]) -> Candidate:
    """An edit whose question another part of the message has beside a task. tasks: by edit."""
    if not candidate.verdict.same or candidate.edit not in tasks:
        return candidate
    return candidate._replace(
        verdict=candidate.verdict._replace(same=False, score=-math.inf, part="task", task=tasks[candidate.edit])
    )


def _weight(candidate: Candidate) -> tuple[float, int]:
    """What speaks for a candidate, and among equals for the earlier one."""
    return min(candidate.verdict.score, 1e9) + PER_OVERLAP * candidate.overlap, -candidate.row
