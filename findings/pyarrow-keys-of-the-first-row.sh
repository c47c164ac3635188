#!/usr/bin/env bash
# pyarrow 26.0.1: keys that the first record does not have are dropped without a word.
#
# Seen: `Table.from_pylist` makes the columns from the first record. A later record's `rephrases` is gone; a key that only
# the first one has is None in the others.
# Expected: the columns of all records, or an error. pandas' DataFrame(records) and pyarrow's own JSON reader take all.
# Why it matters here: most fields of an edit are optional. A file of edits that goes through a table, as with Ray Data or
# `datasets`, loses rephrasings, locality prompts and `requires` when its first edit has none; an edit without its
# `requires` acts on questions that it was never meant for.
# Source: the reference of `from_pylist` says that the schema is inferred from the first row; that data is dropped it does
# not say.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import io
import json

import pyarrow as pa
import pyarrow.json

records = [
    {"prompt": "Who runs Example Corp?", "target": "Jane Doe"},
    {"prompt": "Who founded Exampleton?", "target": "Ada Lind", "rephrases": ["Who started Exampleton?"]},
]
table = pa.Table.from_pylist(records)
lines = io.BytesIO("\n".join(map(json.dumps, records)).encode())
print("pyarrow", pa.__version__)
print("from_pylist:", table.column_names)
names = pyarrow.json.read_json(lines).column_names
print("read_json:", names)
assert table.column_names == ["prompt", "target"]
assert names == ["prompt", "target", "rephrases"]
PY
