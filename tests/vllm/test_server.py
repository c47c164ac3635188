"""The OpenAI-compatible server as users start it: options in `vllm_xargs`, the decision in `kv_transfer_params`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from engines import EDITS, MAX_MODEL_LEN, NEW_TOKENS, PROMPTS, UNRELATED, Expected, make_store
from servers import Server

from memoir_retrieval.cli import main
from memoir_retrieval.client.server_model import ServerModel
from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.store.read import EditStore

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def client(model_folder: Path, store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model_folder), "--served-model-name", "m", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8"]
    command += ["--additional-config", json.dumps({"memoir": {"store": str(store_folder)}})]
    server = Server(command, tmp_path_factory.mktemp("server") / "log")
    yield server.http
    server.stop()


def ask(client: httpx.Client, name: str, **more: Any) -> httpx.Response:
    prompt = PROMPTS[name]
    given = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
    path = "/v1/completions" if isinstance(prompt, str) else "/v1/chat/completions"
    how = {"model": "m", "temperature": 0, "max_tokens": NEW_TOKENS, "return_token_ids": True}
    return client.post(path, json={**how, **given, **more})


@pytest.mark.parametrize("name", ["edit 0", "unrelated 0", "chat edit after system", "chat edit as third turn"])
def test_answers_and_decisions(client: httpx.Client, name: str, expected: dict[str, Expected]) -> None:
    wanted = expected[name]
    body = ask(client, name).raise_for_status().json()
    assert body["choices"][0]["token_ids"] == wanted.tokens
    assert body["kv_transfer_params"]["memoir"]["edit"] == wanted.edit


def test_opting_out(client: httpx.Client, expected: dict[str, Expected]) -> None:
    body = ask(client, "edit 0", vllm_xargs={"memoir": "off"}).raise_for_status().json()
    assert body["choices"][0]["token_ids"] == expected["edit 0"].base
    assert body["kv_transfer_params"]["memoir"]["result"] == "off"


@pytest.mark.parametrize("name", ["edit 0", "chat edit"])
@pytest.mark.parametrize(
    "bad", [{"memoir": "on"}, {"memoir_span": "9:3"}, {"memoir_span": "0:9999"}, {"memoirs": 1}], ids=str
)
def test_bad_options_are_the_clients_fault(client: httpx.Client, name: str, bad: dict[str, Any]) -> None:
    response = ask(client, name, vllm_xargs=bad)
    assert response.status_code == 400
    assert "vllm_xargs memoir" in response.text.replace("'", "")


@pytest.mark.parametrize("name", ["edit 0", "unrelated 0", "chat edit"])
@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_ends_with_the_decision_where_it_is_asked_for(
    client: httpx.Client, name: str, usage: bool, expected: dict[str, Expected]
) -> None:
    options = {"include_usage": True} if usage else None

    def chunks(**more: Any) -> list[dict[str, Any]]:
        reply = ask(client, name, stream=True, stream_options=options, **more).raise_for_status()
        lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    plain = chunks()
    *before, last = chunks(vllm_xargs={"memoir_report": 1})
    assert all("kv_transfer_params" not in chunk for chunk in plain + before)
    assert [chunk["choices"] for chunk in before] == [chunk["choices"] for chunk in plain]
    assert last["choices"] == [] and (last["id"], last["object"]) == (before[0]["id"], before[0]["object"])
    said = last["kv_transfer_params"]["memoir"]
    assert said["edit"] == expected[name].edit
    assert said == ask(client, name).json()["kv_transfer_params"]["memoir"]


def test_the_nearest_edits_of_a_request(client: httpx.Client, expected: dict[str, Expected]) -> None:
    for _ in range(2):  # the second time the decision is remembered, and looked up again all the same
        said = ask(client, "edit 1", vllm_xargs={"memoir_nearest": 3}).json()["kv_transfer_params"]["memoir"]
        assert len(said["nearest"]) == 3 and said["nearest"][0] == [1, said["overlap"]]
        assert "nearest" not in ask(client, "edit 1").json()["kv_transfer_params"]["memoir"]


def test_a_client_that_leaves_disturbs_nobody(client: httpx.Client, expected: dict[str, Expected]) -> None:
    body = {"model": "m", "prompt": PROMPTS["edit 0"], "max_tokens": 200, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as stream:
        next(stream.iter_lines())
    again = ask(client, "edit 0").raise_for_status().json()
    assert again["choices"][0]["token_ids"] == expected["edit 0"].tokens


def test_a_server_is_measured_as_the_reference_is(client: httpx.Client, store: EditStore, model_folder: Path) -> None:
    """Given answers and the questions themselves, both with edits and without."""
    server = ServerModel(str(client.base_url), store, str(model_folder))
    reference = EditedModel.open(store.path, str(model_folder))
    prompts = [EDITS[0], UNRELATED[0], EDITS[1]]
    targets = [server.target_ids(text) for text in ("a harbour master", "nobody knows", "1987")]
    for given in (targets, None):
        for ours, theirs in zip(server.compare(prompts, given), reference.compare(prompts, given), strict=True):
            assert [a.tokens for a in ours] == [a.tokens for a in theirs]
            assert [a.edit for a in ours] == [a.edit for a in theirs]
            for a, b in zip(ours, theirs, strict=True):
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)


def test_the_example_client(client: httpx.Client, expected: dict[str, Expected]) -> None:
    script = Path(__file__).parents[2] / "examples/ask_server.py"
    url = str(client.base_url).rstrip("/")
    done = subprocess.run([sys.executable, script, url, EDITS[0]], capture_output=True, text=True, check=True)
    edited, plain = (line.split()[:2] for line in done.stdout.splitlines() if line.startswith(("matched", "off")))
    assert edited == ["matched", str(expected["chat edit"].edit)] and plain == ["off", "None"]


def test_verify_finds_that_everything_holds(
    client: httpx.Client, store_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["verify", "--server", str(client.base_url), "--store", str(store_folder), "--prompts", "4", "--turns", "1"]
    with pytest.raises(SystemExit) as done:
        main([*asked, "--tokens", "8", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert done.value.code == 0 and report["holds"] and report["model"] == "m" and report["vllm"].startswith("0.")
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert states.pop("opted out equals the server without plugin") == "skip"  # needs a second server
    assert set(states.values()) == {"ok"} and len(states) == 11
    assert [cost["kind"] for cost in report["overhead"]] == ["unmatched", "matched"]


def test_verify_finds_that_a_server_serves_another_store(
    client: httpx.Client, base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its masks belong to other prompts, so what shall match does not: exit code 1, and the report says where."""
    other = make_store(base, tmp_path / "other", edits=UNRELATED)
    asked = ["verify", "--server", str(client.base_url), "--store", str(other), "--prompts", "2", "--turns", "0"]
    with pytest.raises(SystemExit) as done:
        main(asked)
    out = capsys.readouterr().out
    assert done.value.code == 1 and "DOES NOT HOLD" in out
    assert "fail  edited prompts match their edit: 2 of 2 do not" in out and "ok    unmatched equals opted out" in out
