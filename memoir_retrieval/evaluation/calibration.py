"""Measuring tau, and before that layer and k: how far rephrasings of edits stand out from unrelated prompts.

The rule for tau is that of `store.threshold`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from memoir_index import HammingIndex, popcount
from memoir_retrieval.background import background_prompts, unrelated_prompts
from memoir_retrieval.edits.judge import shipped_judge
from memoir_retrieval.edits.record import Edit, StoredEdit, as_prompt, prompt_key
from memoir_retrieval.errors import ConfigError, StoreError
from memoir_retrieval.lookup.retriever import Retriever
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.model.forward import candidate_means, question_means
from memoir_retrieval.question.fingerprint import Fingerprint, permutation
from memoir_retrieval.question.prompts import Prompt, prompt_ids
from memoir_retrieval.question.span import Span, SpanRule, derive_span_rule, find_span
from memoir_retrieval.question.tasks import shipped_tasks
from memoir_retrieval.store.files import store_lock
from memoir_retrieval.store.manifest import Manifest
from memoir_retrieval.store.read import NO_TASKS, EditStore
from memoir_retrieval.store.threshold import (
    GRID,
    NO_REFERENCES,
    References,
    Threshold,
    bits_needed,
    least_tau,
    set_tau,
)
from memoir_retrieval.store.write import write_again

__all__ = [
    "Calibration",
    "NearestEdit",
    "Overlaps",
    "Point",
    "Setting",
    "calibrate_model",
    "calibrate_store",
    "unrelated_to",
    "with_this_judge",
    "write_tau",
]


class Point(msgspec.Struct, frozen=True):
    """What a tau does.

    tau: in (0, 1].
    rephrases_found: the share of rephrasings that match their own edit.
    unrelated_matched: the share of unrelated prompts that match any edit.
    """

    tau: float
    rephrases_found: float
    unrelated_matched: float


class Overlaps(msgspec.Struct, frozen=True):
    """Overlaps in [0, 1], by what was asked.

    edits: of each edit's prompt with the edit's own mask.
    rephrases: of each rephrasing with the mask of its own edit.
    unrelated: of each unrelated prompt with the mask nearest to it.
    """

    edits: tuple[float, ...]
    rephrases: tuple[float, ...]
    unrelated: tuple[float, ...]


class NearestEdit(msgspec.Struct, frozen=True):
    """An unrelated prompt and the edit nearest to it.

    prompt: the unrelated one.
    edit: id of the edit.
    overlap: of their masks, in [0, 1].
    """

    prompt: str
    edit: int
    overlap: float


class Calibration(msgspec.Struct, frozen=True):
    """What was measured on a store.

    now: what the store's own tau does.
    suggested: what the tau of the rule does.
    threshold: what that rests on; None where it is the measured prompts.
    curve: a point for every .01 between the smallest overlap and 1.
    overlaps: of all that was asked.
    nearest: the up to three unrelated prompts whose masks are the nearest to an edit's, the nearest first.
    """

    now: Point
    suggested: Point
    curve: tuple[Point, ...]
    overlaps: Overlaps
    nearest: tuple[NearestEdit, ...]
    threshold: Threshold | None = None


class Setting(msgspec.Struct, frozen=True):
    """One layer and k of a model.

    layer: number of the block.
    k: bits that are set in a mask.
    tau: what the rule gives.
    rephrases_found: the share of rephrasings found at that tau.
    gap: by how much the 5th percentile of the rephrasings' overlaps exceeds tau.
    """

    layer: int
    k: int
    tau: float
    rephrases_found: float
    gap: float


@dataclass(frozen=True)
class _Shared:
    """Bits in common with a mask, of k. edits int64 [N], rephrases int64 [R]: with the own edit's best mask;
    unrelated int64 [U]: with the nearest mask, which is that of edit `nearest` [U]. is_nearest bool [R]: whether the
    own edit is the nearest of those that may act. acting int64 [U]: with the edit that would act at some tau, or 0."""

    k: int
    edits: NDArray[np.int64]
    rephrases: NDArray[np.int64]
    is_nearest: NDArray[np.bool_]
    unrelated: NDArray[np.int64]
    nearest: NDArray[np.int64]
    acting: NDArray[np.int64]

    def at(self, tau: float) -> Point:
        needed = bits_needed(tau, self.k)
        return Point(
            tau,
            round(float(np.mean(self.is_nearest & (self.rephrases >= needed))), 5),
            round(float(np.mean(self.acting >= needed)), 5),
        )


def calibrate_store(
    retriever: Retriever,
    rephrases: Sequence[tuple[int, str]],
    unrelated: Sequence[str],
    references: References = NO_REFERENCES,
) -> Calibration:
    """Measure a store in its own prompt form.

    retriever: of the store, whose model makes the masks.
    rephrases: pairs of an edit's id and a rephrasing of its prompt.
    unrelated: prompts that no edit should match.
    references: by which the suggested tau is set; without any it is the least that no unrelated prompt reaches by its
        mask, and `MARGIN`.
    Raises ConfigError where there is nothing to measure, or an unrelated prompt has the very mask of an edit.
    """
    store = retriever.store
    if not store.edits:
        raise ConfigError(f"store {store.path} has no edits: add some with `memoir edit` before tau is measured")
    if not rephrases:
        raise ConfigError(f"no edit of {store.path} has a rephrasing: name a FILE of its edits with `rephrases`")
    k = store.manifest.k
    edited, _ = _codes(retriever, [as_prompt(edit) for edit in store.edits])
    rephrased, questions = _codes(retriever, [text for _, text in rephrases])
    others, unrelated_questions = _codes(retriever, unrelated)
    shared = _share(
        retriever.index,
        edited,
        [edit.id for edit in store.edits],
        rephrased,
        [own for own, _ in rephrases],
        retriever.nearest_acting(rephrased, questions),
        others,
        retriever.nearest_acting(others, unrelated_questions),
    )
    _refuse_same_mask(shared, unrelated)
    tau, threshold = least_tau(shared.unrelated, k), None
    if references.texts:
        contexts = len(store.manifest.masked_contexts)
        tau, threshold = set_tau(retriever.index, store.edits, references, retriever.judge, contexts)
    top = np.argsort(-shared.unrelated, kind="stable")[:3]
    least = min(a.min() for a in (shared.edits, shared.rephrases, shared.unrelated)) / k
    return Calibration(
        now=shared.at(store.manifest.tau),
        suggested=shared.at(tau),
        curve=tuple(shared.at(t) for t in GRID if t >= least),
        overlaps=Overlaps(*(_overlaps(a, k) for a in (shared.edits, shared.rephrases, shared.unrelated))),
        nearest=tuple(
            NearestEdit(unrelated[i], int(shared.nearest[i]), round(int(shared.unrelated[i]) / k, 4)) for i in top
        ),
        threshold=threshold,
    )


def calibrate_model(
    base: BaseModel,
    edits: Sequence[Edit],
    unrelated: Sequence[str],
    layers: Sequence[int],
    ks: Sequence[int],
    chat: bool,
) -> list[Setting]:
    """Measure layers and k of a model that has not been edited, the best setting first.

    base: the model, at any layer.
    edits: whose prompts and rephrasings are compared.
    unrelated: prompts that no edit should match.
    layers: numbers of the blocks to try.
    ks: numbers of set bits to try at each.
    chat: prompts as user messages in the chat template, else as raw text.

    Only fingerprints are made, by one pass over the prompts; whether edits train well at a layer is not seen here.
    The best finds most rephrasings at its own tau; among equals the gap decides. Raises ConfigError for edits without
    rephrasings or a k with which masks cannot differ or be made, ModelError for a layer the model does not have.
    """
    rephrases = [(own, text) for own, edit in enumerate(edits) for text in edit.rephrases]
    if not rephrases:
        raise ConfigError("no edit of the file has a rephrasing: add `rephrases` to its records")
    bases = [base.at(layer) for layer in layers]
    rule = derive_span_rule(base.tokenizer, chat=chat)
    groups = [background_prompts(), [edit.prompt for edit in edits], [text for _, text in rephrases], list(unrelated)]
    prompts = [prompt for group in groups for prompt in group]
    rows = [prompt_ids(base.tokenizer, prompt, chat=chat) for prompt in prompts]
    pooled = candidate_means(bases, rows, [[span] for span in _spans(prompts, rows, rule)])
    own = [number for number, _ in rephrases]
    ends = np.cumsum([len(group) for group in groups])[:-1].tolist()
    settings: list[Setting] = []
    for cut, here in zip(bases, pooled, strict=True):
        background, *parts = torch.tensor_split(here.means, ends)
        for k in ks:
            make = Fingerprint(background.mean(0).cpu().numpy(), permutation(cut.d, 0), k, cut.device)
            edited, rephrased, others = (make.codes(mean) for mean in parts)
            index = HammingIndex.from_codes(cut.d, k, np.arange(len(edits)), edited)
            nearest = index.nearest(rephrased, 1)[0][:, 0]
            shared = _share(index, edited, range(len(edits)), rephrased, own, nearest, others)
            _refuse_same_mask(shared, unrelated)
            point = shared.at(least_tau(shared.unrelated, k))
            gap = float(np.quantile(shared.rephrases / k, 0.05)) - point.tau
            settings.append(Setting(cut.layer, k, point.tau, point.rephrases_found, round(gap, 4)))
    return sorted(settings, key=lambda setting: (-setting.rephrases_found, -setting.gap))


def unrelated_to(edits: Sequence[Edit] | Sequence[StoredEdit], probed: Sequence[Edit]) -> list[str]:
    """The prompts that no edit should match: those that come with the library, and what the edits must leave alone.

    edits: all of the store; none of their prompts or rephrasings is returned, as in CounterFact what one must leave
    alone may be the prompt of another.
    probed: the edits whose probes are taken.
    """
    own = {prompt_key(text) for edit in edits for text in (edit.prompt, *edit.rephrases)}
    probes = (probe.prompt for edit in probed for probe in (*edit.locality, *edit.neighbourhood))
    return [text for text in dict.fromkeys([*unrelated_prompts(), *probes]) if prompt_key(text) not in own]


def write_tau(
    measured: EditStore, tau: float, references: References = NO_REFERENCES, threshold: Threshold | None = None
) -> Manifest:
    """Publish the store's next generation, the same but for tau and what judges its questions. Returns its manifest.

    measured: the store as tau was measured on it.
    tau: in (0, 1].
    references, threshold: as `set_tau` took and gave them; without them tau stays as it is from now on.
    Raises StoreError where the store has changed since, is being written, or cannot be written; it is then what it was.
    """
    with store_lock(Path(measured.path)):
        now = EditStore.open(measured.path)
        if now.manifest != measured.manifest:
            raise StoreError(
                f"store {measured.path} went from generation {measured.manifest.generation} to "
                f"{now.manifest.generation} while it was measured: run the same command again"
            )
        span, judge = _judged(now.manifest)
        return write_again(
            now.path,
            now,
            generation=now.manifest.generation + 1,
            tau=tau,
            span=span,
            judge=judge,
            tasks=measured.tasks,
            references=references,
            threshold=threshold,
        )


def with_this_judge(store: EditStore, tasks: NDArray[np.float32] = NO_TASKS) -> EditStore:
    """The store as `write_tau` leaves it: its questions are judged by what comes with this library.

    store: as it was opened; nothing is written.
    tasks: float32 [K, 2 D + 2], by which tasks are known (default: of the library, else the store's).
    """
    span, judge = _judged(store.manifest)
    if span.candidates and span.behind and not len(tasks):
        tasks = shipped_tasks(store.manifest.base.layer)
    if not len(tasks):
        tasks = store.tasks
    manifest = msgspec.structs.replace(store.manifest, span=span, judge=judge)
    return replace(store, manifest=manifest, tasks=tasks)


def _judged(manifest: Manifest) -> tuple[SpanRule, str]:
    """The span rule and the judge that a store of these settings would have today.

    Parts of a message are looked up where the residual acts from its last token on: before that nothing is decided.
    """
    if manifest.span.rule != "question":
        return manifest.span, ""
    candidates = manifest.chat and manifest.span.acts == "last"
    return msgspec.structs.replace(manifest.span, candidates=candidates), shipped_judge().name


def _codes(retriever: Retriever, prompts: Sequence[Prompt]) -> tuple[NDArray[np.uint8], list[list[int]]]:
    """The mask of each prompt and the tokens of its question."""
    rows = [retriever.prompt_ids(prompt) for prompt in prompts]
    spans = _spans(prompts, rows, retriever.store.manifest.span)
    codes = retriever.fingerprint.codes(question_means(retriever.base, rows, spans))
    return codes, [row[span.start : span.end] for row, span in zip(rows, spans, strict=True)]


def _spans(prompts: Sequence[Prompt], rows: Sequence[Sequence[int]], rule: SpanRule) -> list[Span]:
    spans = [find_span(ids, rule) for ids in rows]
    for prompt, span in zip(prompts, spans, strict=True):
        if span.start >= span.end:
            raise ConfigError(f"prompt {prompt!r} has no tokens to pool: leave it out of the file")
    return spans


def _share(
    index: HammingIndex,
    prompts: NDArray[np.uint8],
    edits: Sequence[int],
    rephrases: NDArray[np.uint8],
    own: Sequence[int],
    nearest: NDArray[np.int64],
    unrelated: NDArray[np.uint8],
    acting: NDArray[np.int64] | None = None,
) -> _Shared:
    def with_own(codes: NDArray[np.uint8], numbers: Sequence[int]) -> NDArray[np.int64]:
        """Bits in common with the best mask of the edit that each code belongs to."""
        best = [popcount(index.codes[index.ids == i] & code).max() for i, code in zip(numbers, codes, strict=True)]
        return np.array(best, dtype=np.int64)

    to_unrelated, overlaps = index.nearest(unrelated, 1)
    nearest_bits = np.rint(overlaps[:, 0] * index.k).astype(np.int64)
    acting_bits = nearest_bits
    if acting is not None:
        acts = np.flatnonzero(acting >= 0)
        acting_bits = np.zeros(len(unrelated), np.int64)
        acting_bits[acts] = with_own(unrelated[acts], acting[acts].tolist())
    return _Shared(
        k=index.k,
        edits=with_own(prompts, edits),
        rephrases=with_own(rephrases, own),
        is_nearest=nearest == np.asarray(own),
        unrelated=nearest_bits,
        nearest=to_unrelated[:, 0],
        acting=acting_bits,
    )


def _refuse_same_mask(shared: _Shared, unrelated: Sequence[str]) -> None:
    worst = int(shared.acting.argmax())
    if shared.acting[worst] == shared.k:
        raise ConfigError(
            f"unrelated prompt {unrelated[worst]!r} has the same mask as edit {shared.nearest[worst]} at k={shared.k}, "
            "so no tau keeps them apart: leave it out of the file, or choose a smaller k"
        )


def _overlaps(shared: NDArray[np.int64], k: int) -> tuple[float, ...]:
    return tuple(np.round(shared / k, 4).tolist())
