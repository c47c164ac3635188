"""From the pooled activations of questions to the edits that answer them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import torch

from memoir_index import unpack
from memoir_retrieval.lookup.decision import Result
from memoir_retrieval.lookup.masks import Decode, EditLookup, task_probe
from memoir_retrieval.question.fingerprint import Fingerprint
from memoir_retrieval.question.span import ChatSpanRule, SpanRule
from memoir_retrieval.question.tasks import Pooled
from memoir_retrieval.store.read import EditStore
from memoir_vllm.config import served_rule
from memoir_vllm.requests import Decision, Query, Routed

__all__ = ["NO_CHAT", "Route", "Router"]

NO_CHAT = (
    "no user message with text as the model's own chat template marks it; the edits were made in chats, so ask through "
    "/v1/chat/completions, with that template"
)


@dataclass(frozen=True)
class Route:
    """What is known of a request.

    routed: its decision.
    mask: bool [D], that of a match.
    memory: of a match, the number of the memory that holds the edit.
    """

    routed: Routed
    mask: np.ndarray | None = None
    memory: int = 0


class Router:
    """The lookup side of one generation of a store."""

    def __init__(self, store: EditStore, tau: float | None, device: torch.device | str, decode: Decode, name: str = ""):
        """store: which was checked.
        tau: the least overlap that matches; None: the store's own.
        device: on which means come.
        decode: the text of a question's token ids; see `EditLookup`.
        name: of the store on this server.
        """
        self.name = name
        manifest = store.manifest
        self.generation = manifest.generation
        # Numbers of generations and rows are the same in two stores. Manifests of format 1 have no digest of their own.
        self.digest = manifest.sha256 or manifest.memory.sha256 + manifest.codes.sha256
        self.rule: SpanRule = served_rule(manifest)
        self.d = manifest.d
        self.tau = manifest.tau if tau is None else tau
        self.edits = len(store.edits)
        self._fingerprint = Fingerprint(store.background, store.permutation, manifest.k, device)
        self._lookup = EditLookup(store, decode)
        self._lookup.prepare(self.tau)
        self._probe = task_probe(store, device)
        self._memory_of = store.memory_of

    def _unedited(self, result: Result, overlap: float = 0.0, reason: str = "") -> Route:
        return Route(Routed(Decision(None, overlap, result, self.generation, reason=reason, store=self.name)))

    def unedited_of(self, query: Query) -> Route:
        """Of a request that is not looked up: an adapter answers it, it holds an image, opted out, or has no question.

        query: what it asks for.
        """
        if query.adapter:
            return self._unedited("adapter", reason=query.reason)
        if query.image:
            return self._unedited("image")
        if query.off:
            return self._unedited("off")
        no_chat = NO_CHAT if isinstance(self.rule, ChatSpanRule) else ""
        return self._unedited("unroutable", reason=query.reason or no_chat)

    def route(
        self,
        pooled: Pooled,
        questions: Sequence[Sequence[int]],
        nearest: Sequence[int] = (),
        counts: Sequence[int] | None = None,
    ) -> list[Route]:
        """Look messages up.

        pooled: of Q questions, on this router's device.
        questions: the token ids of each.
        nearest: for each message, how many of the nearest edits the decision names, matched or not, whatever they
            require; where there are any, it says what became of each part, too.
        counts: how many of the questions are parts of each message, in turn, the message first (default: one each).
        """
        counts = [1] * len(questions) if counts is None else counts
        routes = [self._unedited("unroutable")] * len(counts)
        sound, taken = pooled.sound(counts)
        if not sound:
            return routes
        pooled = pooled.taken(taken, sound)
        codes = self._fingerprint.codes(pooled.means)
        parts = [counts[m] for m in sound]
        around = None
        if self._probe is not None and len(taken) > len(sound):
            around = self._probe.scores(pooled, parts)
        hits, decisive = self._lookup.decide(codes, self.tau, [questions[q] for q in taken], parts, around)
        for q, edit, overlap, row in zip(
            sound, hits.ids.tolist(), hits.overlaps.tolist(), hits.rows.tolist(), strict=True
        ):
            if row < 0:
                routes[q] = self._unedited("unmatched", round(overlap, 4))
            else:
                decision = Decision(edit, round(overlap, 4), "matched", self.generation, store=self.name)
                routes[q] = self.recall(Routed(decision, row, self.digest))
        if any(nearest):
            named = self._named(codes[decisive], max(nearest))
            first = 0
            for m, edits, decided in zip(sound, named, decisive.tolist(), strict=True):
                end = first + counts[m]
                if nearest[m]:
                    own = [questions[q] for q in taken[first:end]]
                    says = None if around is None else around[first:end]
                    judged = self._lookup.parts(codes[first:end], self.tau, own, decided - first, says)
                    routed = routes[m].routed
                    decision = msgspec.structs.replace(routed.decision, nearest=edits[: nearest[m]], parts=judged)
                    routes[m] = replace(routes[m], routed=routed._replace(decision=decision))
                first = end
        return routes

    def _named(self, codes: np.ndarray, n: int) -> Iterator[tuple[tuple[int, float], ...]]:
        """Id and overlap of the n nearest edits of each question, best first; fewer where the store holds fewer."""
        ids, overlaps = self._lookup.index.nearest(codes, n)
        for row, values in zip(ids.tolist(), overlaps.tolist(), strict=True):
            yield tuple((edit, round(overlap, 4)) for edit, overlap in zip(row, values, strict=True) if edit >= 0)

    def recall(self, routed: Routed) -> Route:
        """The route of a request that was decided before.

        routed: its decision.

        Raises RuntimeError for another generation's decision.
        """
        if routed.decision.generation != self.generation:
            raise RuntimeError(
                f"memoir: a request was decided by generation {routed.decision.generation} of the store, this worker "
                f"serves generation {self.generation}"
            )
        if routed.row < 0:
            return Route(routed)
        mask = unpack(self._lookup.index.code(routed.row)[None], self.d)[0]
        return Route(routed, mask, int(self._memory_of[routed.row]))
