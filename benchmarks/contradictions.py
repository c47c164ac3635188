"""How alike the masks of edits are that contradict each other: pairs of one subject with different targets.

    python benchmarks/contradictions.py STORE

Meant for the whole of `zsre_mend_edit`, in which a fact is asked in several wordings with different targets. The other
pairs of different targets say how often a threshold would be wrong.
"""

from __future__ import annotations

import sys

import numpy as np

from memoir_index import unpack
from memoir_retrieval import EditStore


def main() -> None:
    store = EditStore.open(sys.argv[1])
    first = np.unique(store.ids, return_index=True)[1]  # the prompt's own mask
    masks = unpack(store.codes[first], store.manifest.d).astype(np.float32)
    edits = sorted(store.edits, key=lambda edit: edit.id)
    above = np.triu_indices(len(edits), 1)
    overlap = (masks @ masks.T / store.manifest.k)[above]
    subject = np.array([edit.subject for edit in edits])
    target = np.array([edit.target for edit in edits])
    differ = target[above[0]] != target[above[1]]
    related = subject[above[0]] == subject[above[1]]
    print(f"{len(edits)} edits; pairs of one subject {(differ & related).sum()}, others {(differ & ~related).sum()}")
    for tau in np.arange(0.6, 1.0, 0.05):
        reach = differ & (overlap >= tau)
        print(f"{tau:.2f}: of one subject {(reach & related).sum()}, of different subjects {(reach & ~related).sum()}")


if __name__ == "__main__":
    main()
