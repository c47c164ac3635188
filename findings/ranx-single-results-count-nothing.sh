#!/usr/bin/env bash
# ranx 0.3.21 (numba 0.68.1, numpy 2.3.5): in a fusion, the only result of a question counts nothing, whatever its score
# and weight.
#
# Seen: one run has one result for each of three questions, always the right one, so its MRR is 1. Another one has
# several, and the MRR 0.611. Fused with the norm that ranx takes by default, "min-max", and the weights 0.99 and 0.01,
# they have the order of the second run and its 0.611: what the first one says counts 0 points. So it is with the norms
# "sum" and "zmuv". Where several results of a question all have one score, they count 0 points too. With "max", "rank"
# and in `rrf` the results count, and the MRR is 1. No warning of it.
# Expected: a fusion in which a result that a run has is worth more than one that it does not have.
# Cause: the norm takes the least score of a question off all its scores. The least of one score is that score, which
# leaves 0, and a result that is missing counts 0 too.
# Why it matters here: a lookup by a threshold gives one edit or none. Whoever asks whether BM25 or embeddings go
# together with it finds that the lookup adds nothing, at any weight. Take `norm="rank"` or `method="rrf"`
# (docs/how-to/evaluation.md).
# Source: seen by running, and by reading the norm; its documentation has the formula and not the case of one score
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ranx==0.3.21 numba==0.68.1 numpy==2.3.5
cd "$folder"
HOME="$folder" NUMBA_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

from ranx import Qrels, Run, evaluate, fuse

print(*(f"{name} {version(name)}" for name in ("ranx", "numba", "numpy")))
right = Qrels({"q0": {"e0": 1}, "q1": {"e1": 1}, "q2": {"e2": 1}})
LOOKUP = {"q0": {"e0": 60.0}, "q1": {"e1": 55.0}, "q2": {"e2": 48.0}}
BM25 = {"q0": {"e1": 9.0, "e0": 7.5, "e2": 1.0}, "q1": {"e0": 8.0, "e2": 4.0, "e1": 1.0}, "q2": {"e2": 5.0, "e0": 4.0}}


def mrr(run):
    return float(evaluate(right, run, "mrr"))


def fused(lookup=LOOKUP, **how):
    if how.get("method") != "rrf":
        how = {"method": "wsum", "params": {"weights": (0.99, 0.01)}} | how
    run = fuse([Run(lookup), Run(BM25)], **how)
    points = {name: {edit: round(float(value), 4) for edit, value in run.run[name].items()} for name in BM25}
    print(f"{how}: MRR {mrr(run):.3f}, {points}")
    return mrr(run), points


print(f"MRR of the lookup {mrr(Run(LOOKUP)):.3f}, of BM25 {mrr(Run(BM25)):.3f}")
assert mrr(Run(LOOKUP)) == 1 and round(mrr(Run(BM25)), 3) == 0.611, "changed: the runs alone"
value, points = fused()
assert value == mrr(Run(BM25)), "changed: a lookup of one result counts"
assert points["q1"]["e1"] == 0 and points["q1"]["e0"] == 0.01, "changed: the points of a single result"
for norm in ("sum", "zmuv"):
    assert fused(norm=norm)[0] == mrr(Run(BM25)), f"changed: the norm {norm}"
same = {question: dict.fromkeys([*edits, "e8", "e9"], 60.0) for question, edits in LOOKUP.items()}
assert fused(same)[1]["q1"]["e1"] == 0, "changed: results with one score"
two = {question: edits | {"e9": 1.0} for question, edits in LOOKUP.items()}
assert fused(two)[0] == 1, "changed: a second result"
for how in ({"norm": "max"}, {"norm": "rank"}, {"method": "rrf"}):
    assert fused(**how)[0] == 1, f"changed: {how}"
PY
