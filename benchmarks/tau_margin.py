"""How many unrelated prompts match at the tau that `memoir calibrate` suggests, by the margin in its rule.

python benchmarks/tau_margin.py DIR PROMPTS

PROMPTS: text, one unrelated prompt a line, some thousands of them. 200 are drawn, tau is taken from them, and the rest
is asked; 400 times.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from memoir_index import hamming_radius
from memoir_retrieval import Retriever
from memoir_retrieval.evaluation.calibration import calibrate_store
from memoir_retrieval.store.threshold import MARGIN, least_tau

DRAWS, DRAWN = 400, 200


def main(store: str, file: str) -> None:
    """Print one line a margin."""
    retriever = Retriever.open(store)
    k = retriever.store.manifest.k
    prompts = list(dict.fromkeys(line for line in Path(file).read_text("utf-8").splitlines() if line.strip()))
    rephrases = [(edit.id, text) for edit in retriever.store.edits for text in edit.rephrases]
    overlaps = calibrate_store(retriever, rephrases, prompts).overlaps
    shared = np.rint(np.array(overlaps.unrelated) * k).astype(np.int64)
    print(
        f"{len(prompts)} prompts, largest overlap {max(overlaps.unrelated)}, deviation {np.std(overlaps.unrelated):.3f}"
    )
    random = np.random.default_rng(0)
    draws = [random.permutation(shared) for _ in range(DRAWS)]
    for margin in (0.0, 0.01, 0.02, 0.03):
        taus = np.array([least_tau(draw[:DRAWN], k) - MARGIN + margin for draw in draws])
        needed = [k - hamming_radius(float(tau), k) // 2 for tau in taus]
        matched = [np.mean(draw[DRAWN:] >= least) for draw, least in zip(draws, needed, strict=True)]
        print(
            f"margin {margin:.2f}: tau {taus.mean():.3f} +- {taus.std():.3f}, "
            f"others that match {np.mean(matched):.5f}, worst draw {max(matched):.5f}",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:3])
