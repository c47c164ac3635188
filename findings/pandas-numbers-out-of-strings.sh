#!/usr/bin/env bash
# pandas 3.1.1: `read_json` makes numbers out of JSON strings, and `to_json` writes them as numbers.
#
# Seen: a column whose strings all look like numbers becomes numeric: "007" is 7, "1.10" is 1.1, "12_30" is 1230.
# Expected: a JSON string stays a string; JSON tells the two apart.
# Why it matters here: a user who reads, filters and writes an edit file with pandas changes targets. "1.10" as the answer to
# "Which version?" is then 1.1, and one other target in the column ("Jane Doe") would have kept all of them.
# Source: https://github.com/pandas-dev/pandas/issues/42471 (open); `dtype=False` leaves strings alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pandas==3.1.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import io
import json

import pandas

targets = ["007", "1.10"]
lines = "\n".join(json.dumps({"prompt": f"Question {i}?", "target": t}) for i, t in enumerate(targets))
frame = pandas.read_json(io.StringIO(lines), lines=True)
kept = pandas.read_json(io.StringIO(lines), lines=True, dtype=False)
print("pandas", pandas.__version__)
print("read:", frame["target"].tolist(), "with dtype=False:", kept["target"].tolist())
written = frame.to_json(orient="records", lines=True).split()
print("written:", frame.to_json(orient="records", lines=True))
assert frame["target"].tolist() == [7.0, 1.1]
assert kept["target"].tolist() == targets
underscore = pandas.read_json(io.StringIO('{"target": "12_30"}'), lines=True)
print("12_30 is read as", underscore["target"].tolist())
assert underscore["target"].tolist() == [1230]
PY
