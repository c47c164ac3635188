"""How many questions that differ from an edit in nothing but a name match one, as it is and where names are required.

    memoir edit examples/zsre-100.jsonl --model smollm2-135m --store chat
    python benchmarks/like_questions.py chat examples/zsre-100.jsonl [--each 5]

Each edit's prompt is asked about subjects of other edits. The store is looked up as it is (its edits should require
nothing), and once more as `memoir edit --require-subject` would have made it, which trains nothing else.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from memoir_retrieval import Retriever, read_edits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("file", type=Path, help="the edits with their subjects, as the store was made from")
    parser.add_argument("--each", type=int, default=5, help="other names for each question")
    given = parser.parse_args()
    free = Retriever.open(given.store)
    own = {edit.prompt: edit.id for edit in free.store.edits}
    edits = [edit for edit in read_edits(given.file) if edit.prompt in own and edit.subject in edit.prompt]
    random = np.random.default_rng(0)
    like = []
    for edit in edits:
        others = [other.subject for other in edits if other.subject not in edit.prompt]
        like += [edit.prompt.replace(edit.subject, name) for name in random.choice(others, given.each, replace=False)]
    rephrases = [(own[edit.prompt], text) for edit in edits for text in edit.rephrases]
    bound = tuple(msgspec.structs.replace(edit, requires=(edit.subject,)) for edit in free.store.edits)
    found = {"edits": len(own), "like": len(like), "rephrases": len(rephrases), "tau": free.tau}
    for name, store in (("free", free.store), ("required", replace(free.store, edits=bound))):
        retriever = Retriever(store, free.base)
        matched = retriever.lookup_batch(like)
        asked = retriever.lookup_batch([text for _, text in rephrases])
        right = [match is not None and match.id == edit for match, (edit, _) in zip(asked, rephrases, strict=True)]
        found[name] = {
            "like_matched": round(float(np.mean([match is not None for match in matched])), 4),
            "rephrases_found": round(float(np.mean(right)), 4),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
