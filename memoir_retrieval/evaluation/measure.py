"""Measuring a store: the paper's teacher-forced scores, and what a user sees (`docs/reference/figures.md`)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Protocol

import msgspec

from memoir_retrieval.edits.record import Edit, Probe, StoredEdit, as_prompt, prompt_key
from memoir_retrieval.errors import ConfigError, Reason
from memoir_retrieval.evaluation.contexts import UNSEEN, in_context
from memoir_retrieval.evaluation.scores import (
    EditScores,
    ExactMatch,
    Generated,
    Matching,
    OtherWords,
    Portability,
    Report,
    Scores,
    TextPerplexity,
    holds,
    mean,
    same_share,
)
from memoir_retrieval.lookup.reference import Answer
from memoir_retrieval.question.prompts import Prompt

__all__ = ["AskableModel", "asked_back", "evaluate", "known_in_other_words", "measure", "stored_ids"]

CONTROL_TOKENS = 16
PORTABILITY_TOKENS = 24
SPARE_TOKENS = 8
"""So much longer than its target may an answer get before it is cut off."""
LIKELY = math.log(0.8)
"""From this logarithm of its probability on, a token counts as known: the published measure of ood texts."""


class AskableModel(Protocol):
    """A model that can be asked with edits on and off: `EditedModel`, or a running server."""

    def generate(
        self,
        prompts: Sequence[Prompt | list[int]],
        *,
        max_new_tokens: int,
        edited: bool = True,
        wanted: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Free answers, greedy, one for each prompt.

        prompts: text, messages or token ids.
        max_new_tokens: length of an answer at most.
        edited: whether edits may act.
        wanted: for each prompt the text that is hoped for; an answer that cannot become it may be given up. None
            generates all.
        """

    def predict(
        self, prompts: Sequence[Prompt | list[int]], targets: Sequence[Sequence[int]], *, edited: bool = True
    ) -> list[Answer]:
        """The model's first choices while it is fed the targets, one answer for each prompt.

        prompts: text, messages or token ids.
        targets: token ids of each prompt's target.
        edited: whether edits may act.
        """

    def compare(
        self, prompts: Sequence[Prompt | list[int]], targets: Sequence[Sequence[int]] | None = None
    ) -> tuple[list[Answer], list[Answer]]:
        """`predict`, or first choices of the prompts' own tokens where there are no targets, with edits on and off.

        prompts: text, messages or token ids.
        targets: token ids of each prompt's target, or None.
        """

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, in the form in which it is asked.

        prompt: text or messages.
        """

    def target_ids(self, target: str) -> list[int]:
        """Token ids of a target, as it follows a prompt.

        target: text.
        """


def evaluate(
    model: AskableModel,
    stored: Sequence[StoredEdit],
    edits: Sequence[Edit],
    *,
    tau: float,
    context: str = "plain",
    controls: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> Report:
    """Ask a model everything that a file of edits has to ask.

    >>> from memoir_retrieval import EditedModel, evaluate, read_edits
    >>> model = EditedModel.open("edits")
    >>> stored = model.retriever.store.edits
    >>> evaluate(model, stored, read_edits("corrections.jsonl"), tau=model.retriever.tau).reliability
    1.0

    model: an `EditedModel` or a `ServerModel`.
    stored: the edits of the store, by which a match is right or wrong.
    edits: what is measured; each must be stored.
    tau: the least overlap that matches, for the report.
    context: one of `CONTEXTS`, or "all": plainly, and in each of `UNSEEN`.
    controls: unrelated prompts whose free answers are compared with those of the unedited model.
    texts: unrelated texts whose perplexity is compared.

    Raises ConfigError where an edit of the file is not stored.
    """
    return measure(model, stored, edits, tau=tau, context=context, controls=controls, texts=texts)[0]


def measure(
    model: AskableModel,
    stored: Sequence[StoredEdit],
    edits: Sequence[Edit],
    *,
    tau: float,
    context: str = "plain",
    controls: Sequence[str] = (),
    texts: Sequence[str] = (),
    partly: bool = False,
) -> tuple[Report, list[EditScores]]:
    """`evaluate`, and what came of each edit (in the first context), in the order of `edits`.

    model, stored, edits, tau, context, controls, texts: see `evaluate`.
    partly: edits that are not stored, since training refused them, are asked all the same and count as not found.
    """
    started = time.monotonic()
    ids = stored_ids(stored, edits, partly)
    first = "plain" if context == "all" else context
    scores, per_edit = _in_context(model, ids, edits, tau, first, controls)
    probes = [(i, probe) for i, edit in zip(ids, edits, strict=True) for probe in edit.portability]
    ood = [(i, text) for i, edit in zip(ids, edits, strict=True) for text in edit.ood]
    report = Report(
        **{name: getattr(scores, name) for name in scores.__struct_fields__},
        portability=_portability(model, [probe for _, probe in probes], first),
        ood=known_in_other_words(model, ood),
        text=_text(model, texts),
    )
    if context == "all":
        others = {name: _in_context(model, ids, edits, tau, name, controls)[0] for name in UNSEEN}
        report = msgspec.structs.replace(report, contexts=others, context="all")
    return msgspec.structs.replace(report, seconds=round(time.monotonic() - started, 2)), per_edit


def asked_back(model: AskableModel, stored: Sequence[StoredEdit], edits: Sequence[Edit]) -> tuple[float, float]:
    """Reliability of the edits and the share that is found, and nothing else: what can be afforded again and again.

    model: which is asked.
    stored: the edits of the store.
    edits: what is asked; those that are not stored count as not found.
    """
    ids = stored_ids(stored, edits, partly=True)
    targets = [model.target_ids(edit.target) for edit in edits]
    answers = model.predict([model.prompt_ids(as_prompt(edit)) for edit in edits], targets)
    accuracy = [same_share(a.tokens, t) for a, t in zip(answers, targets, strict=True)]
    return mean(accuracy) or 0.0, mean([a.edit == i for a, i in zip(answers, ids, strict=True)]) or 0.0


def stored_ids(stored: Sequence[StoredEdit], edits: Sequence[Edit], partly: bool = False) -> list[int]:
    """The id under which each edit of a file is stored: with the same prompt, as `prompt_key` has it, and target.

    stored: the edits of the store.
    edits: those of the file.
    partly: gives -1 for an edit that is not stored.

    Raises ConfigError where one is not stored, or there are no edits.
    """
    ids = {(prompt_key(edit.prompt), edit.target): edit.id for edit in stored}
    keys = [(prompt_key(edit.prompt), edit.target) for edit in edits]
    missing = [edit.prompt for edit, key in zip(edits, keys, strict=True) if key not in ids]
    if not edits:
        raise ConfigError("the file has no edits: measure a store with the file it was made from")
    if missing and not partly:
        raise ConfigError(
            f"{len(missing)} of {len(edits)} edits of the file are not stored, such as {missing[0]!r}",
            cure="measure a store with the file it was made from, or with fewer of its edits",
            reason=Reason.MANY,
        )
    return [ids.get(key, -1) for key in keys]


def _in_context(
    model: AskableModel,
    ids: Sequence[int],
    edits: Sequence[Edit],
    tau: float,
    context: str,
    controls: Sequence[str],
) -> tuple[Scores, list[EditScores]]:
    started = time.monotonic()
    rephrases = [(i, text) for i, edit in enumerate(edits) for text in edit.rephrases]
    questions = [*(as_prompt(edit) for edit in edits), *(as_prompt(edits[i], text) for i, text in rephrases)]
    of = [*range(len(edits)), *(i for i, _ in rephrases)]
    prompts = [model.prompt_ids(prompt) for prompt in in_context(context, questions)]
    targets = [model.target_ids(edits[i].target) for i in of]
    answers = model.predict(prompts, targets)
    accuracy = [same_share(a.tokens, t) for a, t in zip(answers, targets, strict=True)]
    own_matches = [a.edit == ids[i] for a, i in zip(answers, of, strict=True)]
    exact = _exact(model, prompts, targets, [edits[i].target for i in of])

    n = len(edits)
    grouped: list[list[int]] = [[] for _ in edits]  # which questions are rephrasings of each edit
    for question, i in enumerate(of[n:], n):
        grouped[i].append(question)
    per_edit = [
        EditScores(
            id=ids[i],
            found=own_matches[i],
            reliability=round(accuracy[i], 5),
            generality=mean([accuracy[q] for q in grouped[i]]),
            exact=exact[i],
            rephrases=mean([exact[q] for q in grouped[i]]),
            perplexity=_perplexity(answers[i].logprobs),
        )
        for i in range(n)
    ]
    reliability, generality = mean(accuracy[:n]), mean(accuracy[n:])
    away = [p for e in edits for p in e.locality], [p for e in edits for p in e.neighbourhood]
    unchanged, matched = _unchanged(model, [*away[0], *away[1]], context)
    locality = mean(unchanged)
    known = [s for s in (reliability, generality, locality) if s is not None]
    targets_perplexity = [o.perplexity for o in per_edit if o.perplexity is not None]
    scores = Scores(
        edits=n,
        reliability=reliability or 0.0,
        generality=generality,
        locality=locality,
        average=sum(known) / len(known),
        exact_match=ExactMatch(mean(exact[:n]) or 0.0, mean(exact[n:])),
        match=Matching(mean(own_matches[:n]) or 0.0, mean(own_matches[n:]), mean(matched)),
        tau=tau,
        context=context,
        neighbourhood=mean(unchanged[len(away[0]) :]),
        perplexity=mean(targets_perplexity),
        generated=_generated(model, controls, context),
        seconds=round(time.monotonic() - started, 2),
    )
    return scores, per_edit


def _unchanged(model: AskableModel, probes: Sequence[Probe], context: str) -> tuple[list[float], list[bool]]:
    """For each probe the share of unchanged first choices of its answer, and whether it matched an edit."""
    targets = [model.target_ids(probe.answer if probe.answer.strip() else "Yes") for probe in probes]
    prompts = [model.prompt_ids(prompt) for prompt in in_context(context, [probe.prompt for probe in probes])]
    after, before = model.compare(prompts, targets)
    same = [same_share(a.tokens, b.tokens) for a, b in zip(after, before, strict=True)]
    return same, [a.edit is not None for a in after]


def _exact(
    model: AskableModel,
    prompts: Sequence[list[int]],
    targets: Sequence[list[int]],
    texts: Sequence[str],
) -> list[bool]:
    """Whether the free answer to each prompt is its target."""
    exact = [False] * len(prompts)
    groups: dict[int, list[int]] = {}  # by the target's length rounded up, since a batch runs until its longest may end
    for question, target in enumerate(targets):
        groups.setdefault(-(-len(target) // 4) * 4, []).append(question)
    for longest, group in groups.items():
        hoped = [texts[q] for q in group]
        answers = model.generate([prompts[q] for q in group], max_new_tokens=longest + SPARE_TOKENS, wanted=hoped)
        for q, answer in zip(group, answers, strict=True):
            exact[q] = answer.text.strip() == texts[q].strip()
    return exact


def _generated(model: AskableModel, controls: Sequence[str], context: str) -> Generated | None:
    if not controls:
        return None
    prompts = [model.prompt_ids(prompt) for prompt in in_context(context, controls)]
    after = model.generate(prompts, max_new_tokens=CONTROL_TOKENS)
    before = model.generate(prompts, max_new_tokens=CONTROL_TOKENS, edited=False)
    same = [a.tokens == b.tokens for a, b in zip(after, before, strict=True)]
    return Generated(len(prompts), mean(same) or 0.0, mean([a.edit is not None for a in after]) or 0.0)


def _portability(model: AskableModel, probes: Sequence[Probe], context: str) -> Portability | None:
    if not probes:
        return None
    prompts = [model.prompt_ids(prompt) for prompt in in_context(context, [probe.prompt for probe in probes])]
    targets = [model.target_ids(probe.answer) for probe in probes]
    predicted = model.predict(prompts, targets)
    accuracy = [same_share(a.tokens, t) for a, t in zip(predicted, targets, strict=True)]
    free = model.generate(prompts, max_new_tokens=PORTABILITY_TOKENS)
    answered = [
        any(holds(answer.text, right) for right in (probe.answer, *probe.aliases))
        for answer, probe in zip(free, probes, strict=True)
    ]
    return Portability(len(probes), mean(accuracy) or 0.0, mean(answered) or 0.0)


def known_in_other_words(model: AskableModel, texts: Sequence[tuple[int, str]]) -> OtherWords | None:
    """The published measure of texts in other words; None without texts.

    model: which is asked.
    texts: each with the id of its edit.
    """
    if not texts:
        return None
    after, before = model.compare([model.prompt_ids(text) for _, text in texts])

    def known(answers: Sequence[Answer]) -> float:
        return mean([mean([p >= LIKELY for p in a.logprobs]) or 0.0 for a in answers]) or 0.0

    matched = mean([a.edit == number for a, (number, _) in zip(after, texts, strict=True)])
    return OtherWords(len(texts), matched or 0.0, known(after), known(before))


def _text(model: AskableModel, texts: Sequence[str]) -> TextPerplexity | None:
    if not texts:
        return None
    after, before = model.compare([model.prompt_ids(text) for text in texts])
    edited, base = ([p for a in answers for p in a.logprobs] for answers in (after, before))
    matched = mean([a.edit is not None for a in after]) or 0.0
    return TextPerplexity(len(texts), len(base), _perplexity(edited) or 0.0, _perplexity(base) or 0.0, matched)


def _perplexity(logprobs: Sequence[float]) -> float | None:
    return round(math.exp(-sum(logprobs) / len(logprobs)), 5) if logprobs else None
