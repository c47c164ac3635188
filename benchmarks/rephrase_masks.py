"""What masks of rephrasings gain: one rephrasing of each edit is trained, another one asked, without and with masks.

    python benchmarks/rephrase_masks.py counterfact_portability_gpt4.jsonl FOLDER [--edits 100]

Takes edits with at least two rephrasings, raw prompts; makes two stores in FOLDER and prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import msgspec

from memoir_retrieval import EditedModel, Editor, EditStore, Retriever, evaluate, read_edits
from memoir_retrieval.edits.files import check_duplicates, limit_distinct_subjects
from memoir_retrieval.model.base import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--model", default="smollm2-135m")
    options = parser.parse_args()
    base = load_model(options.model)
    several = [edit for edit in check_duplicates(read_edits(options.file), "first") if len(edit.rephrases) > 1]
    edits = limit_distinct_subjects(several, options.edits)
    trained = [msgspec.structs.replace(edit, rephrases=edit.rephrases[:1]) for edit in edits]
    questions = [msgspec.structs.replace(edit, rephrases=edit.rephrases[1:2]) for edit in edits]
    result: dict[str, object] = {"edits": len(edits)}
    for name, masks in (("without", False), ("with", True)):
        with Editor(base, options.folder / name, chat=False) as editor:
            editor.add(trained, on_conflict="both", keep_failed=True, rephrase_masks=masks)
        model = EditedModel(Retriever(EditStore.open(options.folder / name), base))
        report = evaluate(model, model.retriever.store.edits, questions, tau=model.retriever.tau)
        result[name] = {
            "reliability": report.reliability,
            "generality": report.generality,
            "exact_rephrases": report.exact_match.rephrases,
            "rephrases_found": report.match.rephrases_right,
            "false_matches": report.match.false_rate,
            "neighbourhood": report.neighbourhood,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
