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


@pytest.mark.parametrize("name", ["edit 0", "chat edit", "unrelated 0"])
def test_beam_search_is_refused_to_its_client(client: httpx.Client, name: str, expected: dict[str, Expected]) -> None:
    response = ask(client, name, use_beam_search=True, n=2, return_token_ids=False)
    assert response.status_code == 400
    assert "memoir cannot serve beam search: use sampling (use_beam_search false)" in response.text
    assert ask(client, name).json()["choices"][0]["token_ids"] == expected[name].tokens


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
    assert _written(before) == _written(plain)
    assert ("usage" in last) is usage and [chunk["usage"] for chunk in before if chunk.get("usage")] == []
    assert last.get("usage") == plain[-1].get("usage")
    assert last["choices"] == [] and (last["id"], last["object"]) == (before[0]["id"], before[0]["object"])
    said = last["kv_transfer_params"]["memoir"]
    assert said["edit"] == expected[name].edit
    assert said == ask(client, name).json()["kv_transfer_params"]["memoir"]
    # Since vLLM 0.33 the chunk that ends a choice has it too, asked for or not.
    others = [chunk for chunk in plain + before if chunk.get("kv_transfer_params")]
    assert all(chunk["choices"][0]["finish_reason"] for chunk in others)
    assert all(chunk["kv_transfer_params"]["memoir"] == said for chunk in others)


def _written(chunks: list[dict[str, Any]]) -> tuple[str, list[int], list[str]]:
    """Text, tokens and reasons to end of a stream: where its chunks begin and end is up to the server's load."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(choice["delta"].get("content") or "" if "delta" in choice else choice["text"] for choice in choices)
    tokens = [token for choice in choices for token in choice.get("token_ids") or ()]
    return text, tokens, [choice["finish_reason"] for choice in choices if choice["finish_reason"]]


def test_the_nearest_edits_of_a_request(client: httpx.Client, expected: dict[str, Expected]) -> None:
    for _ in range(2):  # the second time the decision is remembered, and looked up again all the same
        said = ask(client, "edit 1", vllm_xargs={"memoir_nearest": 3}).json()["kv_transfer_params"]["memoir"]
        assert len(said["nearest"]) == 3 and said["nearest"][0] == [1, said["overlap"]]
        (part,) = said["parts"]
        assert (part["edit"], part["same"], part["decides"]) == (1, True, True)
        assert not {"nearest", "parts"} & ask(client, "edit 1").json()["kv_transfer_params"]["memoir"].keys()


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
    words = ["verify", "--server", str(client.base_url), "--store", str(store_folder), "--prompts", "4", "--turns", "1"]
    with pytest.raises(SystemExit) as done:
        main([*words, "--tokens", "8", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert done.value.code == 0 and report["holds"] and report["model"] == "m" and report["vllm"].startswith("0.")
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert states.pop("opted out equals the server without plugin") == "skip"  # needs a second server
    assert set(states.values()) == {"ok"} and len(states) == 12
    assert [cost["kind"] for cost in report["overhead"]] == ["unmatched", "matched"]


@pytest.mark.slow
def test_verify_finds_that_a_server_serves_another_store(
    client: httpx.Client, base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its masks belong to other prompts, so what shall match does not: exit code 1, and the report says where."""
    other = make_store(base, tmp_path / "other", edits=UNRELATED)
    words = ["verify", "--server", str(client.base_url), "--store", str(other), "--prompts", "2", "--turns", "0"]
    with pytest.raises(SystemExit) as done:
        main(words)
    out = capsys.readouterr().out
    assert done.value.code == 1 and "DOES NOT HOLD" in out
    assert "fail  edited prompts match their edit: 2 of 2 do not" in out and "ok    unmatched equals opted out" in out


