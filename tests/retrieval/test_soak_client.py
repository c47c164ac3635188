"""A soak against a stand-in for a server that can be made to misbehave; `tests/vllm/test_soak.py` has a real one."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from http_stand_in import JsonHandler, StandIn, running

from memoir_retrieval import Edit, Editor, load_model
from memoir_retrieval.cli import main
from memoir_retrieval.client.admin import AdminClient
from memoir_retrieval.client.server import Server
from memoir_retrieval.client.soak import Soak, SoakReport
from memoir_retrieval.errors import AdminError, ConfigError, ServerError

EDITED, PLAIN = "Who founded Aarhus?", "Name three colours."
CHAT = [{"role": "user", "content": "Hello there, how are you?"}]


class Model(StandIn):
    """Answers depend on prompt, generation and edit alone, but for `fault`: (body, number of the request) -> shift."""

    def __init__(self, handler: type[Handler] | None = None) -> None:
        super().__init__(handler or Handler)
        self.generation, self.number, self.memory = 1, itertools.count(), itertools.repeat(1000)
        self.fault: Callable[[dict[str, Any], int], int] = lambda body, number: 0
        self.status = self.near_tie = 0
        self.bodies: list[dict[str, Any]] = []


class Handler(JsonHandler):
    server: Model

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self.send(f"# HELP\nprocess_resident_memory_bytes {next(self.server.memory)}\n".encode(), 200, {})
        else:
            self.reply({"data": [{"id": "m", "max_model_len": 64}], "entries": [], "version": "0.32.0"})

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.read())
        server.bodies.append(body)
        if server.status and "stream" not in body and "logprobs" not in body and body.get("max_tokens") != 1:
            self.reply({"error": "too busy"}, server.status)
            return
        prompt = body.get("prompt") or body["messages"][-1]["content"]
        options = body.get("vllm_xargs") or {}
        off = options.get("memoir") == "off"
        matched = not off and prompt == EDITED
        start = crc32(prompt.encode()) + matched * 50 * server.generation + server.fault(body, next(server.number))
        tokens = [(start + i) % 1000 for i in range(body["max_tokens"])]
        result = "off" if off else "matched" if matched else "unmatched"
        memoir = {"edit": 0 if matched else None, "overlap": 0.9 * matched, "result": result}
        memoir = {"memoir": memoir | {"generation": server.generation}}
        if body.get("stream"):
            text = "a\u2028b\x85é"  # vLLM writes these as they are
            chunks = [{"choices": [{"text": text, "token_ids": [token]}]} for token in tokens]
            chunks.append({"choices": [], "kv_transfer_params": memoir})
            lines = [*(json.dumps(chunk, ensure_ascii=False) for chunk in chunks), "[DONE]"]
            self.send("".join(f"data: {line}\n\n" for line in lines).encode(), 200, {})
            return
        margin = 0.01 if server.near_tie else 3.0
        places: Any = {"top_logprobs": [{"a": -0.1, "b": -0.1 - margin}] * len(tokens)}
        if "messages" in body:
            pair = [{"logprob": -0.1}, {"logprob": -0.1 - margin}]
            places = {"content": [{"top_logprobs": pair}] * len(tokens)}
        choice = {"token_ids": tokens, "logprobs": places}
        reply = {"choices": [choice] * body.get("n", 1), "usage": {"prompt_tokens": 6}, "kv_transfer_params": memoir}
        self.reply(reply)


class Hasty(Handler):
    """Closes a connection on which a second request comes, as uvicorn does where the idle time has just ended."""

    protocol_version = "HTTP/1.1"
    requests = 0

    def parse_request(self) -> bool:
        self.requests += 1
        self.close_connection = self.requests > 1
        return self.requests == 1 and super().parse_request()


class Mute(Handler):
    """Resets the connection of a request that is to be answered."""

    def do_POST(self) -> None:
        self.read()
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.shutdown(socket.SHUT_RD)
        self.connection.close()


@pytest.fixture
def stand_in() -> Iterator[Model]:
    with running(Model()) as server:
        yield server


def soak(server: Model, requests: int = 300, **more: Any) -> SoakReport:
    async def run() -> SoakReport:
        return await Soak(server.url, tokens=4).run([EDITED, PLAIN, CHAT], minutes=2, requests=requests, **more)

    return asyncio.run(run())


def failed(report: SoakReport) -> list[str]:
    assert report.holds == all(check.state != "fail" for check in report.checks)
    return [check.name for check in report.checks if check.state == "fail"]


def test_a_sound_server_is_asked_in_every_way_through_many_generations(stand_in: Model) -> None:
    async def change() -> None:
        stand_in.generation += 1

    report = soak(stand_in, changes=25, change=change)
    assert failed(report) == [] and (report.generations, report.differing, report.failed) == (26, 0, 0)
    kinds = ("abort", "plain", "several", "stream")
    assert sum(report.requests[kind] for kind in kinds) == 300 and all(report.requests.values())
    assert report.requests.keys() == {*kinds, "opted out", "with a span"}
    assert report.answers > 300 - report.requests["abort"] and report.tokens == 4 * report.answers
    seen = [key for body in stand_in.bodies for key in body]
    assert {"cache_salt", "priority", "seed", "n"} <= set(seen)
    assert {body["vllm_xargs"]["memoir_span"] for body in stand_in.bodies if "memoir_span" in str(body)} == {
        "0:3",
        "3:6",
    }


def test_what_an_old_generation_answers_is_compared_with_the_old_one(stand_in: Model) -> None:
    """A server that goes on with an edit's former weights, and says that it does not."""

    async def change() -> None:
        stand_in.generation += 1
        stand_in.fault = lambda body, number: -50 if body.get("prompt") == EDITED and "logprobs" not in body else 0

    report = soak(stand_in, changes=1, change=change)
    assert failed(report) == ["no answer differs from its reference"] and 0 < report.differing < report.answers
    assert EDITED in report.differences[0] and "tokens" in report.differences[0]


