"""How many unrelated prompts match an edit, by the number of edits: at the tau that the store would set, and at others.

    python benchmarks/unrelated_prompts.py DIR PROMPTS --first 100 --first 1000

PROMPTS: text, one prompt a line. The first N edits of DIR are asked as a store of their own. Rephrasings are those of
the first --about edits; with --part only those of this part of `memoir bench routing`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from memoir_retrieval import Retriever
from memoir_retrieval.editing.open_store import make_references
from memoir_retrieval.evaluation.routing_data import plain_questions
from memoir_retrieval.evaluation.routing_run import with_first
from memoir_retrieval.lookup.retriever import Asked
from memoir_retrieval.store.threshold import bits_needed, set_tau

OTHERS = (0.40, 0.45, 0.50, 0.55, 0.60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--first", type=int, action="append")
    parser.add_argument("--about", type=int, default=0)
    parser.add_argument("--part", choices=("tune", "report"))
    options = parser.parse_args()
    whole = Retriever.open(options.store)
    store = whole.store
    references = store.references
    if not references.texts:
        references = make_references(whole.base, store.manifest, whole.fingerprint)
    lines = options.prompts.read_text("utf-8").splitlines()
    messages = _ask(whole, list(dict.fromkeys(line for line in lines if line.strip())))
    questions = [
        question
        for question in plain_questions(store.edits[: options.about])
        if question.name == "rephrasings" and options.part in (None, question.part)
    ]
    rephrasings = _ask(whole, [str(question.prompt) for question in questions])
    contexts = len(store.manifest.masked_contexts)
    for n in options.first or [len(store.edits)]:
        of = with_first(whole, n, keep_tau=True)
        own, threshold = set_tau(of.index, of.store.edits, references, of.judge, contexts)
        print(f"{n} edits: tau {own:.2f}, {threshold}, bound {threshold.bound:.5f}")
        nearest = of.index.nearest(np.concatenate([message.codes for message in messages]), 1)[1][:, 0]
        firsts = np.cumsum([0, *(len(message.codes) for message in messages[:-1])])
        bits = np.rint(np.maximum.reduceat(nearest, firsts) * of.index.k)
        there = [i for i, question in enumerate(questions) if question.edit < n]
        for tau in sorted({own, *OTHERS}):
            at = Retriever(of.store, of.base, tau)
            matched = sum(match is not None for match, _ in at.decide(messages))
            found = [match.id if match else -1 for match, _ in at.decide([rephrasings[i] for i in there])]
            right = sum(edit in questions[i].right for edit, i in zip(found, there, strict=True))
            print(
                f"  tau {tau:.2f}: near {np.mean(bits >= bits_needed(tau, of.index.k)):.4f}, matched {matched} of "
                f"{len(messages)}; rephrasings found {right} of {len(there)}",
                flush=True,
            )


def _ask(retriever: Retriever, prompts: list[str]) -> list[Asked]:
    messages = [asked for first in range(0, len(prompts), 64) for asked in retriever.ask(prompts[first : first + 64])]
    return [message for message in messages if message.questions]


if __name__ == "__main__":
    main()
