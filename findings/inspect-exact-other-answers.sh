#!/usr/bin/env bash
# inspect-ai 0.3.285: scorers of exact matches say that "C++" is "C#", that 40 is -40 and that "Hepatitis" is
# "Hepatitis A".
#
# Seen: for the target "C#" the answers "C++" and "C" are right, by `exact()`, by `match(location="exact")` and with
# F1 = 1; so is "40" for the target "-40". `exact()` also takes "Hepatitis" for "Hepatitis A" and "Who" for "The Who".
# `match()` as it is takes "woman" for "man", and any answer at all for the target "+". No warning.
# Expected: a scorer that is named exact tells two answers apart that differ in what they mean.
# Cause: ASCII's punctuation is taken off both ends of the answer and of the target (of each word in `exact()`). The
# minus of a number and the signs of "C++" are among it. `exact()` also leaves out the words "a", "an" and "the", in
# any case. `match()` asks whether the answer ends with what is left of the target, also within a word. Every text ends
# with nothing.
# Why it matters here: targets of edits are as short as these. If the model says "C++" and the edit "C#", the model
# without the edit gets full marks, so the edit seems to change nothing. `exact_match` of `memoir eval` compares the
# whole texts. With inspect-ai, `match(numeric=True)` tells numbers apart; other targets need a scorer of your own
# (docs/how-to/evaluation.md).
# Source: seen by running. https://github.com/UKGovernmentBEIS/inspect_ai/issues/4620 (closed) was about decimal points;
# what is said of `match(location="exact")` is that the output must be equal, "modulo whitespace, etc."
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check inspect-ai==0.3.285
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import asyncio
from importlib.metadata import version

from inspect_ai.model import ModelOutput
from inspect_ai.scorer import Target, exact, f1, match
from inspect_ai.solver import TaskState

SCORERS = {
    "exact": exact(),
    "match exact": match(location="exact"),
    "f1": f1(),
    "match": match(),
    "match numeric": match(numeric=True),
}


async def scored(target, answer):
    output = ModelOutput.from_content("m", answer)
    state = TaskState(model="m", sample_id=1, epoch=1, input="?", messages=[], output=output)
    right = {name for name, scorer in SCORERS.items() if (await scorer(state, Target(target))).value in ("C", 1)}
    print(f"target {target!r}, answer {answer!r}: right by {sorted(right) or 'none'}")
    return right


async def main():
    print("inspect-ai", version("inspect-ai"))
    for target, answer in (("C#", "C++"), ("C#", "C"), ("C++", "C#")):
        assert await scored(target, answer) == set(SCORERS), "changed: signs at the end count"
    assert await scored("-40", "40") == set(SCORERS) - {"match numeric"}, "changed: the minus counts"
    for target, answer in (("Hepatitis A", "Hepatitis"), ("The Who", "Who")):
        assert await scored(target, answer) == {"exact", "f1"}, "changed: articles count"
    assert await scored("man", "woman") == {"match", "match numeric"}, "changed: a part of a word is none"
    assert await scored("+", "I do not know") == {"match", "match numeric"}, "changed: a sign as the target"
    assert await scored("Paris", "Rome") == set(), "changed: an answer that is wrong for all"


asyncio.run(main())
PY
