"""`memoir verify` against a stand-in for vLLM's API that can be told to misbehave; the real server is asked in
`tests/vllm/test_server.py`, where everything holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from http_stand_in import JsonHandler, StandIn, running

from memoir_retrieval import Edit, Editor, EditStore, load_model
from memoir_retrieval.cli import main
from memoir_retrieval.client.server import Reply
from memoir_retrieval.client.verify import Check, ServerProbe, distance, verify
from memoir_retrieval.errors import ServerError

PROMPT, OTHER = "Who founded Aarhus?", "Where is the Blue Gate?"
# (prompt, opted out, number of the request, salt) -> what the stand-in adds to its log-probabilities
Fault = Callable[[str, bool, int, str], float]


class Model(StandIn):
    """A server whose answers depend on prompt and edit alone, but for the faults it is told to have."""

    def __init__(self) -> None:
        super().__init__(Handler)
        self.edits = {PROMPT: 0, OTHER: 1}
        self.generation = 1
        self.plugin = True
        self.acts = True
        self.proxy: Callable[[dict[str, Any]], Any] = lambda choice: None  # what stands in front takes of an answer
        self.fault: Fault = lambda prompt, off, number, salt: 0.0
        self.number = 0
        self.keys: list[str | None] = []


class Handler(JsonHandler):
    server: Model

    def do_GET(self) -> None:
        self.server.keys.append(self.headers.get("Authorization"))
        versions = {"/version": {"version": "0.32.0"}, "/v1/models": {"data": [{"id": "m"}]}}
        self.reply(versions[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.read())
        self.server.number += 1
        prompt = body["messages"][-1]["content"]
        off = body.get("vllm_xargs") == {"memoir": "off"}
        edit = None if off else self.server.edits.get(prompt)
        acts = 50 if edit is not None and self.server.acts else 0
        tokens = [(crc32(prompt.encode()) + acts + i) % 1000 for i in range(body["max_tokens"])]
        shift = self.server.fault(prompt, off, self.server.number, body["cache_salt"])
        choice = {
            "message": {"content": "King Harald" if acts else "Nobody"},
            "token_ids": tokens,
            "logprobs": {"content": [{"logprob": -(t / 1000) + shift} for t in tokens]},
        }
        self.server.proxy(choice)
        result = "off" if off else "unmatched" if edit is None else "matched"
        memoir = {"edit": edit, "overlap": 0.9 * (result == "matched"), "result": result}
        memoir["generation"] = self.server.generation
        self.reply({"choices": [choice]} | ({"kv_transfer_params": {"memoir": memoir}} if self.server.plugin else {}))


@pytest.fixture(scope="module")
def store(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> EditStore:
    folder = tmp_path_factory.mktemp("verify") / "store"
    with Editor(load_model(str(tiny)), folder) as editor:
        editor.add([Edit(prompt=PROMPT, target="King Harald"), Edit(prompt=OTHER, target="In Oslo")])
    return EditStore.open(folder)


@pytest.fixture
def stand_in() -> Iterator[Model]:
    with running(Model()) as server:
        yield server


def checks(stand_in: Model, store: EditStore | None, **more: Any) -> dict[str, Check]:
    report = verify(ServerProbe(stand_in.url, chat=True), store, prompts=3, tokens=4, turns=0, **more)
    assert report.holds == all(check.state != "fail" for check in report.checks)
    return {check.name: check for check in report.checks}


def failed(results: dict[str, Check]) -> list[str]:
    return [name for name, check in results.items() if check.state == "fail"]


def test_a_sound_server(stand_in: Model, store: EditStore) -> None:
    results = checks(stand_in, store)
    assert failed(results) == [] and len(results) == 13
    assert (
        results["edits change answers"].detail.startswith("2 of 2")
        and "1 begin with" in results["edits change answers"].detail
    )


def test_without_a_store_nothing_matched_is_claimed(stand_in: Model) -> None:
    results = checks(stand_in, None)
    assert failed(results) == [] and results["matched requests"].state == "skip"
    assert "edits change answers" not in results


def test_another_edit_answers(stand_in: Model, store: EditStore) -> None:
    stand_in.edits = {PROMPT: 1, OTHER: 1}
    results = checks(stand_in, store)
    assert failed(results) == ["edited prompts match their edit"]
    assert results["edited prompts match their edit"].detail == "1 of 2 do not, such as edit 0, answered by 1"


def test_an_edit_that_matches_but_does_not_act(stand_in: Model, store: EditStore) -> None:
    stand_in.acts = False
    assert failed(checks(stand_in, store)) == ["edits change answers"]


def test_an_edit_that_leaks_through_the_cache(stand_in: Model, store: EditStore) -> None:
    """From the third request of one salt on, the opted-out twin is moved: what a shared block would do."""
    seen: dict[str, int] = {}

    def leak(prompt: str, off: bool, number: int, salt: str) -> float:
        seen[salt] = seen.get(salt, 0) + 1
        return 0.07 if off and seen[salt] > 3 else 0.0

    stand_in.fault = leak
    assert failed(checks(stand_in, store)) == ["edited and opted out in turn, from the cache"]


def test_unmatched_requests_that_are_touched_in_the_last_bit(stand_in: Model, store: EditStore) -> None:
    stand_in.fault = lambda prompt, off, number, salt: 0.0 if off or prompt in (PROMPT, OTHER) else 1e-7
    assert failed(checks(stand_in, store)) == ["unmatched equals opted out"]


def test_neighbours_that_disturb(stand_in: Model, store: EditStore) -> None:
    """Only while others match: after the requests that go one at a time, 3 + 2 of each kind."""
    together = checks(stand_in, store) and stand_in.number - 5
    stand_in.number = 0
    stand_in.fault = lambda prompt, off, number, salt: 0.05 if number > together and not off else 0.0
    assert failed(checks(stand_in, store)) == ["unmatched among matched"]


def test_a_server_that_does_not_repeat_itself_is_compared_within_what_it_does(
    stand_in: Model, store: EditStore
) -> None:
    stand_in.fault = lambda prompt, off, number, salt: number % 7 * 1e-6
    results = checks(stand_in, store)
    assert failed(results) == [] and results["opted out repeats"].state == "skip"
    assert "within 1.0e-04" in results["unmatched equals opted out"].detail
    stand_in.fault = lambda prompt, off, number, salt: number % 7 * 0.1
    assert "opted out repeats" in failed(checks(stand_in, store))


def test_a_base_server_is_compared(stand_in: Model, store: EditStore) -> None:
    name = "opted out equals the server without plugin"
    with running(Model()) as plain:
        plain.plugin, plain.edits = False, {}
        assert checks(stand_in, store, base=ServerProbe(plain.url, chat=True))[name].state == "ok"
        plain.fault = lambda prompt, off, number, salt: 1e-7
        assert failed(checks(stand_in, store, base=ServerProbe(plain.url, chat=True))) == [name]


def test_a_server_without_the_plugin_or_of_another_generation(stand_in: Model, store: EditStore) -> None:
    stand_in.generation = 7
    assert failed(checks(stand_in, store)) == ["same generation"]
    stand_in.plugin = False
    assert list(checks(stand_in, store)) == ["serves edits"]


@pytest.mark.parametrize("key", ["token_ids", "logprobs"])
def test_a_server_that_gives_nothing_to_compare(stand_in: Model, store: EditStore, key: str) -> None:
    """Answers without log-probabilities are not equal bits."""
    stand_in.proxy = lambda choice: choice.pop(key)
    results = checks(stand_in, store)
    assert list(results) == ["serves edits", "gives token ids and log-probabilities"]
    assert failed(results) == ["gives token ids and log-probabilities"]


def test_the_report_and_the_exit_code(
    stand_in: Model, store: EditStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    command = ["verify", "--server", stand_in.url, "--store", str(store.path), "--prompts", "2", "--turns", "2"]
    with pytest.raises(SystemExit) as done:
        main(command)
    out = capsys.readouterr().out
    assert done.value.code == 0 and "holds: 0 failed, 1 skipped" in out and "vLLM 0.32.0" in out
    assert "unmatched over opted out" in out and "matched over opted out" in out
    assert set(stand_in.keys) == {"Bearer secret"} and "secret" not in out
    stand_in.acts = False
    with pytest.raises(SystemExit) as done:
        main([*command, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert done.value.code == 1 and not report["holds"] and len(report["overhead"][0]["turns"]) == 2


def test_no_server() -> None:
    with pytest.raises(ServerError, match=r"no server answers at http://127\.0\.0\.1:9 .*memoir serve"):
        ServerProbe("http://127.0.0.1:9", chat=True)


def test_distance() -> None:
    answer = Reply((1, 2, 3), (-0.5, -0.25, -1.0), "", None)
    assert distance(answer, answer) == 0.0
    assert distance(answer, Reply((1, 2, 3), (-0.5, -0.375, -1.0), "", None)) == 0.125
    near_tie = Reply((1, 9, 4), (-0.5, -0.3125, -7.0), "", None)
    assert distance(answer, near_tie) == 0.0625  # what follows another token is not compared
    assert 0 < distance(answer, Reply((1, 9, 4), (-0.5, -0.25, -7.0), "", None)) < 1e-300  # a tie is not equal either
    assert distance(answer, Reply((1, 2), (-0.5, -0.25), "", None)) == float("inf")
    assert distance(Reply((1, 2), (), "", None), Reply((8, 9), (), "", None)) == float("inf")
    assert distance(Reply((), (-0.5,), "", None), Reply((), (-0.5,), "", None)) == float("inf")
