"""What a tau does in each context: edits and rephrasings that find their edit, unrelated prompts that match any.

python benchmarks/found_in_contexts.py DIR FILE
"""

from __future__ import annotations

import sys

from memoir_retrieval import EditedModel, read_edits
from memoir_retrieval.evaluation.calibration import unrelated_to
from memoir_retrieval.evaluation.contexts import UNSEEN, in_context
from memoir_retrieval.evaluation.measure import stored_ids

TAUS = (0.50, 0.51, 0.52, 0.53, 0.54, 0.55, 0.56)


def main(store: str, file: str) -> None:
    model = EditedModel.open(store, tau=0.001)  # so that every answer names the nearest edit
    edits = read_edits(file)
    ids = stored_ids(model.retriever.store.edits, edits)
    rephrases = [(i, text) for i, edit in zip(ids, edits, strict=True) for text in edit.rephrases]
    unrelated = unrelated_to(edits, edits)
    wanted = [*ids, *(i for i, _ in rephrases)]
    prompts = [*(edit.prompt for edit in edits), *(text for _, text in rephrases), *unrelated]
    print("context   tau   edits  rephrasings  unrelated")
    for context in ("plain", *UNSEEN):
        answers = model.predict(in_context(context, prompts), [model.target_ids("Yes")] * len(prompts))
        right = [a.overlap if a.edit == i else 0.0 for a, i in zip(answers, wanted, strict=False)]
        groups = right[: len(ids)], right[len(ids) :], [a.overlap for a in answers[len(wanted) :]]
        for tau in TAUS:
            shares = [sum(overlap >= tau for overlap in group) / len(group) for group in groups]
            print(f"{context:9} {tau:.2f}  {shares[0]:.3f}  {shares[1]:.3f}        {shares[2]:.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
