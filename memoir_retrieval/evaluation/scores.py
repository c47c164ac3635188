"""What an evaluation tells. `docs/evaluation.md` explains each figure."""

from __future__ import annotations

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
]


class ExactMatch(msgspec.Struct, frozen=True):
    """Greedy generation with natural stop equals the target: the share of the edits, and of their rephrasings,
    None where there are none."""

    edits: float
    rephrases: float | None


class Matching(msgspec.Struct, frozen=True):
    """Share of prompts and of rephrasings that match their own edit; share of unrelated prompts that match any; None
    where there are none to ask."""

    edits_right: float
    rephrases_right: float | None
    false_rate: float | None


class Generated(msgspec.Struct, frozen=True):
    """Unrelated prompts answered freely: the share whose text is that of the unedited model, and that match an edit."""

    prompts: int
    identical: float
    matched: float


class Portability(msgspec.Struct, frozen=True):
    """Questions whose answer follows from an edit: the share of the answer's tokens that are first choices under
    teacher forcing, and the share of free answers that hold the answer or an alias of it."""

    questions: int
    accuracy: float
    answered: float


class OtherWords(msgspec.Struct, frozen=True):
    """Texts that tell an edit's knowledge in other words: the share that matches its edit, and the share of their
    tokens to which the model gives a probability of at least .8, with edits and without."""

    texts: int
    found: float
    known: float
    known_before: float


class TextPerplexity(msgspec.Struct, frozen=True):
    """Perplexity of texts that have nothing to do with the edits, with edits and without, and the share of the texts
    that match an edit."""

    texts: int
    tokens: int
    edited: float
    base: float
    matched: float


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured in every context. Scores are means over edits in [0, 1].

    reliability, generality: share of target tokens that are the model's first choice under teacher forcing, for
    the prompt and its rephrasings. locality: share of the tokens of unrelated and neighbouring answers whose first
    choice is that of the unedited model; neighbourhood: the same of neighbouring ones alone. perplexity: of the
    targets, the mean over edits. A score is None where there is nothing to measure it on.
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
    """One edit of an evaluation; its id is -1 where it is not stored.

    found: its prompt matches it. exact: its free answer equals the target; rephrases: the share of its rephrasings
    whose free answer does, None without any.
    """

    id: int
    found: bool
    reliability: float
    generality: float | None
    exact: bool
    rephrases: float | None
    perplexity: float | None
