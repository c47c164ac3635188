#!/usr/bin/env bash
# numpy 2.3.5 cuts letters off where it changes their case, and lm-eval 0.4.13 then takes a wrong answer for the target.
#
# Seen: np.strings.upper of "Gießen" is "GIESSE", np.strings.lower of "İzmir 1" is "i̇zmir ": as long as before, in
# characters. Python's own methods, and numpy's StringDType, give "GIESSEN" and "i̇zmir 1". So the metric `exact_match`
# of lm-eval with `ignore_case` is 1.0 for the answer "İzmir 1" to the target "İzmir 2", and for "İç" to "İn". No
# warning.
# Expected: every letter; 0.0 for answers that differ.
# Cause: the result has the dtype of what came in, `<U7`, and what does not fit is left out. `ß`, `İ`, `ŉ`, `ǰ` and
# ligatures are more characters in the other case. Of lm-eval one answer is one array, so that the width is exactly its
# own.
# Why it matters here: names are what edits correct, and Turkish ones begin with İ. Two targets that differ in the last
# letter count as the same, so a failed edit counts as a good one. `memoir eval` compares strings of Python.
# Source: seen by running; numpy's page says that str.lower is called on each element.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check lm-eval==0.4.13 numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

import numpy as np
from lm_eval.api.metrics import exact_match_fn

print("numpy", np.__version__, "lm-eval", version("lm-eval"))
for text, method in (("Gießen", "upper"), ("İzmir 1", "lower"), ("ﬁlm", "upper")):
    fixed = str(getattr(np.strings, method)(np.array([text]))[0])
    free = str(getattr(np.strings, method)(np.array([text], dtype=np.dtypes.StringDType()))[0])
    print(f"{text!r}.{method}(): Python {getattr(text, method)()!r}, numpy {fixed!r}, StringDType {free!r}")
    assert free == getattr(text, method)(), "changed: StringDType cuts, too"
    assert fixed == free[: len(text)] and fixed != free, "changed: nothing is cut off"
for answer, target in (("İzmir 1", "İzmir 2"), ("İç", "İn"), ("Izmir 1", "Izmir 2")):
    pair = {"predictions": [answer], "references": [target]}
    score = {how: float(exact_match_fn(**pair, ignore_case=how)["exact_match"]) for how in (False, True)}
    print(f"answer {answer!r}, target {target!r}: exact_match {score[False]}, with ignore_case {score[True]}")
    assert score == {False: 0.0, True: float(answer[0] == "İ")}, "changed"
PY
