#!/usr/bin/env bash
# datasets 5.2.0 (pyarrow 26.0.1, pandas 3.1.1): one number among the texts of a field, and other texts of it change.
#
# Seen: six texts are read from a file as they are. With one record more, whose target is the number 7, "007" is 7,
# "1.10" is 1.1, "true" is True, "null" is None, and the title "Heroes" has lost the quotation marks that are part of
# it. `Dataset.map` does the same to what a function returns. In a list of `requires`, one entry that is a list makes
# a number of "1984". `to_json` writes the changed values. With `features` that say text for the field, "Ada Lind" gets
# quotation marks that the file does not have, and "007" gets none. No warning.
# Expected: JSON tells 7 from "7", so each value as it stands in the file.
# Cause: a field with values of several types gets the type `Json`, and its values are stored as JSON. A text that can
# be read as JSON is taken for one that is stored so already.
# Why it matters here: numbers and texts may both be targets. A file of edits that goes through `load_dataset` and
# `to_json` then teaches 7 where the answer is 007, and Heroes in place of "Heroes" (what became True, None, or a number
# with a point is refused). An answer that `map` collects is no longer what the server said: compared with the target,
# it is wrong. `load_dataset(..., on_mixed_types=None)` is an error instead.
# Source: seen by running; https://github.com/huggingface/datasets/pull/8027 brought the type
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
cd "$folder"
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import json

import datasets
from datasets import Dataset, Features, Value, load_dataset

datasets.disable_progress_bars()
TEXTS = ["Ada Lind", "007", "1.10", "true", "null", '"Heroes"']
CHANGED = ["Ada Lind", 7, 1.1, True, None, "Heroes"]


def read(values, field="target", **how):
    with open("edits.jsonl", "w") as file:
        for i, value in enumerate(values):
            file.write(json.dumps({"prompt": f"Question {i}?", field: value}) + "\n")
    return load_dataset("json", data_files="edits.jsonl", split="train", **how)


print("datasets", datasets.__version__)
alone, beside = read(TEXTS)["target"][:], read([*TEXTS, 7])["target"][:]
print("texts alone:", alone)
print("beside a 7: ", beside)
assert alone == TEXTS, "changed: texts alone are not kept"
assert list(map(repr, beside)) == list(map(repr, [*CHANGED, 7])), "changed: what becomes of texts beside a number"

answers = [*TEXTS, 7]
mapped = Dataset.from_dict({"i": range(len(answers))}).map(lambda row: {"answer": answers[row["i"]]})["answer"][:]
print("by map:     ", mapped)
assert list(map(repr, mapped)) == list(map(repr, beside)), "changed: map differs from load_dataset"

needs = read([["author", "1984"], ["author", ["novel", "book"]]], "requires")["requires"][:]
print("requires:   ", needs)
assert needs == [["author", 1984], ["author", ["novel", "book"]]], "changed: an entry of requires"

read([*TEXTS, 7]).to_json("out.jsonl")
written = [json.loads(line)["target"] for line in open("out.jsonl")]
print("written:    ", written)
assert list(map(repr, written)) == list(map(repr, beside)), "changed: to_json writes something else"

features = Features({"prompt": Value("string"), "target": Value("string")})
as_text = read([*TEXTS, 7], features=features)["target"][:]
print("as text:    ", as_text)
assert as_text == ['"Ada Lind"', *TEXTS[1:], "7"], "changed: features that say text"

datasets.logging.set_verbosity(datasets.logging.CRITICAL)
try:
    raise SystemExit(f"changed: no error, {read([*TEXTS, 7], on_mixed_types=None)['target'][:]}")
except datasets.exceptions.DatasetGenerationError as error:
    print("on_mixed_types=None:", error.__cause__)
PY
