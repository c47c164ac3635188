"""What weighing a question's tokens does: rephrasings that find their edit, and similar questions that must not.

python benchmarks/token_weights.py ZSRE_FILE

The first 100 questions with distinct subjects are the edits, the next 300 ask the like of other subjects. For each
way of pooling: the least tau on a grid of .01 that no unrelated prompt reaches, and at it the share of rephrasings
whose own edit is the nearest and matches, and of the like questions that match any edit.
"""

from __future__ import annotations

import sys

import msgspec
import numpy as np

from memoir_index import unpack
from memoir_retrieval import load_model, read_edits
from memoir_retrieval.background import background_prompts, control_prompts
from memoir_retrieval.edits.files import check_duplicates, limit_distinct_subjects
from memoir_retrieval.model.forward import question_means
from memoir_retrieval.model.presets import preset_for
from memoir_retrieval.question.fingerprint import Fingerprint, permutation
from memoir_retrieval.question.prompts import prompt_ids
from memoir_retrieval.question.span import derive_span_rule, find_span

EDITS, LIKE = 100, 300


def main(file: str) -> None:
    base = load_model("smollm2-135m")
    records = limit_distinct_subjects(check_duplicates(read_edits(file), "first"), EDITS + LIKE)
    controls = [prompt for prompt in control_prompts() if prompt not in background_prompts()]
    rephrases = [edit.rephrases[0] for edit in records[:EDITS]]
    groups = [background_prompts(), [edit.prompt for edit in records], rephrases, controls]
    ends = np.cumsum([len(group) for group in groups])[:-1]
    k = preset_for(base.model.config).k
    print("form  weighted   tau  rephrasings  like questions")
    for chat in (False, True):
        rows = [prompt_ids(base.tokenizer, text, chat=chat) for group in groups for text in group]
        for weighted in (False, True):
            rule = msgspec.structs.replace(derive_span_rule(base.tokenizer), weighted=weighted)
            means = question_means(base, rows, [find_span(ids, rule) for ids in rows])
            make = Fingerprint(means[: ends[0]].mean(0).numpy(), permutation(base.d, 0), k)
            masks = unpack(make.codes(means), base.d).astype(np.float32)
            _, questions, others, unrelated = np.split(masks, ends)
            edits, like = questions[:EDITS], questions[EDITS:]
            tau = np.ceil((unrelated @ edits.T).max() / k * 100 + 1e-9) / 100
            overlaps = others @ edits.T / k
            own_overlaps = overlaps.diagonal() * (overlaps.argmax(1) == np.arange(EDITS))
            matched = (like @ edits.T).max(1) / k >= tau
            scores = f"{(own_overlaps >= tau).mean():.3f}        {matched.mean():.3f}"
            print(f"{'chat' if chat else 'raw':5} {weighted!s:8}  {tau:.2f}  {scores}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
