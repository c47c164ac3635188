"""`ServerModel` against a stub of vLLM's API: what it sends, and what it says when the server is not ours.

The real server is asked in `tests/vllm`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from http_stand_in import JsonHandler, StandIn, running

from memoir_retrieval import Edit, Editor, EditStore, load_model
from memoir_retrieval.client.admin import AdminClient
from memoir_retrieval.client.server import Server, base_url
from memoir_retrieval.client.server_model import ServerModel
from memoir_retrieval.client.soak import Soak
from memoir_retrieval.client.verify import ServerProbe
from memoir_retrieval.errors import ConfigError, ServerError


class Stub(StandIn):
    """Answers every completion with token 5; `memoir` is the plugin's part of the response, `asked` the requests."""

    def __init__(self, generation: int) -> None:
        super().__init__(Handler)
        self.memoir: dict[str, Any] | None = {"edit": 0, "overlap": 1.0, "result": "matched", "generation": generation}
        self.bodies: list[dict[str, Any]] = []
        self.key = ""
        self.instead: tuple[str, str] | None = None


class Handler(JsonHandler):
    server: Stub

    def reply(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """The text of `instead`, and its content type, where there is one."""
        if self.server.instead is None:
            super().reply(body, status, headers)
        else:
            text, kind = self.server.instead
            self.send(text.encode(), status, {"Content-Type": kind})

    def do_GET(self) -> None:
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.reply({"error": "Unauthorized"}, 401)
            return
        self.reply(
            {
                "object": "list",
                "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "x", "max_model_len": 64}],
            }
        )

    def do_POST(self) -> None:
        body = json.loads(self.read())
        self.server.bodies.append(body)
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "stop", "logprobs": None, "token_ids": [5]}
        if body.get("prompt_logprobs"):
            choice["prompt_logprobs"] = [None] + [
                {str(given): {"logprob": -given / 10, "rank": 4}, "5": {"logprob": -0.1, "rank": 1}}
                for given in body["prompt"][1:]
            ]
        reply = {"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}
        self.reply(reply | ({"kv_transfer_params": {"memoir": self.server.memoir}} if self.server.memoir else {}))


@pytest.fixture(scope="module")
def store(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> EditStore:
    folder = tmp_path_factory.mktemp("server") / "store"
    with Editor(load_model(str(tiny)), folder) as editor:
        editor.add([Edit(prompt="Who founded Aarhus?", target="King Harald")])
    return EditStore.open(folder)


@pytest.fixture
def stub(store: EditStore) -> Iterator[Stub]:
    with running(Stub(store.manifest.generation)) as server:
        yield server


def test_generate_sends_token_ids_and_reads_the_decision(stub: Stub, store: EditStore) -> None:
    model = ServerModel(stub.url + "/v1/", store)
    (answer,) = model.generate(["Who founded Aarhus?"], max_new_tokens=3)
    assert (answer.tokens, answer.edit, answer.overlap) == ((5,), 0, 1.0)
    (body,) = stub.bodies
    assert body["prompt"] == model.prompt_ids("Who founded Aarhus?")
    assert (body["temperature"], body["max_tokens"]) == (0, 3) and "vllm_xargs" not in body


def test_predict_names_the_question_and_reads_every_target_position(stub: Stub, store: EditStore) -> None:
    span = msgspec.structs.replace(store.manifest.span, candidates=False)  # a server finds parts of messages itself
    whole = replace(store, manifest=msgspec.structs.replace(store.manifest, span=span))
    ServerModel(stub.url, store).predict(["Who founded Aarhus?"], [[11, 12, 13]])
    assert "vllm_xargs" not in stub.bodies.pop()
    model = ServerModel(stub.url, whole)
    (answer,) = model.predict(["Who founded Aarhus?"], [[11, 12, 13]])
    assert answer.tokens == (5, 5, 5) and answer.logprobs == (-1.1, -1.2, -1.3)
    (body,) = stub.bodies
    start, end = map(int, body["vllm_xargs"]["memoir_span"].split(":"))
    ids = model.prompt_ids("Who founded Aarhus?")
    assert body["prompt"] == [*ids, 11, 12, 13]
    assert model._tokenizer.decode(ids[start:end]) == "Who founded Aarhus?"


def test_score_reads_the_question_from_its_second_token_on(stub: Stub, store: EditStore) -> None:
    model = ServerModel(stub.url, store)
    (answer,) = model.score(["Who founded Aarhus?"])
    question = model._tokenizer("Who founded Aarhus?").input_ids
    assert answer.logprobs == tuple(-t / 10 for t in question[1:]) and answer.edit == 0
    assert "vllm_xargs" not in stub.bodies[0]  # it is looked up as any other request


def test_without_edits_the_plugin_is_told_so(stub: Stub, store: EditStore) -> None:
    model = ServerModel(stub.url, store)
    model.predict(["hi"], [[11]], edited=False)
    model.generate(["hi"], edited=False)
    assert [body["vllm_xargs"] for body in stub.bodies] == [{"memoir": "off"}] * 2


def test_answers_keep_the_order_of_the_questions(stub: Stub, store: EditStore) -> None:
    model = ServerModel(stub.url, store)
    lengths = [len(a.tokens) for a in model.predict(["hi"] * 40, [[11] * (1 + i % 7) for i in range(40)])]
    assert lengths == [1 + i % 7 for i in range(40)]


def test_a_server_without_the_plugin(stub: Stub, store: EditStore) -> None:
    stub.memoir = None
    with pytest.raises(ServerError, match="without edits: start it with `memoir serve"):
        ServerModel(stub.url, store).generate(["hi"])


def test_a_server_with_another_generation(stub: Stub, store: EditStore) -> None:
    assert stub.memoir is not None
    stub.memoir["generation"] = 9
    with pytest.raises(ServerError, match=r"generation 9 of the store.*is at 1: restart the server"):
        ServerModel(stub.url, store).generate(["hi"])


def test_a_decision_of_another_version_is_refused(stub: Stub, store: EditStore) -> None:
    assert stub.memoir is not None
    stub.memoir["result"] = "sideways"
    with pytest.raises(ServerError, match=r"'sideways'.*does not know.*the same memoir-retrieval"):
        ServerModel(stub.url, store).generate(["hi"])


@pytest.mark.parametrize("reply", ["<html>", '"text"', '{"object": "list"}', '{"data": []}', '{"data"', "[]"])
@pytest.mark.parametrize("kind", ["application/json", "text/html"])
def test_what_is_no_server_of_models(stub: Stub, store: EditStore, reply: str, kind: str) -> None:
    stub.instead = reply, kind
    with pytest.raises(ServerError, match="give the address of a server of vLLM"):
        ServerModel(stub.url, store)


@pytest.mark.parametrize("reply", ['{"choices": []}', '{"choices": [{}]}', '{"choices": ["text"]}', "<html>"])
def test_an_answer_that_is_none(stub: Stub, store: EditStore, reply: str) -> None:
    model = ServerModel(stub.url, store)
    stub.instead = reply, "application/json"
    with pytest.raises(ServerError, match="give the address of a server of vLLM"):
        model.generate(["hi"])


def test_no_server(stub: Stub, store: EditStore) -> None:
    with pytest.raises(ServerError, match=r"no server answers at http://127\.0\.0\.1:9"):
        ServerModel("http://127.0.0.1:9", store)


def test_every_client_sends_the_key_of_the_environment_and_names_the_variable_where_it_is_refused(
    stub: Stub, store: EditStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients: list[Callable[[], Any]] = [
        lambda: ServerModel(stub.url, store),
        lambda: ServerProbe(stub.url, chat=True),
        lambda: Server(stub.url),
        lambda: asyncio.run(Soak(stub.url).length()),
    ]
    stub.key = "secret"
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for client in clients:
        with pytest.raises(ServerError, match="wants an API key: set OPENAI_API_KEY to it"):
            client()
    monkeypatch.setenv("OPENAI_API_KEY", stub.key)
    for client in clients:
        client()


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("127.0.0.1:8123", "http://127.0.0.1:8123"),
        ("localhost/v1", "http://localhost/v1"),
        ("ftp://host", "http://host"),
        ("", "http://127.0.0.1:8000"),
    ],
)
def test_an_address_without_its_scheme_is_refused_with_one(url: str, whole: str) -> None:
    for reach in (base_url, Server, Soak, lambda url: AdminClient(url, "a-token")):
        with pytest.raises(ConfigError, match=rf"does not begin with http.*: write {whole}$"):
            reach(url)
    assert base_url(whole + "/") == whole.removesuffix("/v1") and base_url("HTTPS://h/") == "HTTPS://h"
