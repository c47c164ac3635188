"""How many questions that are like an edit match it and must not: about another name, or asking another thing of it.

    memoir edit examples/zsre-100.jsonl --model smollm2-135m --store chat
    python benchmarks/like_questions.py chat examples/zsre-100.jsonl [--each 3]

Every question is an edit's prompt with the subject of another edit in it, so by what it asks it is like the one and by
its name like the other; both have another answer. Asked of the store as it is (its edits should require nothing), and
as `memoir edit --require-subject` would have made it, which trains nothing else. Shares for each tau.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from memoir_retrieval import Retriever, read_edits

TAUS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)


def shares(retriever: Retriever, prompts: Sequence[str], edits: Sequence[int]) -> dict[float, float]:
    """For each tau, how many prompts match the edit of that number."""
    found = retriever.lookup_batch(prompts)
    overlaps = [one.overlap if one and one.id == edit else 0.0 for one, edit in zip(found, edits, strict=True)]
    return {tau: round(float(np.mean([overlap >= tau for overlap in overlaps])), 3) for tau in TAUS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("file", type=Path, help="the edits with their subjects, as the store was made from")
    parser.add_argument("--each", type=int, default=3, help="other names for each question")
    given = parser.parse_args()
    free = Retriever.open(given.store)
    own = {edit.prompt: edit.id for edit in free.store.edits}
    edits = [edit for edit in read_edits(given.file) if edit.prompt in own and edit.subject in edit.prompt]
    random = np.random.default_rng(0)
    like = []
    for edit in edits:
        others = [other for other in edits if other.subject not in edit.prompt]
        for at in random.choice(len(others), given.each, replace=False):
            name = others[at]
            like.append((edit.prompt.replace(edit.subject, name.subject), own[edit.prompt], own[name.prompt]))
    rephrases = [(text, own[edit.prompt]) for edit in edits for text in edit.rephrases]
    bound = tuple(msgspec.structs.replace(edit, requires=(edit.subject,)) for edit in free.store.edits)
    print(json.dumps({"edits": len(own), "like": len(like), "rephrases": len(rephrases), "tau": free.tau}))
    for name, store in (("nothing required", free.store), ("subject required", replace(free.store, edits=bound))):
        retriever = Retriever(store, free.base, tau=min(TAUS))
        prompts = [prompt for prompt, _, _ in like]
        print(name)
        print("  rephrasings find their edit    ", shares(retriever, *zip(*rephrases, strict=True)))
        print("  another name: its question     ", shares(retriever, prompts, [edit for _, edit, _ in like]))
        print("  another question: its name     ", shares(retriever, prompts, [edit for _, _, edit in like]))


if __name__ == "__main__":
    main()
