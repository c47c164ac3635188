"""Looking up the edit that a prompt asks for, outside a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memoir_index import Hits, hamming_radius, popcount
from memoir_retrieval.edits.judge import Judge, Verdict
from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.lookup.masks import EditLookup, task_probe
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.model.forward import candidate_means
from memoir_retrieval.question.candidates import CandidateSpan, Kind, Pieces, find_candidates
from memoir_retrieval.question.fingerprint import Fingerprint
from memoir_retrieval.question.prompts import Prompt, prompt_ids
from memoir_retrieval.question.span import Span
from memoir_retrieval.question.tasks import Pooled, pooled_spans, with_leads
from memoir_retrieval.store.base_model import load_model_of
from memoir_retrieval.store.read import EditStore

__all__ = ["Asked", "Loss", "Match", "Part", "Retriever"]


@dataclass(frozen=True)
class Match:
    """An edit beside a prompt. What `lookup` gives is the edit that acts on it: of those that reach tau, or have the
    prompt's very words, the one for which most speaks; in a store without a judge the nearest that may act.

    >>> from memoir_retrieval import Retriever
    >>> match = Retriever.open("edits").lookup("Who is the CEO of Example Corp?")
    >>> match.id, match.edit.target, round(match.overlap, 1)
    (0, 'Jane Doe', 1.0)

    edit: as the store has it.
    overlap: |M(q) & M(edit)| / k, in [0, 1].
    runner_up: id and overlap of the other edit whose mask is nearest, or None in a store of one edit.
    """

    edit: StoredEdit
    overlap: float
    runner_up: tuple[int, float] | None

    @property
    def id(self) -> int:
        """The edit's id in its store."""
        return self.edit.id


class Part(NamedTuple):
    """A part of a message that was looked up.

    kind: what makes it a part, see `CandidateSpan`.
    text: as its tokens read.
    nearest: the edit whose mask is nearest.
    overlap: that of the two masks.
    match: the edit that the part matches, or None.
    verdict: on that edit, or else on the nearest one; None where no edit is near enough to be judged.
    decides: whether it is this part that decides for the message.
    """

    kind: Kind
    text: str
    nearest: int
    overlap: float
    match: int | None
    verdict: Verdict | None
    decides: bool


Loss = Literal["mask", "place", "judge", "another edit"]
"""Why an edit does not act on a message. mask: it does not reach tau. place: other edits are nearer, and no more than a
few are judged. judge: its verdict. another edit: for which more speaks."""


class Asked(NamedTuple):
    """What a lookup takes from the model of a message, whatever edits there are.

    questions: token ids of the message and of its parts; empty where it holds no question.
    codes: uint8 [P, D/8], the mask of each.
    around: float32 [P], what `TaskProbe` says of what stands around each, or None.
    """

    questions: list[list[int]]
    codes: NDArray[np.uint8]
    around: NDArray[np.float32] | None


