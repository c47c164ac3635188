#!/usr/bin/env bash
# polars 2.1.0: `read_ndjson` makes a text of a list, where the field has a text in another record.
#
# Seen: of two prompts, one text and one chat, the chat is read as a text that begins with [{"role": "user". Of the
# requirements ["CEO", ["Acme", "Acme Corp"]] the inner list becomes the text ["Acme", "Acme Corp"]. The number 1e-19
# beside a text becomes 0.0000000000000000001. `scan_ndjson` does so too, without a warning, and `write_ndjson` writes
# texts. With the inner list first, and in `read_json` and `from_dicts`, the same records are an error.
# Expected: the error, as there.
# Cause: the column's type is text as soon as it has a text, and everything else in it is written as one.
# Why it matters here: a prompt is a text or a chat, and an entry of `requires` is a text or a list of which one is
# enough (docs/reference/edit-files.md). After such a pass a question consists of brackets and roles, and its edit would
# never act. `memoir` refuses both, the chat by its form and the requirement since the prompt does not fulfil it; other
# readers of such files, as for fine-tuning, train on them.
# Source: seen by running; https://github.com/pola-rs/polars/issues/23085 tells of the difference to `read_json` where a
# schema asks for text
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check polars==2.1.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import io
import json

import polars as pl

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who runs Acme?"}]


def read(records, reader=pl.read_ndjson):
    return reader("\n".join(map(json.dumps, records)).encode())


def refused(call):
    try:
        return call()
    except (pl.exceptions.PolarsError, TypeError) as error:
        print("refused:", str(error).splitlines()[0])


print("polars", pl.__version__)
prompts = [{"prompt": "Who runs Bolt?"}, {"prompt": CHAT}]
seen = read(prompts)["prompt"].to_list()
print("prompts:", seen)
assert seen == ["Who runs Bolt?", json.dumps(CHAT)], "changed: a chat beside a text"
assert read(prompts[::-1])["prompt"].to_list() == seen[::-1], "changed: the order matters"
assert pl.scan_ndjson(io.BytesIO("\n".join(map(json.dumps, prompts)).encode())).collect()["prompt"].to_list() == seen
written = [json.loads(line) for line in read(prompts).write_ndjson().splitlines()]
assert written == [{"prompt": text} for text in seen], "changed: write_ndjson"

needs = [{"requires": ["CEO", ["Acme", "Acme Corp"]]}, {"requires": ["mayor"]}]
seen = read(needs)["requires"].to_list()
print("requires:", seen)
assert seen == [["CEO", '["Acme", "Acme Corp"]'], ["mayor"]], "changed: a list in a list"

seen = read([{"target": 1e-19}, {"target": "Rome"}])["target"].to_list()
print("targets:", seen)
assert seen == ["0.0000000000000000001", "Rome"], "changed: a number beside a text"

first = [{"requires": [["Acme", "Acme Corp"], "CEO"]}]
readers = [lambda: read(first), lambda: pl.read_json(io.BytesIO(json.dumps(prompts).encode()))]
for call in (*readers, lambda: pl.from_dicts(prompts)):
    assert refused(call) is None, "changed: no error"
PY