def test_one_wrong_token_among_hundreds_of_answers_is_seen(stand_in: Model) -> None:
    once = iter([1])
    stand_in.fault = lambda body, number: (
        next(once, 0) if number > 200 and body["max_tokens"] == 4 and not body.keys() & {"stream", "n"} else 0
    )
    assert soak(stand_in).differing == 1


def test_answers_that_are_wrong_in_streams_alone_are_seen(stand_in: Model) -> None:
    stand_in.fault = lambda body, number: int("stream" in body)
    report = soak(stand_in)
    assert report.differing == report.requests["stream"] > 0, "a client that leaves has nothing to compare"


def test_what_is_unmatched_must_be_as_opted_out(stand_in: Model) -> None:
    stand_in.fault = lambda body, number: int(body.get("prompt") == PLAIN and "off" not in str(body.get("vllm_xargs")))
    report = soak(stand_in)
    assert failed(report) == ["no answer differs from its reference"] and PLAIN in report.differences[0]


def test_behind_a_near_tie_nothing_is_compared(stand_in: Model) -> None:
    stand_in.near_tie = 1
    report = soak(stand_in)
    assert (report.tokens, report.unclear) == (0, 4 * report.answers)


def test_requests_and_changes_that_fail_are_counted(stand_in: Model) -> None:
    async def change() -> None:
        stand_in.status = 503
        raise AdminError("no more room")

    report = soak(stand_in, changes=1, change=change)
    assert failed(report) == ["no request and no change fails"] and report.failed > 10
    assert any("503" in error and "too busy" in error for error in report.errors)
    assert report.differing == 0


def test_memory_that_grows_is_seen(stand_in: Model) -> None:
    stand_in.memory = itertools.count(10_000, 100)
    assert failed(soak(stand_in)) == ["process_resident_memory_bytes is flat"]
    stand_in.memory = itertools.count(10_000, 1)
    assert failed(soak(stand_in)) == []


def test_a_soak_ends_with_its_time(stand_in: Model) -> None:
    async def run() -> SoakReport:
        return await Soak(stand_in.url, tokens=4).run([EDITED], minutes=1e-9, requests=10**9)

    assert asyncio.run(run()).requests == {}


def test_a_store_that_others_change_is_not_soaked(stand_in: Model) -> None:
    def changing(body: dict[str, Any], number: int) -> int:
        stand_in.generation += 1
        return 0

    stand_in.fault = changing
    with pytest.raises(ConfigError, match="another client changes the store"):
        soak(stand_in)


def test_a_server_that_closes_idle_connections_loses_no_request() -> None:
    """A request on a connection that was idle meets its end on a busy machine, and gets no answer."""

    async def administrate(url: str) -> list[Any]:
        async with AdminClient(url, "0123456789abcdef") as admin:
            return [await admin.audit(), await admin.audit()]

    with running(Model(Hasty)) as server:
        assert failed(soak(server)) == []
        assert asyncio.run(administrate(server.url)) == [[], []]
        client = Server(server.url)
        assert [client.version(), client.version()] == ["0.32.0", "0.32.0"]


def test_an_error_without_words_is_named() -> None:
    with running(Model(Mute)) as server, pytest.raises(ServerError) as refusal:
        soak(server)
    assert re.search(r"no vLLM server answers at \S+ \(\w+\): start one", str(refusal.value))


def test_no_server() -> None:
    async def run() -> SoakReport:
        return await Soak("http://127.0.0.1:9").run([EDITED], minutes=1, requests=1)

    with pytest.raises(ServerError, match=r"no vLLM server answers at http://127\.0\.0\.1:9 .*memoir serve"):
        asyncio.run(run())


def test_the_command_line(
    stand_in: Model, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEMOIR_ADMIN_TOKEN", raising=False)
    with Editor(load_model(str(tiny)), tmp_path / "store") as editor:
        editor.add([Edit(prompt=EDITED, target="King Harald")], keep_failed=True)
    command = ["verify", "--server", stand_in.url, "--soak", "2", "--requests", "60", "--tokens", "4", "--prompts", "2"]

    def run(*more: str) -> tuple[int | str | None, str]:
        with pytest.raises(SystemExit) as done:
            main([*command, *more])
        output = capsys.readouterr()
        return done.value.code, output.out + output.err

    code, text = run()
    assert code == 2 and "--soak asks the prompts of a store: add --store DIR" in text
    code, text = run("--store", str(tmp_path / "store"))
    assert code == 0 and "no answer differs from its reference: 0 of" in text and "holds: 0 failed" in text
    code, text = run("--store", str(tmp_path / "store"), "--changes", "2")
    assert code == 2 and "set MEMOIR_ADMIN_TOKEN" in text
    stand_in.fault = lambda body, number: int("stream" in body)
    code, text = run("--store", str(tmp_path / "store"), "--json")
    report, _ = json.JSONDecoder().raw_decode(text)  # progress follows, on stderr
    assert code == 1 and not report["holds"] and report["differing"] == report["requests"]["stream"]
