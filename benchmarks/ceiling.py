"""What rephrasings and texts in other words would score if each acted with its own edit, found or not.

    memoir bench quality temporal --edits 75 --out run
    python benchmarks/ceiling.py run/store temporal-edit.jsonl

Generality, and what `memoir eval` measures under `ood`, depend on two things: whether a text finds its edit, and what
that then does to it. Here each is asked of a store that holds nothing but its own edit, at a tau that everything
reaches, so that only the second is left: no threshold and no fingerprint can give more. Of texts in other words two
figures say how much there is to learn: how many of their tokens are known to the model without edits that has just read
the edit itself, and how many would be, were each pair of tokens of the edit known wherever it stands.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np

from memoir_retrieval.edits.files import read_edits
from memoir_retrieval.edits.record import Edit
from memoir_retrieval.evaluation.measure import LIKELY, known_in_other_words
from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.lookup.retriever import Retriever
from memoir_retrieval.store.read import Masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("file", type=Path, help="the edits with their texts, as the store was made from")
    parser.add_argument("--every", type=int, default=1, help="ask every n-th edit")
    options = parser.parse_args()
    whole = Retriever.open(options.store)
    store = whole.store
    stored = {(edit.prompt, edit.target): edit for edit in store.edits}
    known = [edit for edit in read_edits(options.file) if (edit.prompt, edit.target) in stored][:: options.every]
    scores: dict[str, list[float]] = {}
    for edit in known:
        edit_alone = msgspec.structs.replace(stored[edit.prompt, edit.target], requires=())
        rows = store.ids == edit_alone.id
        masks = Masks(store.codes[rows], store.ids[rows], store.memory_of[rows])
        alone = replace(store, masks=masks, additions=(), edits=(edit_alone,))
        model = EditedModel(Retriever(alone, whole.base, tau=0.01))
        target = model.target_ids(edit.target)
        prompts, targets = [model.prompt_ids(text) for text in edit.rephrases], [target] * len(edit.rephrases)
        for name, edited in (("generality", True), ("generality before", False)):
            answers = model.predict(prompts, targets, edited=edited) if prompts else []
            right = [float(np.mean([a == b for a, b in zip(x.tokens, target, strict=True)])) for x in answers]
            scores.setdefault(name, []).extend(right)
        if texts := known_in_other_words(model, [(edit_alone.id, text) for text in edit.ood]):
            for field, values in known_otherwise(model, edit).items():
                scores.setdefault(f"ood {field}", []).extend(values)
            for field in ("known", "known_before"):
                scores.setdefault(f"ood {field}", []).append(getattr(texts, field))
    print(f"{len(known)} edits asked")
    for name, values in scores.items():
        if values:
            print(f"{name:24s} {np.mean(values):.4f}")


def known_otherwise(model: EditedModel, edit: Edit) -> dict[str, list[float]]:
    """The share of the tokens of each text in other words that the model without edits knows: where it has read the
    edit before, and where each pair of tokens that stands in the edit counts as known."""
    edit_ids = model.prompt_ids(f"{edit.prompt} {edit.target}\n\n")
    pairs = set(pairwise(edit_ids))
    shares: dict[str, list[float]] = {"after reading it": [], "with its pairs": []}
    for ids in map(model.prompt_ids, edit.ood):
        (read,) = model.predict([[*edit_ids, ids[0]]], [ids[1:]], edited=False)
        (alone,) = model.score([ids], edited=False)
        shares["after reading it"].append(float(np.mean([p >= LIKELY for p in read.logprobs])))
        known = [p >= LIKELY or pair in pairs for p, pair in zip(alone.logprobs, pairwise(ids), strict=True)]
        shares["with its pairs"].append(float(np.mean(known)))
    return shares


if __name__ == "__main__":
    main()
