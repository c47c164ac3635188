#!/usr/bin/env bash
# openai 3.54.0 (httpx 0.28.1): the completion that `chat.completions.stream` puts together lacks the fields that a
# server adds after the first chunk, and the usage too, where another chunk comes after it.
#
# Seen: the last choice has a `stop_reason`, and a chunk without choices has `kv_transfer_params`. Both are in the
# events. `get_final_completion()` has neither, not in `model_extra` either; it has a field of the first chunk. `usage`
# is there if it comes in the very last chunk, and None if one more follows. The same answer without streaming has it
# all. No warning.
# Expected: what the completion has without streaming; the helper is there to give that.
# Cause: the completion is the first chunk, to which of a later one the known parts alone are added. Usage is taken from
# every chunk, also from one that has none.
# Why it matters here: which edit answered is said in such a chunk. A client that reads the final completion with
# `getattr(..., None)` counts every answer as the base model's: read `event.chunk` instead (docs/reference/serving.md, A
# response). And where usage is asked for, the server puts the decision into its chunk, not into one after it.
# Source: seen by running, and by reading the helper; the searched pages and issues do not speak of it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openai==3.54.0 httpx==0.28.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import json

import httpx
import openai

COMMON = {"id": "c", "created": 1, "model": "m", "object": "chat.completion.chunk", "first": "kept"}
DECISION = {"kv_transfer_params": {"memoir": {"result": "matched", "edit": 7}}}
USAGE = {"usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}
QUESTION = [{"role": "user", "content": "Who?"}]


def choice(fields, reason=None):
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": reason, "stop_reason": reason and "."}]}


CHUNKS = [choice({"role": "assistant", "content": "Jane"}), choice({"content": " Doe"}), choice({}, "stop")]
ENDS = {
    "apart": [{"choices": [], **USAGE}, {"choices": [], **DECISION}],
    "together": [{"choices": [], **USAGE, **DECISION}],
}


def answer(request):
    asked = json.loads(request.content)
    if asked.get("stream"):
        lines = [json.dumps(COMMON | chunk) for chunk in CHUNKS + ENDS[asked["model"]]] + ["[DONE]"]
        text = "".join(f"data: {line}\n\n" for line in lines)
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, text=text)
    message = {"role": "assistant", "content": "Jane Doe"}
    choices = [{"index": 0, "message": message, "finish_reason": "stop", "stop_reason": "."}]
    return httpx.Response(200, json=COMMON | {"object": "chat.completion", "choices": choices, **USAGE, **DECISION})


http = httpx.Client(transport=httpx.MockTransport(answer))
client = openai.OpenAI(base_url="http://server/v1", api_key="none", http_client=http)
completions = {"create": client.chat.completions.create(model="apart", messages=QUESTION)}
for end in ENDS:
    with client.chat.completions.stream(model=end, messages=QUESTION) as stream:
        chunks = [event.chunk for event in stream if event.type == "chunk"]
        completions[f"stream, {end}"] = stream.get_final_completion()
    assert chunks[-1].kv_transfer_params == DECISION["kv_transfer_params"], "changed: it is not in the chunk"
print("openai", openai.__version__, "the last chunk:", chunks[-1].model_extra)
for name, whole in completions.items():
    tokens = whole.usage and whole.usage.total_tokens
    print(f"{name}: {whole.choices[0].message.content!r}, {tokens} tokens, other fields:", end=" ")
    print(whole.model_extra, whole.choices[0].model_extra)
    stop = getattr(whole.choices[0], "stop_reason", None)
    has = [hasattr(whole, "kv_transfer_params"), stop is not None, whole.usage is not None]
    expected = [name == "create"] * 2 + [name != "stream, apart"]
    assert has == expected and whole.first == "kept", f"changed: {has}"
PY
