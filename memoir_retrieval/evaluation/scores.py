"""The figures of an evaluation. `docs/reference/figures.md` explains each figure."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

__all__ = [
    "EditScores",
    "ExactMatch",
    "Generated",
    "Matching",
    "OtherWords",
    "Portability",
    "Report",
    "Scores",
    "TextPerplexity",
    "holds",
    "mean",
    "same_share",
]


class ExactMatch(msgspec.Struct, frozen=True):
    """Greedy generation with natural stop equals the target.

    edits: share of the edits.
    rephrases: share of their rephrasings, None where there are none.
    """

    edits: float
    rephrases: float | None


class Matching(msgspec.Struct, frozen=True):
    """What matches an edit.

    edits_right: share of prompts that match their own edit.
    rephrases_right: share of rephrasings that do, None where there are none.
    false_rate: share of unrelated prompts that match any edit, None where there are none.
    """

    edits_right: float
    rephrases_right: float | None
    false_rate: float | None


class Generated(msgspec.Struct, frozen=True):
    """Unrelated prompts answered freely.

    prompts: how many.
    identical: share whose text is that of the unedited model.
    matched: share that matches an edit.
    """

    prompts: int
    identical: float
    matched: float


class Portability(msgspec.Struct, frozen=True):
    """Questions whose answer follows from an edit.

    questions: how many.
    accuracy: share of the answer's tokens that are first choices under teacher forcing.
    answered: share of free answers that hold the answer or an alias of it.
    """

    questions: int
    accuracy: float
    answered: float


class OtherWords(msgspec.Struct, frozen=True):
    """Texts that say in other words what an edit says.

    texts: how many.
    found: share that matches its edit.
    known: share of their tokens to which the model gives a probability of at least .8, with edits.
    known_before: the same share without edits.
    """

    texts: int
    found: float
    known: float
    known_before: float


class TextPerplexity(msgspec.Struct, frozen=True):
    """Perplexity of texts that have nothing to do with the edits.

    texts: how many.
    tokens: how many they have together.
    edited: their perplexity with edits.
    base: their perplexity without.
    matched: share of the texts that match an edit.
    """

    texts: int
    tokens: int
    edited: float
    base: float
    matched: float


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured in every context. A score is the mean over everything of its kind that was asked, such as all
    rephrasings of all edits, in [0, 1]; None where there is nothing to measure.

    edits: how many were asked.
    reliability: share of target tokens that are the model's first choice under teacher forcing, for the prompt.
    generality: the same for its rephrasings.
    locality: share of the tokens of unrelated and neighbouring answers whose first choice is that of the unedited
        model.
    average: of reliability, generality and locality, those that there are.
    exact_match: of free answers.
    match: of the lookup.
    tau: the least overlap that matched.
    context: what stood before the questions, see `CONTEXTS`.
    seconds: what it took.
    neighbourhood: locality of neighbouring answers alone.
    perplexity: of the targets, the mean over edits.
    generated: of unrelated prompts answered freely.
    """

    edits: int
    reliability: float
    generality: float | None
    locality: float | None
    average: float
    exact_match: ExactMatch
    match: Matching
    tau: float
    context: str
    seconds: float
    neighbourhood: float | None
    perplexity: float | None
    generated: Generated | None


class Report(Scores, frozen=True, kw_only=True):
    """One evaluation: the scores of its context, what is only asked plainly, and the scores of further contexts.

    portability: questions whose answers follow from the edits, or None where the file has none.
    ood: the edits' knowledge in other words, or None.
    text: perplexity of unrelated texts, or None.
    contexts: the scores of each further context, by its name.
    """

    portability: Portability | None = None
    ood: OtherWords | None = None
    text: TextPerplexity | None = None
    contexts: dict[str, Scores] = {}


class EditScores(msgspec.Struct, frozen=True):
    """One edit of an evaluation.

    id: in the store; -1 where it is not stored.
    found: whether its prompt matches it.
    reliability: share of target tokens that are the model's first choice.
    generality: the same for its rephrasings, None without any.
    exact: whether its free answer equals the target.
    rephrases: share of its rephrasings whose free answer does, None without any.
    perplexity: of the target.
    """

    id: int
    found: bool
    reliability: float
    generality: float | None
    exact: bool
    rephrases: float | None
    perplexity: float | None


def mean(values: Sequence[float | bool]) -> float | None:
    """The mean, to five places; None of nothing.

    values: of which it is.
    """
    return round(sum(values) / len(values), 5) if values else None


def same_share(a: Sequence[int], b: Sequence[int]) -> float:
    """The share of places at which two rows of one length are the same.

    a, b: token ids.
    """
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(b)


def holds(text: str, target: str) -> bool:
    """Whether a target stands in a text as words of its own, in whatever case. An empty one stands nowhere.

    text: an answer.
    target: all of it must be there, punctuation too.
    """
    words = re.escape(target.strip().casefold())
    return bool(words) and re.search(rf"(?<!\w){words}(?!\w)", text.casefold()) is not None