def reported(reply: httpx.Response) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The chunks of a stream with choices, and what it reports."""
    lines = [line.removeprefix("data: ") for line in reply.raise_for_status().text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    *chunks, last = (json.loads(line) for line in lines[:-1])
    assert last["choices"] == []
    return [chunk for chunk in chunks if chunk["choices"]], last["kv_transfer_params"]


def counted(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("memoir_requests_total"))


@pytest.mark.parametrize("name", ["edit 0", "unrelated 0", "chat edit"])
@pytest.mark.parametrize(
    "more", [{}, {"include_stop_str_in_output": True}, {"n": 2, "temperature": 0.01, "seed": 1}], ids=str
)
def test_an_answer_that_ends_at_a_stop_string_has_its_decision(
    client: httpx.Client, name: str, more: dict[str, Any], expected: dict[str, Expected]
) -> None:
    def text(choice: dict[str, Any]) -> str:
        return choice["message"]["content"] if "message" in choice else choice["text"]

    whole = text(ask(client, name).raise_for_status().json()["choices"][0])
    stop = whole.strip()[3:6]
    before = counted(client)
    body = ask(client, name, stop=[stop], **more).raise_for_status().json()
    assert {choice["stop_reason"] for choice in body["choices"]} == {stop}
    assert text(body["choices"][0]).endswith(stop) is bool(more.get("include_stop_str_in_output"))
    assert body["kv_transfer_params"]["memoir"]["edit"] == expected[name].edit
    chunks, params = reported(ask(client, name, stop=[stop], stream=True, vllm_xargs={"memoir_report": 1}, **more))
    assert chunks[-1]["choices"][0]["stop_reason"] == stop
    assert params["memoir"]["edit"] == expected[name].edit
    assert counted(client) - before == 2 * more.get("n", 1)


def test_several_prompts_of_one_request_have_a_decision_each(
    client: httpx.Client, expected: dict[str, Expected]
) -> None:
    names = ["unrelated 0", "edit 0", "edit 1"]
    edits = [expected[name].edit for name in names]
    body = {"model": "m", "prompt": [PROMPTS[name] for name in names], "temperature": 0, "max_tokens": 4}
    params = client.post("/v1/completions", json=body).raise_for_status().json()["kv_transfer_params"]
    assert "memoir" not in params and [decision["edit"] for decision in params["memoir_choices"]] == edits
    twice = client.post("/v1/completions", json=body | {"n": 2, "temperature": 0.01}).raise_for_status().json()
    each = [decision["edit"] for decision in twice["kv_transfer_params"]["memoir_choices"]]
    assert each == [edit for edit in edits for _ in range(2)] and len(each) == len(twice["choices"])
    stream = body | {"stream": True, "vllm_xargs": {"memoir_report": 1}}
    _, params = reported(client.post("/v1/completions", json=stream))
    assert [decision["edit"] for decision in params["memoir_choices"]] == edits


def test_a_batch_of_chats_has_a_decision_each(client: httpx.Client, expected: dict[str, Expected]) -> None:
    names = ["chat unrelated after system", "chat edit"]
    body = {"model": "m", "messages": [PROMPTS[name] for name in names], "temperature": 0, "max_tokens": 4}
    params = client.post("/v1/chat/completions/batch", json=body).raise_for_status().json()["kv_transfer_params"]
    assert [decision["edit"] for decision in params["memoir_choices"]] == [expected[name].edit for name in names]


def test_a_stream_of_responses_ends_with_the_decision_by_itself(
    client: httpx.Client, expected: dict[str, Expected]
) -> None:
    body = {"model": "m", "input": PROMPTS["chat edit"], "temperature": 0, "max_output_tokens": 4, "stream": True}
    for more in ({}, {"vllm_xargs": {"memoir_report": 1}}):
        text = client.post("/v1/responses", json=body | more).raise_for_status().text
        last = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")][-1]
        assert last["type"] in ("response.completed", "response.incomplete")
        assert last["response"]["kv_transfer_params"]["memoir"]["edit"] == expected["chat edit"].edit


def test_a_stream_of_messages_reports_the_decision_before_its_end(
    client: httpx.Client, expected: dict[str, Expected]
) -> None:
    body = {"model": "m", "messages": PROMPTS["chat edit"], "temperature": 0, "max_tokens": 4, "stream": True}

    def events(**more: Any) -> list[tuple[str, dict[str, Any]]]:
        text = client.post("/v1/messages", json=body | more).raise_for_status().text
        pairs = [event.split("\n") for event in text.strip().split("\n\n")]
        return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in pairs]

    plain, with_report = events(), events(vllm_xargs={"memoir_report": 1})
    assert [kind for kind, _ in with_report] == [*[kind for kind, _ in plain][:-1], "memoir", "message_stop"]
    assert with_report[-2][1]["kv_transfer_params"]["memoir"]["edit"] == expected["chat edit"].edit
    whole = client.post("/v1/messages", json=body | {"stream": False}).raise_for_status().json()
    assert whole["kv_transfer_params"]["memoir"]["edit"] == expected["chat edit"].edit
