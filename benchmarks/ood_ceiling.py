"""How much of texts in other words a model knows once each text acts with its own edit, found or not.

    memoir bench quality temporal --edits 75 --out run
    python benchmarks/ood_ceiling.py run/store temporal-edit.jsonl

What `memoir eval` measures under `ood` depends on two things: whether a text finds its edit, and what that then does to
it. Here each text is asked of a store that holds nothing but its own edit, at a tau that everything reaches, so that
only the second is left: no threshold and no fingerprint can give more.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from memoir_retrieval.edit_files import read_edits
from memoir_retrieval.evaluation import known_in_other_words
from memoir_retrieval.reference import EditedModel
from memoir_retrieval.retriever import Retriever
from memoir_retrieval.store import Masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("file", type=Path, help="the edits with their texts, as the store was made from")
    given = parser.parse_args()
    whole = Retriever.open(given.store)
    store = whole.store
    stored = {edit.prompt: edit for edit in store.edits}
    found = []
    for edit in read_edits(given.file):
        if edit.ood and (own := stored.get(edit.prompt)):
            rows = store.ids == own.id
            masks = Masks(store.codes[rows], store.ids[rows], store.memory_of[rows])
            alone = replace(store, masks=masks, additions=(), edits=(own,))
            model = EditedModel(Retriever(alone, whole.base, tau=0.01))
            found.append(known_in_other_words(model, [(own.id, text) for text in edit.ood]))
    for name in ("found", "known", "known_before"):
        print(f"{name:13s} {np.mean([getattr(one, name) for one in found]):.4f}")


if __name__ == "__main__":
    main()
