"""Does the index answer as an exhaustive search does? Counts the differences in many lookups; there must be none.

python benchmarks/index_equals_oracle.py [--edits FILE ...] [--lookups 1000000] [--rows 5000] [--seed 0]

Without FILE the masks are synthetic ones of D=14336. With edit files, or names of published data sets in the folder
MEMOIR_DATA, they are made by the embedded model (D=1536) from prompts, rephrasings and unrelated questions: --rows
prompts are stored, a thousand others asked. In both cases most queries are stored masks with a random part of their
ones moved, every fourth to within two bits of a tau; 1 in 20 stored masks is there twice.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np

from memoir_index import HammingIndex, hamming_radius
from memoir_index.synthetic import MaskSource

BATCH = 250
OTHERS = 1000


def real_masks(files: Sequence[str], wanted: int) -> tuple[int, int, np.ndarray]:
    """d, k and the codes of so many prompts of edit files, as a raw store of the embedded model makes them."""
    from memoir_retrieval import read_edits
    from memoir_retrieval.background import background_prompts
    from memoir_retrieval.evaluation.datasets import data_file
    from memoir_retrieval.model.base import load_model
    from memoir_retrieval.model.forward import question_means
    from memoir_retrieval.model.presets import preset_for
    from memoir_retrieval.question.fingerprint import Fingerprint, permutation
    from memoir_retrieval.question.span import Span

    texts: list[str] = []
    for name in files:
        edits = read_edits(data_file(name, Path(os.environ.get("MEMOIR_DATA", "."))))
        prompts = [[edit.prompt, *edit.rephrases, *(probe.prompt for probe in edit.locality)] for edit in edits]
        texts += [text for group in prompts for text in group][:wanted]
    texts = list(dict.fromkeys(texts))
    random.Random(0).shuffle(texts)
    texts = texts[:wanted]
    base = load_model("smollm2-135m")
    rows = [base.tokenizer(text)["input_ids"] for text in [*background_prompts(), *texts]]
    means = question_means(base, rows, [Span(0, len(row)) for row in rows])
    background = means[: len(rows) - len(texts)].mean(0).numpy()
    k = preset_for(base.model.config).k
    return base.d, k, Fingerprint(background, permutation(base.d, 0), k).codes(means[len(rows) - len(texts) :])


def queries(source: MaskSource, stored: np.ndarray, others: np.ndarray, needed: np.ndarray) -> np.ndarray:
    """A batch: variants of stored masks, some with almost exactly the `needed` ones, int [Q], in common, and
    unrelated masks."""
    rng, k = source.rng, source.k
    shared = rng.integers(2 * k // 5, k + 1, BATCH)
    near = rng.random(BATCH) < 0.25
    shared[near] = np.clip(needed[near] + rng.integers(-2, 3, near.sum()), 0, k)
    batch = source.variants(stored[rng.integers(len(stored), size=BATCH)], shared)
    unrelated = rng.random(BATCH) < 0.2
    batch[unrelated] = others[rng.integers(len(others), size=unrelated.sum())]
    return batch


def main() -> None:
    """Ask each query at three thresholds and print one line for each; exit code 1 if there was a difference."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--edits", nargs="+", metavar="FILE", help="edit files, or names of data sets")
    ask.add_argument("--lookups", type=int, default=1_000_000)
    ask.add_argument("--rows", type=int, default=5000)
    ask.add_argument("--seed", type=int, default=0)
    options = ask.parse_args()

    d, k, masks = real_masks(options.edits, options.rows + OTHERS) if options.edits else (14336, 4096, None)
    source = MaskSource(d, k, options.seed)
    if masks is None:
        masks = source.masks(options.rows + OTHERS)
    stored, others = masks[: options.rows], masks[options.rows :]
    twice = source.rng.random(len(stored)) < 0.05
    stored[np.flatnonzero(twice)[1:]] = stored[np.flatnonzero(twice)[:-1]]
    oracle = faiss.IndexBinaryFlat(d)
    oracle.add(stored)
    # D=1536 is too short for a sketch by default; a third of it tells masks apart from tau=.6 on.
    sketch, taus = (None, (0.5, 0.55, 0.7)) if d > 8192 else (d // 3, (0.5, 0.65, 0.8))
    index = HammingIndex.from_codes(d, k, np.arange(len(stored)) * 3, stored, sketch=sketch)

    began, done = time.monotonic(), 0
    matched, differ = np.zeros(len(taus), int), np.zeros(len(taus), int)
    radii = [hamming_radius(tau, k) for tau in taus]
    while done * len(taus) < options.lookups:
        batch = queries(source, stored, others, k - source.rng.choice(radii, BATCH) // 2)
        distance, row = (result[:, 0] for result in oracle.search(batch, 1))
        true = (k - distance / 2) / k
        for i, tau in enumerate(taus):
            hits, match = index.search(batch, tau), distance <= radii[i]
            same = (hits.rows == np.where(match, row, -1)) & (hits.ids == np.where(match, row * 3, -1))
            same &= np.where(match, hits.overlaps == true, hits.overlaps <= true)
            differ[i] += (~same).sum()
            matched[i] += match.sum()
        done += BATCH
    print(f"d={d}, {len(stored)} masks, {time.monotonic() - began:.0f} s")
    for i, tau in enumerate(taus):
        plan = index.plan(tau).kind
        print(f"tau={tau} plan={plan}: {done} lookups, {matched[i]} matched, {differ[i]} differ")
    raise SystemExit(1 if differ.any() else 0)


if __name__ == "__main__":
    main()
