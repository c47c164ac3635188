"""Answers in forms that a server forces on a model: JSON under a grammar, and content behind thinking."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import Server
from thinking_models import save_thinking

from memoir_retrieval import Edit, Editor, Training, load_model
from memoir_retrieval.edits.files import read_edits

pytestmark = [pytest.mark.engine, pytest.mark.slow]

EDITS = read_edits(Path(__file__).parents[2] / "examples" / "zsre-100.jsonl")[:4]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server with a reasoning parser, on a template that opens a think tag unless a request switches that off."""
    folder = tmp_path_factory.mktemp("answers")
    model = save_thinking(folder / "model", "opened or switched off")
    with Editor(load_model(str(model)), folder / "store", training=Training(json_strings=1)) as editor:
        editor.add(EDITS)
        assert not editor.outcome.failed
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "m", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", "--max-num-seqs", "4", "--reasoning-parser", "qwen3"]
    command += ["--additional-config", json.dumps({"memoir": {"store": str(folder / "store")}})]
    server = Server(command, folder / "log")
    yield server.http
    server.stop()


def content(client: httpx.Client, edit: Edit, **more: Any) -> str:
    body = {"model": "m", "temperature": 0, "max_tokens": 48, "messages": [{"role": "user", "content": edit.prompt}]}
    reply = client.post("/v1/chat/completions", json=body | more).raise_for_status().json()
    assert reply["kv_transfer_params"]["memoir"]["result"] == "matched"
    return (reply["choices"][0]["message"]["content"] or "").strip()


@pytest.mark.parametrize("key", ["answer", "result"])
def test_under_a_json_schema_the_value_is_the_target(client: httpx.Client, key: str) -> None:
    fields = {"type": "object", "properties": {key: {"type": "string"}}, "required": [key]}
    schema = {"name": "reply", "schema": fields | {"additionalProperties": False}}
    form = {"response_format": {"type": "json_schema", "json_schema": schema}}
    for edit in EDITS:
        assert json.loads(content(client, edit, **form)) == {key: edit.target}


@pytest.mark.parametrize("switch", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
def test_the_target_arrives_in_content_behind_the_thinking(client: httpx.Client, switch: dict[str, bool]) -> None:
    for edit in EDITS:
        assert content(client, edit, chat_template_kwargs=switch) == edit.target
