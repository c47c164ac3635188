#!/usr/bin/env bash
# ir-measures 0.4.3 (pytrec-eval-terrier 0.5.11): the reciprocal rank within ten is greater than the reciprocal rank.
#
# Seen: two edits have the same score for a question, and edit "1" is the right one. One call says RR@10 = 1, RR = 0.5
# and Success@1 = R@1 = 0. If edit "2" is the right one, RR@10 is 0.5 and all others are 1. Scores that differ behind
# the seventh digit, such as 100000001 and 100000000, are equal for all but RR@10. No warning.
# Expected: RR@10 <= RR, and RR = 1 exactly where Success@1 = 1: one order of the results for all measures of a call.
# Cause: RR@10 and RR are computed by two packages. One takes the smaller id first among equal scores, and reads scores
# in double precision; the other takes the greater id, and reads them in single precision.
# Why it matters here: Hamming distances and overlaps of masks are whole numbers, or such over k, so edits of questions
# that read alike are often equally near. Whoever compares routers by MRR@10 and recall gets figures that do not belong
# together, and a router with many ties gains or loses by how its edits are numbered. Scores without ties, such as
# minus the rank, give one order to both.
# Source: https://github.com/terrierteam/ir_measures/issues/18 (open)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ir-measures==0.4.3 pytrec-eval-terrier==0.5.11
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

import ir_measures
from ir_measures import RR, R, Success


def measured(scores, right):
    measures = [RR @ 10, RR, Success @ 1, R @ 1]
    values = ir_measures.calc_aggregate(measures, {"question": {right: 1}}, {"question": scores})
    print(f"scores {scores}, right {right}: {({str(measure): values[measure] for measure in measures})}")
    return [values[measure] for measure in measures]


print("ir-measures", version("ir-measures"), "pytrec-eval-terrier", version("pytrec-eval-terrier"))
tied = {"1": 0.75, "2": 0.75}
assert measured(tied, "1") == [1, 0.5, 0, 0], "changed: a tie, and the smaller id is right"
assert measured(tied, "2") == [0.5, 1, 1, 1], "changed: a tie, and the greater id is right"
near = [{"1": 100_000_001.0, "2": 100_000_000.0}, {"1": 100_000_000.0, "2": 100_000_001.0}]
assert measured(near[0], "1") == [1, 0.5, 0, 0], "changed: scores that differ in the ninth digit"
assert measured(near[1], "2") == [1, 1, 1, 1], "changed: RR@10 of scores that differ in the ninth digit"
ranks = {"1": -1.0, "2": -2.0}
assert measured(ranks, "1") == [1, 1, 1, 1] and measured(ranks, "2") == [0.5, 0.5, 0, 0], "changed: without ties"
PY
