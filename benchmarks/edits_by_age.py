"""How a store's edits are answered by age, the oldest first: what later edits cost earlier ones.

    python benchmarks/edits_by_age.py STORE EDITS.jsonl [--every 4] [--bins 6]

An answer is right where each of its tokens, the end token included, is the model's first choice under teacher forcing:
then greedy generation gives it too. Products are rounded to bfloat16 where training rounds them.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext

import numpy as np

from memoir_retrieval import EditedModel, read_edits
from memoir_retrieval.model.bfloat16 import HalfProducts, half_is_faster
from memoir_retrieval.question.prompts import end_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("file")
    parser.add_argument("--every", type=int, default=1, help="ask every n-th edit")
    parser.add_argument("--bins", type=int, default=6)
    options = parser.parse_args()
    model = EditedModel.open(options.store)
    base, stored = model.base, list(model.retriever.store.edits)
    ids = {(edit.prompt, edit.target): edit.id for edit in stored}
    known = [edit for edit in read_edits(options.file) if (edit.prompt, edit.target) in ids]
    edits = sorted(known, key=lambda edit: ids[edit.prompt, edit.target])[:: options.every]
    result: dict[str, object] = {
        "edits": len(stored),
        "asked": len(edits),
        "memories": len(model.retriever.store.memories),
    }
    with HalfProducts(base).used() if half_is_faster(base) else nullcontext():
        for kind in ("prompts", "rephrasings"):
            questions = [(e, p) for e in edits for p in ([e.prompt] if kind == "prompts" else e.rephrases)]
            targets = [[*model.target_ids(edit.target), end_token(base.tokenizer)] for edit, _ in questions]
            answers = model.predict([prompt for _, prompt in questions], targets)
            pairs = list(zip(answers, targets, strict=True))
            right = np.array([np.mean([a == b for a, b in zip(x.tokens[:-1], t[:-1], strict=True)]) for x, t in pairs])
            exact = np.array([list(answer.tokens) == target for answer, target in pairs])
            own_matches = [x.edit == ids[e.prompt, e.target] for x, (e, _) in zip(answers, questions, strict=True)]
            result[kind] = {
                "tokens": round(float(right.mean()), 4),
                "exact": round(float(exact.mean()), 4),
                "own_edit_found": round(float(np.mean(own_matches)), 4),
                "tokens_by_age": [round(float(part.mean()), 3) for part in np.array_split(right, options.bins)],
                "exact_by_age": [round(float(part.mean()), 3) for part in np.array_split(exact, options.bins)],
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
