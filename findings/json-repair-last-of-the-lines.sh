#!/usr/bin/env bash
# json-repair 0.64.6: of JSON lines that have the same keys only the last one is left.
#
# Seen: three edits, one a line, each line valid JSON: `loads` gives the third as a dict. So do `repair_json` and two
# fenced blocks of an answer with prose between them. Of edits whose second one has `rephrases` all three are there, in
# a list. With two entries of `rephrases` in the first and second and one in the third, the first is lost. An array of
# the same three edits keeps them all, also where it lacks its last bracket. No warning, and the log of `logging=True`
# does not say that edits are gone.
# Expected: three edits in a list, as where their keys differ, or an error, as with `strict=True`.
# Cause: a value that follows another one without a comma is taken for an update of it, where both have the same keys,
# types and lengths of lists. What the fields say does not count. A single value is given without a list.
# Why it matters here: models write edits, and an edit file is such lines. A program that reads an answer by
# `json_repair.loads` and takes a dict for a list of one teaches the last edit alone, and which ones are lost depends on
# the optional fields. Read an answer line by line, or ask for an array (docs/reference/edit-files.md).
# Source: seen by running, and by reading the parser; https://github.com/mangiucugna/json_repair/issues/157 (closed) has
# the symptom
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check json-repair==0.64.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import json
import warnings
from importlib.metadata import version

import json_repair

warnings.simplefilter("error")
print("json-repair", version("json-repair"))
ACME = {"prompt": "Who runs Acme?", "target": "Jane Doe"}
GRAZ = {"prompt": "Who is the mayor of Graz?", "target": "Ada Lind"}
MILK = {"prompt": "What does milk cost?", "target": "2 euros"}


def lines(*edits):
    return "\n".join(json.dumps(edit) for edit in edits)


def read(name, text):
    found = json_repair.loads(text)
    print(f"{name}: {json.dumps(found)}")
    return found


edits = [ACME, GRAZ, MILK]
assert [json.loads(line) for line in lines(*edits).splitlines()] == edits
assert read("three lines", lines(*edits)) == MILK, "changed: lines with the same keys"
assert json.loads(json_repair.repair_json(lines(*edits))) == MILK, "changed: the repaired text"
fenced = [f"```json\n{json.dumps(edit)}\n```" for edit in (ACME, GRAZ)]
assert read("two blocks", f"The first edit:\n{fenced[0]}\nThe second one:\n{fenced[1]}\n") == GRAZ, "changed: blocks"

other = [ACME, GRAZ | {"rephrases": ["Graz: its mayor?"]}, MILK]
assert read("other keys in the second", lines(*other)) == other, "changed: lines with other keys"
both = [edit | {"rephrases": ["Name it.", "Say it."]} for edit in (ACME, GRAZ)] + [MILK | {"rephrases": ["Price?"]}]
assert read("lists of 2, 2 and 1", lines(*both)) == both[1:], "changed: lists of the same length"

found, log = json_repair.loads(lines(*edits), logging=True)
print("the log:", [entry["text"] for entry in log])
assert found == MILK and not any("update" in entry["text"].lower() for entry in log), "changed: the log"
assert read("an array", json.dumps(edits)) == edits, "changed: an array"
assert read("an array without its end", json.dumps(edits)[:-1]) == edits, "changed: an array without its end"
try:
    json_repair.loads(lines(*edits), strict=True)
except ValueError as error:
    print("strict:", error)
else:
    raise AssertionError("changed: no error with strict=True")
PY
