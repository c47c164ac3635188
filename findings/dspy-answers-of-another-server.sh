#!/usr/bin/env bash
# dspy 3.4.1 (litellm 1.110.2): two servers that serve a model under one name share the cached answers of one.
#
# Seen: the same question is asked through dspy.LM("openai/m", api_base=...) of one server and then of another. The
# second answer is that of the first server, and the second server gets no request. In a later process the first server
# is gone, and its answer still comes. With another temperature or `cache=False` each server answers for itself. No
# warning, and the cache is on unless it is turned off.
# Expected: answers of the server that was asked.
# Cause: the request's address is left out of the cache's key, as the API key is; what is left is the model's name, the
# messages and the parameters.
# Why it matters here: a server with edits and one without them serve one model under one name. Whoever compares them,
# or two stores, through DSPy finds no difference: it looks as if the edits did nothing, or as if the base model had
# learnt them. `dspy.LM(..., cache=False)` asks each of them (docs/how-to/evaluation.md).
# Source: https://github.com/stanfordnlp/dspy/pull/10006 (closed; the key is the same in 3.4.1)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check dspy==3.4.1 litellm==1.110.2
cd "$folder"
cat > ask.py <<'PY'
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

os.environ.update(DSPY_CACHEDIR="cache", LITELLM_LOCAL_MODEL_COST_MAP="True")
import dspy


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.requests += 1
        self.rfile.read(int(self.headers["content-length"]))
        message = {"role": "assistant", "content": self.server.says}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        completion = {"id": "c", "created": 1, "model": "m", "object": "chat.completion"}
        body = json.dumps(completion | {"choices": choices, "usage": usage}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def server(says):
    it = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    it.says, it.requests = says, 0
    threading.Thread(target=it.serve_forever, daemon=True).start()
    return it


def ask(it, **how):
    before = it.requests
    lm = dspy.LM("openai/m", api_base=f"http://127.0.0.1:{it.server_port}/v1", api_key="none", **how)
    (answer,) = lm("Who runs Example Corp?")
    print(f"{it.says} was asked with {how or 'nothing else'}: {answer!r}, {it.requests - before} requests")
    return answer


if sys.argv[1] == "first":
    print("dspy", dspy.__version__)
    edited, base = server("the server with edits"), server("the base model")
    assert ask(edited) == edited.says and ask(edited, temperature=0.5) == edited.says
    assert ask(base) == edited.says and base.requests == 0, "changed: the base model is asked"
    assert ask(base, temperature=0.4) == ask(base, cache=False) == base.says, "changed: other settings share answers"
else:
    assert ask(server("a server of a later process")) == "the server with edits", "changed: the server is asked"
PY
"$folder/venv/bin/python" ask.py first
"$folder/venv/bin/python" ask.py later