class Retriever:
    """A store together with the model it was made on.

    >>> from memoir_retrieval import Retriever
    >>> retriever = Retriever.open("edits")
    >>> retriever.lookup("What is the capital of France?") is None
    True
    """

    def __init__(self, store: EditStore, base: BaseModel, tau: float | None = None):
        """Put a store and its model together.

        store: checked here.
        base: the model that the store was made on.
        tau: the least overlap that matches, in (0, 1] (default: the store's own).

        Raises StoreMismatch for another model, ConfigError for another tau, StoreError for damage.
        """
        store.check()
        store.require(base.identity, base.name)
        self.store = store
        self.base = base
        self.tau = store.manifest.tau if tau is None else tau
        if not 0 < self.tau <= 1:
            raise ConfigError(f"tau is {tau}: choose 0 < tau <= 1 (this store was made with {store.manifest.tau})")
        self.fingerprint = Fingerprint(store.background, store.permutation, store.manifest.k, base.device)
        self._lookup = EditLookup(store, base.tokenizer.decode)
        self._probe = task_probe(store, base.device)
        self.index = self._lookup.index
        self._pieces = Pieces(base.tokenizer.decode)

    @classmethod
    def open(
        cls, store: str | Path, model: str | Path | None = None, *, tau: float | None = None, device: str = "cpu"
    ) -> Retriever:
        """Open a store with its model: `Retriever.open("edits", "smollm2-135m")`.

        store: its folder.
        model: a folder, an embedded model's name or a Hub id; by default the one the store names.
        tau: the least overlap that matches, in (0, 1] (default: the store's own).
        device: where the model runs, such as "cuda".

        Raises StoreError for a store that cannot be opened, ModelError for a model that cannot be loaded, and what the
        constructor raises.
        """
        opened = EditStore.open(store)
        return cls(opened, load_model_of(opened.manifest, model, device=device), tau)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt as the store's settings render it.

        prompt: text or messages.

        Raises ConfigError for more tokens than the model takes.
        """
        ids = prompt_ids(self.base.tokenizer, prompt, chat=self.store.manifest.chat)
        if len(ids) > self.base.max_length:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens, {self.base.name} takes {self.base.max_length}: shorten it"
            )
        return ids

    def lookup(self, prompt: Prompt) -> Match | None:
        """The stored edit that a prompt matches, or None.

        prompt: text or messages.

        Raises ConfigError for a prompt that is longer than the model takes, or messages without a chat template.
        """
        return self.lookup_batch([prompt])[0]

    def lookup_batch(self, prompts: Sequence[Prompt]) -> list[Match | None]:
        """`lookup` for many prompts at once.

        prompts: text or messages each.
        """
        return [match for match, _ in self.decide_batch(prompts)]

    def spans(self, ids: Sequence[int]) -> list[Span]:
        """What is looked up of a prompt: its last user message, which may be empty, and parts of it.

        ids: of its tokens.
        """
        return [candidate.span for candidate in self._candidates(ids)]

    def _candidates(self, ids: Sequence[int]) -> list[CandidateSpan]:
        return find_candidates(ids, self.store.manifest.span, self._pieces)

    def parts(self, prompt: Prompt) -> list[Part]:
        """What is looked up of a prompt, and what is said of each part of it: why `lookup` gives what it gives.

        prompt: text or messages.
        """
        ids = self.prompt_ids(prompt)
        candidates = self._candidates(ids)
        if not _holds_question(candidates[0].span) or not len(self.index):
            return []
        spans = [candidate.span for candidate in candidates]
        pooled = self._pooled([ids], [spans])
        if not pooled.sound([len(spans)])[0]:
            return []
        codes, around = self._codes(pooled, [len(spans)])
        questions = [ids[span.start : span.end] for span in spans]
        (decisive,) = self._lookup.decide(codes, self.tau, questions, [len(questions)], around)[1].tolist()
        near, overlaps = self.index.nearest(codes, 1)
        parts = []
        judged = self._lookup.judged(codes, self.tau, questions, around)
        for i, (candidate, question, best) in enumerate(zip(candidates, questions, judged, strict=True)):
            parts.append(
                Part(
                    kind=candidate.kind,
                    text=self.base.tokenizer.decode(question),
                    nearest=int(near[i, 0]),
                    overlap=float(overlaps[i, 0]),
                    match=best.edit if best and best.verdict.same else None,
                    verdict=best.verdict if best else None,
                    decides=i == decisive,
                )
            )
        return parts

    def decide_batch(self, prompts: Sequence[Prompt]) -> list[tuple[Match | None, Match | None]]:
        """`lookup` of each prompt, and the edit that is nearest to it, whether it may act on the prompt or not.

        prompts: text or messages each.
        """
        return self.decide(self.ask(prompts))

    def ask(self, prompts: Sequence[Prompt]) -> list[Asked]:
        """What `decide` takes of each prompt. It holds for any store with the settings of this one.

        prompts: text or messages each.
        """
        rows = [self.prompt_ids(p) for p in prompts]
        spans = [self.spans(ids) for ids in rows]
        asking = [i for i, parts in enumerate(spans) if _holds_question(parts[0])]
        messages = [Asked([], np.empty((0, self.base.d // 8), np.uint8), None) for _ in rows]
        if not asking:
            return messages
        pooled = self._pooled([rows[i] for i in asking], [spans[i] for i in asking])
        sound, taken = pooled.sound([len(spans[i]) for i in asking])
        if not sound:
            return messages
        asking, pooled = [asking[m] for m in sound], pooled.taken(taken, sound)
        codes, around = self._codes(pooled, [len(spans[i]) for i in asking])
        first = 0
        for i in asking:
            end = first + len(spans[i])
            questions = [rows[i][span.start : span.end] for span in spans[i]]
            messages[i] = Asked(questions, codes[first:end], None if around is None else around[first:end])
            first = end
        return messages

    def decide(self, messages: Sequence[Asked]) -> list[tuple[Match | None, Match | None]]:
        """See `decide_batch`.

        messages: as `ask` gives them.
        """
        decisions: list[tuple[Match | None, Match | None]] = [(None, None)] * len(messages)
        asking = [i for i, message in enumerate(messages) if message.questions]
        if not asking or not len(self.index):
            return decisions
        lookups = [messages[i] for i in asking]
        codes = np.concatenate([message.codes for message in lookups])
        around = None
        if self._probe is not None:
            around = np.concatenate([message.around for message in lookups if message.around is not None])
        questions = [question for message in lookups for question in message.questions]
        hits, decisive = self._lookup.decide(codes, self.tau, questions, [len(m.questions) for m in lookups], around)
        near, overlaps = self.index.nearest(codes[decisive], 2)
        for q, i in enumerate(asking):
            ranked = [(int(n), float(o)) for n, o in zip(near[q], overlaps[q], strict=True) if n >= 0]

            def match_of(number: int, overlap: float, ranked: list[tuple[int, float]] = ranked) -> Match:
                others = [other for other in ranked if other[0] != number]
                return Match(self.store.edit(number), overlap, others[0] if others else None)

            match = match_of(int(hits.ids[q]), float(hits.overlaps[q])) if hits.ids[q] >= 0 else None
            decisions[i] = match, match_of(*ranked[0])
        return decisions

    def loss(self, message: Asked, edit: int) -> Loss:
        """What keeps an edit from acting on a message that does not get it.

        message: as `ask` gives it.
        edit: its id.
        """
        if not message.questions:
            return "mask"
        judged = self._lookup.candidates(message.codes, self.tau, message.questions, message.around)
        verdicts = [near.verdict for candidates in judged for near in candidates if near.edit == edit]
        if verdicts:
            return "another edit" if any(verdict.same for verdict in verdicts) else "judge"
        masks = self.index.take(np.flatnonzero(self.store.ids == edit))
        bits = max(int(popcount(masks & code).max()) for code in message.codes)
        return "place" if 2 * (self.index.k - bits) <= hamming_radius(self.tau, self.index.k) else "mask"

    def nearest_acting(self, codes: NDArray[np.uint8], questions: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """For each question the edit that acts on it at the least tau there is, so whatever its overlap; -1 where what
        edits require, or the judge, leaves none. int64 [Q].

        codes: uint8 [Q, D/8], the questions' masks.
        questions: token ids of each.
        """
        return self._lookup.search(codes, 1 / self.store.manifest.k, questions, exact=True).ids

    @property
    def judge(self) -> Judge | None:
        """What decides behind the masks; None where they decide alone."""
        return self._lookup.judge

    def was_vetoed(self, match: Match | None, nearest: Match | None) -> bool:
        """Whether the nearest edit was near enough to match, and did not: the prompt lacks what it requires, the judge
        says that something else is asked, or another edit fits better.

        match: as `decide_batch` gives it.
        nearest: the same.
        """
        if match or not nearest:
            return bool(match and nearest and match.id != nearest.id)
        k = self.store.manifest.k
        return round(2 * k * (1 - nearest.overlap)) <= hamming_radius(self.tau, k)

    def _pooled(self, rows: Sequence[Sequence[int]], spans: Sequence[Sequence[Span]]) -> Pooled:
        """The parts and leads of messages. spans: of each prompt, the message and its parts."""
        (pooled,) = candidate_means([self.base], rows, [pooled_spans(parts) for parts in spans])
        return with_leads(pooled, spans)

    def _codes(self, pooled: Pooled, counts: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
        """The masks of questions, and what `TaskProbe` says of what stands around each; None without a probe."""
        around = None if self._probe is None else self._probe.scores(pooled, counts)
        return self.fingerprint.codes(pooled.means), around

    def route(self, pooled: Pooled, questions: Sequence[Sequence[int]], counts: Sequence[int] | None = None) -> Hits:
        """What a server decides.

        pooled: of each question.
        questions: token ids of each.
        counts: how many of the questions are parts of each message, in turn (default: each is a message).
        """
        counts = [1] * len(questions) if counts is None else counts
        hits = Hits(np.full(len(counts), -1), np.zeros(len(counts)), np.full(len(counts), -1))
        sound, taken = pooled.sound(counts)
        if not sound:
            return hits
        parts = [counts[m] for m in sound]
        codes, around = self._codes(pooled.taken(taken, sound), parts)
        decided, _ = self._lookup.decide(codes, self.tau, [questions[q] for q in taken], parts, around)
        for every, those in zip(hits, decided, strict=True):
            every[sound] = those
        return hits


def _holds_question(span: Span) -> bool:
    return span.start < span.end
