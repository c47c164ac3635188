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


def served(folder: Path, model: Path, *options: str) -> Server:
    """A server of a model whose edits were trained for JSON, too.

    folder: for the store and the log.
    options: of the server.
    """
    with Editor(load_model(str(model)), folder / "store", training=Training(json_strings=1)) as editor:
        editor.add(EDITS)
        assert not editor.outcome.failed
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "m", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", "--max-num-seqs", "4", *options]
    command += ["--additional-config", json.dumps({"memoir": {"store": str(folder / "store")}})]
    return Server(command, folder / "log")


@pytest.fixture(scope="module")
def client(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    server = served(tmp_path_factory.mktemp("answers"), model_folder)
    yield server.http
    server.stop()


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """With a reasoning parser, on a template that opens a think tag unless a request switches that off."""
    folder = tmp_path_factory.mktemp("thinking")
    model = save_thinking(folder / "model", "opened or switched off")
    server = served(folder, model, "--reasoning-parser", "qwen3")
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
def test_the_target_arrives_in_content_behind_the_thinking(thinking: httpx.Client, switch: dict[str, bool]) -> None:
    for edit in EDITS:
        assert content(thinking, edit, chat_template_kwargs=switch) == edit.target
