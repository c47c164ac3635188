"""Administration of a running server, started by `memoir serve`: every change over HTTP, every answer checked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import MAX_MODEL_LEN, next_generation
from servers import Server

from memoir_retrieval import Edit, Editor
from memoir_retrieval.cli.serve import server_command
from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.lookup.retriever import Retriever
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.store.read import EditStore

pytestmark = pytest.mark.engine

TOKEN = "a-token-that-no-log-may-hold"
KNOWN = {"Authorization": f"Bearer {TOKEN}"}
QUESTIONS = ("Who runs Example Corp?", "In which city does the river Glimm end?")
TARGETS = ("Jane Doe", "Oldport")
NEW, ANSWER = "Which metal is the moon gate made of?", "Copper"
TOKENS = 12


@pytest.fixture(scope="module")
def folder(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("admin") / "edits"
    with Editor(base, store, chat=True) as editor:
        editor.add([Edit(prompt=q, target=t, subject="tests") for q, t in zip(QUESTIONS, TARGETS, strict=True)])
    return store


# What no schema says: prompts that are too long, and `requires` of words that a prompt does not have.
REFUSED_WITH_400 = """
[[operations]]
include-name = "POST /lookup"
checks.positive_data_acceptance.expected-statuses = ["2xx", 400]

[[operations]]
include-name = "POST /edits"
checks.positive_data_acceptance.expected-statuses = ["2xx", 400, 409, 503]
"""


@pytest.fixture(scope="module")
def other(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second store, without the second edit."""
    store = shutil.copytree(folder, tmp_path_factory.mktemp("admin") / "other")
    next_generation(store, without=(1,))
    return store


def serve(
    model_folder: Path, folder: Path, log: Path, port: int | None = None, stores: dict[str, Path] | None = None
) -> Server:
    flags = [
        "--served-model-name",
        "m",
        "--enforce-eager",
        "--max-model-len",
        str(MAX_MODEL_LEN),
        "--max-num-seqs",
        "8",
    ]
    command, environment = server_command(str(model_folder), folder, flags, stores)
    return Server(command, log, {**environment, "MEMOIR_ADMIN_TOKEN": TOKEN, "VLLM_LOGGING_LEVEL": "DEBUG"}, port)


@pytest.fixture(scope="module")
def server(model_folder: Path, folder: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = serve(model_folder, folder, tmp_path_factory.mktemp("server") / "log", stores={"other": other})
    server.http.headers.update(KNOWN)
    yield server
    server.stop()


def ask(server: Server, question: str, **more: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": TOKENS}
    return server.http.post("/v1/chat/completions", json=body | {"return_token_ids": True} | more).json()


def decision_of(answer: dict[str, Any]) -> tuple[str, int | None, int]:
    said = answer["kv_transfer_params"]["memoir"]
    return answer["choices"][0]["message"]["content"], said["edit"], said["generation"]


def finish(server: Server, job: dict[str, Any]) -> dict[str, Any]:
    until = time.monotonic() + 300
    while job["finished"] is None and time.monotonic() < until:
        time.sleep(0.05)
        job = server.http.get(f"/memoir/jobs/{job['id']}").json()
    return job


def test_nothing_is_told_without_the_token(server: Server) -> None:
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
        for method, path in (("GET", "/memoir/edits"), ("POST", "/memoir/reload"), ("DELETE", "/memoir/edits/0")):
            reply = server.http.request(method, path, headers=headers)
            assert reply.status_code == 401, (headers, path)
    page = server.http.get("/memoir/", headers={"Authorization": ""})
    assert page.status_code == 200 and page.headers["content-security-policy"].startswith("default-src 'none'")
    assert server.http.get("/memoir/openapi.json").json()["paths"].keys() >= {"/edits", "/edits/{edit_id}", "/lookup"}


def test_edits_are_listed_and_searched(server: Server) -> None:
    page = server.http.get("/memoir/edits", params={"limit": 1, "offset": 1}).json()
    assert (page["total"], [edit["id"] for edit in page["edits"]]) == (2, [1])
    assert [e["id"] for e in server.http.get("/memoir/edits?search=GLIMM river").json()["edits"]] == [1]
    assert server.http.get("/memoir/edits?search=glimm corp").json()["total"] == 0
    edit = server.http.get("/memoir/edits/0").json()
    assert (edit["prompt"], edit["target"], edit["subject"]) == (QUESTIONS[0], TARGETS[0], "tests")
    assert server.http.get("/memoir/edits/7").status_code == 404
    assert server.http.get("/memoir/edits/x").status_code == 422


def test_a_named_store_is_administrated_by_itself(server: Server, folder: Path, other: Path) -> None:
    routes = "/memoir/stores/other"
    assert server.http.get(f"{routes}/edits", headers={"Authorization": ""}).status_code == 401
    assert server.http.get(f"{routes}/edits").json()["total"] == 1
    asked = {"messages": [{"role": "user", "content": QUESTIONS[1]}]}
    for path, generation, edits, result in (
        ("/memoir", EditStore.open(folder).manifest.generation, 2, "matched"),
        (routes, EditStore.open(other).manifest.generation, 1, "unmatched"),
    ):
        stats = server.http.get(f"{path}/stats").json()
        assert (stats["generation"], stats["edits"], stats["engines"][0]["edits"]) == (generation, edits, edits)
        assert server.http.post(f"{path}/lookup", json=asked).json()["result"] == result
    before = server.http.get("/memoir/stats").json()
    answer = ask(server, QUESTIONS[0], vllm_xargs={"memoir_store": "other"})
    said = answer["kv_transfer_params"]["memoir"]
    assert (said["store"], said["edit"], said["generation"]) == ("other", 0, generation)
    newer = next_generation(other, without=(0, 1))
    assert server.http.post(f"{routes}/reload").json() == {"generation": newer}
    said = ask(server, QUESTIONS[0], vllm_xargs={"memoir_store": "other"})["kv_transfer_params"]["memoir"]
    assert (said["store"], said["edit"], said["generation"]) == ("other", None, newer)
    assert server.http.get(f"{routes}/stats").json()["requests"] == {"matched": 1, "unmatched": 1}
    now = server.http.get("/memoir/stats").json()
    assert [now[key] for key in ("generation", "requests")] == [before[key] for key in ("generation", "requests")]
    assert "reloaded" in (other / "audit.jsonl").read_text()
    refused = server.http.post(
        "/v1/chat/completions", json={"model": "m", **asked, "vllm_xargs": {"memoir_store": "nowhere"}}
    )
    assert refused.status_code == 400 and "this server has" in refused.json()["error"]["message"]


def test_a_lookup_measures_what_the_reference_measures(server: Server, base: BaseModel, folder: Path) -> None:
    retriever = Retriever(EditStore.open(folder), base)
    for text, matched in (
        (QUESTIONS[0], True),
        ("Tell me who runs Example Corp?", None),
        ("Name three colours.", False),
    ):
        messages = [{"role": "user", "content": text}]
        result = server.http.post("/memoir/lookup", json={"messages": messages, "n": 2}).json()
        ((_, nearest),) = retriever.decide_batch([text])
        assert nearest is not None and nearest.runner_up is not None
        first, second = result["matches"]
        assert (first["edit"], second["edit"]) == (nearest.id, nearest.runner_up[0])
        assert first["overlap"] == pytest.approx(nearest.overlap, abs=0.01)
        assert second["overlap"] == pytest.approx(nearest.runner_up[1], abs=0.01)
        assert first["prompt"] == QUESTIONS[first["edit"]] and not second["matched"]
        for mine, theirs in zip(retriever.parts(text), result["parts"], strict=True):
            assert (theirs["text"], theirs["decides"]) == (mine.text.strip(), mine.decides)
            assert (theirs["edit"] if theirs["same"] else None) == mine.match
        if matched is not None:
            assert first["matched"] is matched and result["result"] == ("matched" if matched else "unmatched")
    assert server.http.post("/memoir/lookup", json={}).status_code == 422
    plain = server.http.post("/memoir/lookup", json={"messages": [{"role": "user", "content": QUESTIONS[0]}]}).json()
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    for messages in (
        [{"role": "user", "content": [{"type": "text", "text": QUESTIONS[0]}]}],
        [{"role": "user", "name": "ann", "content": QUESTIONS[0]}],
        [
            {"role": "user", "content": "Look it up."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": "nothing"},
            {"role": "user", "content": QUESTIONS[0]},
        ],
    ):
        result = server.http.post("/memoir/lookup", json={"messages": messages})
        assert result.status_code == 200, result.text
        assert (result.json()["result"], result.json()["matches"][0]["edit"]) == ("matched", 0), messages
        if len(messages) == 1:
            assert result.json()["matches"] == plain["matches"]
    for wrong in ([{"role": "user", "content": 5}], [{"content": "x"}], [{"role": "user", "content": [{"type": "x"}]}]):
        refused = server.http.post("/memoir/lookup", json={"messages": wrong})
        assert refused.status_code == 400 and "\n" not in refused.json()["detail"], refused.text
    too_long = server.http.post("/memoir/lookup", json={"prompt": "word " * 2 * MAX_MODEL_LEN})
    assert too_long.status_code == 400 and "\n" not in too_long.json()["detail"]


def test_an_edit_is_added_served_and_removed(server: Server, folder: Path, base: BaseModel) -> None:
    before = EditStore.open(folder).manifest.generation
    plain, edit, generation = decision_of(ask(server, NEW))
    assert (edit, generation) == (None, before)
    given = {"prompt": NEW, "target": ANSWER, "source": "a test", "rephrases": ["The moon gate is of which metal?"]}
    given["requires"] = ["gate", ["moon", "lunar"]]
    never = server.http.post("/memoir/edits", json=given | {"requires": ["gate", "sun"]})
    assert never.status_code == 400 and "does not contain what it requires, 'sun'" in never.json()["detail"]
    reply = server.http.post("/memoir/edits", json=given)
    assert reply.status_code == 202 and ANSWER not in plain
    twin = server.http.post("/memoir/edits", json=given)
    assert twin.status_code == 409 and "same prompt" in twin.json()["detail"]
    answers = []
    while server.http.get(f"/memoir/jobs/{reply.json()['id']}").json()["finished"] is None:
        answers.append(decision_of(ask(server, QUESTIONS[0])))
    job = finish(server, reply.json())
    assert (job["state"], job["edit"], job["generation"], job["error"]) == ("done", 2, before + 1, None), job
    assert {edit for _, edit, _ in answers} == {0} and len(answers) > 1, "answers go on while an edit is trained"
    text, edit, generation = decision_of(ask(server, NEW))
    assert (edit, generation) == (2, before + 1) and ANSWER in text
    assert decision_of(ask(server, NEW, vllm_xargs={"memoir": "off"}))[0] == plain
    model = EditedModel(Retriever(EditStore.open(folder), base))
    for question in (NEW, *QUESTIONS):
        (wanted,) = model.generate([question], max_new_tokens=TOKENS)
        assert ask(server, question)["choices"][0]["token_ids"] == list(wanted.tokens), question
    stored = server.http.get("/memoir/edits/2").json()
    assert (stored["rephrases"], stored["requires"]) == (given["rephrases"], given["requires"])
    like = NEW.replace("gate", "door")
    assert decision_of(ask(server, like))[1] is None, "the gate is required"
    result = server.http.post("/memoir/lookup", json={"messages": [{"role": "user", "content": like}]}).json()
    assert (result["result"], result["matches"][0]["edit"]) == ("unmatched", 2)
    assert result["matches"][0]["overlap"] >= result["tau"] and result["matches"][0]["requires"] == given["requires"]

    same = server.http.post("/memoir/edits", json=given)
    assert (same.status_code, same.json()["id"]) == (200, 2)
    other = server.http.post("/memoir/edits", json=given | {"target": "Tin"})
    assert other.status_code == 409 and "'Copper'" in other.json()["detail"]
    freer = server.http.post("/memoir/edits", json=given | {"requires": ["gate"]})
    assert freer.status_code == 409 and 'requires ["gate",["moon","lunar"]]' in freer.json()["detail"]

    job = finish(server, server.http.delete("/memoir/edits/2").json())
    assert (job["state"], job["generation"]) == ("done", before + 2), job
    assert decision_of(ask(server, NEW)) == (plain, None, before + 2)
    assert server.http.delete("/memoir/edits/2").status_code == 404
    entries = server.http.get("/memoir/audit").json()["entries"]
    assert [entry["what"] for entry in entries] == ["active", "stored", "accepted"] * 2
    assert {entry["who"] for entry in entries} == {"admin"}
    assert entries[-1]["change"]["add"]["prompt"] == NEW and entries[0]["generation"] == before + 2


def test_a_change_that_cannot_be_made_fails_with_one_line(server: Server, folder: Path) -> None:
    before = EditStore.open(folder).manifest
    job = finish(server, server.http.post("/memoir/edits", json={"prompt": "w " * 8190, "target": "x"}).json())
    assert job["state"] == "failed" and "tokens" in job["error"] and "\n" not in job["error"]
    assert EditStore.open(folder).manifest == before
    assert server.http.get("/memoir/audit").json()["entries"][0]["what"] == "failed"


def wait_for_answers(answers: list[tuple[str, list[int], int | None, int]], generation: int) -> None:
    """Until clients have had several answers of a generation."""
    until = time.monotonic() + 120
    while sum(of == generation for *_, of in list(answers)) < 9:
        assert time.monotonic() < until, f"too few answers of generation {generation}"
        time.sleep(0.05)


@pytest.mark.slow
def test_every_answer_under_load_is_its_generations(server: Server, folder: Path, base: BaseModel) -> None:
    """Generations follow each other while clients ask; each answer is the reference's for the one that it reports."""
    questions = (*QUESTIONS, "Name three colours.")
    stores = {(store := EditStore.open(folder)).manifest.generation: store}
    answers: list[tuple[str, list[int], int | None, int]] = []
    done = threading.Event()

    def client(at: int) -> None:
        while not done.is_set():
            question = questions[at % 3]
            reply = ask(server, question)
            answers.append((question, reply["choices"][0]["token_ids"], *decision_of(reply)[1:]))
            at += 1

    threads = [threading.Thread(target=client, args=(at,)) for at in range(3)]
    for thread in threads:
        thread.start()
    try:
        for without in ((), (0,), ()):
            wait_for_answers(answers, max(stores))
            generation = next_generation(folder, without=without)
            stores[generation] = EditStore.open(folder)
            reply = server.http.post("/memoir/reload").json()
            assert reply == {"generation": generation}
        wait_for_answers(answers, max(stores))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    wanted = {}
    for generation, store in stores.items():
        model = EditedModel(Retriever(store, base))
        for question, answer in zip(questions, model.generate(list(questions), max_new_tokens=TOKENS), strict=True):
            wanted[question, generation] = (list(answer.tokens), answer.edit)
    assert {generation for *_, generation in answers} == set(stores)
    for question, tokens, edit, generation in answers:
        assert (tokens, edit) == wanted[question, generation], (question, generation)


def test_a_damaged_store_is_not_adopted(server: Server, folder: Path) -> None:
    generation = EditStore.open(folder).manifest.generation
    next_generation(folder)
    codes = folder / EditStore.open(folder).manifest.codes.name
    sound = codes.read_bytes()
    codes.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    reply = server.http.post("/memoir/reload")
    assert reply.status_code == 503 and f"generation {generation} is served" in reply.json()["detail"]
    codes.write_bytes(sound)
    assert server.http.post("/memoir/reload").json() == {"generation": generation + 1}
    stats = server.http.get("/memoir/stats").json()
    assert stats["generation"] == stats["store_generation"] == generation + 1


def test_counters(server: Server) -> None:
    def read() -> dict[str, float]:
        lines = [line for line in server.http.get("/metrics").text.splitlines() if line.startswith("memoir_")]
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    before = read()
    ask(server, QUESTIONS[1])
    ask(server, "Name three colours.")
    ask(server, QUESTIONS[1], vllm_xargs={"memoir": "off"})
    server.http.post("/memoir/lookup", json={"prompt": "Name three colours."})
    after = read()
    for result, more in (("matched", 1), ("unmatched", 1), ("off", 1)):
        name = f'memoir_requests_total{{result="{result}",store=""}}'
        assert after[name] - before.get(name, 0) == more, result
    for name in ('memoir_overlap_count{result="matched"}', 'memoir_edit_hits_total{edit="1",store=""}'):
        assert after[name] - before.get(name, 0) == 1, name
    generation = server.http.get("/memoir/stats").json()["generation"]
    until = time.monotonic() + 20
    counters = 'memoir_generation{engine="0",store=""}', 'memoir_lookups_total{engine="0"}'
    while (now := read())[counters[0]] != generation or now[counters[1]] < 3:  # engines are asked every few seconds
        assert time.monotonic() < until
        time.sleep(0.5)
    assert now['memoir_routing_seconds_total{engine="0"}'] > 0
    stats = server.http.get("/memoir/stats").json()
    assert stats["recent"][0]["edit"] == 1
    assert {entry["edit"]: entry["hits"] for entry in stats["hits"]}[1] == after[
        'memoir_edit_hits_total{edit="1",store=""}'
    ]


def test_the_log_tells_of_matches_and_never_of_tokens(server: Server) -> None:
    ask(server, QUESTIONS[1])
    log = server.log.read_text()
    lines = [line for line in log.splitlines() if 'memoir: {"request"' in line]
    matched = json.loads(lines[-1][lines[-1].index('{"request"') :])
    assert matched["edit"] == 1 and matched["request"].startswith("chatcmpl-")
    assert TOKEN not in log


@pytest.mark.slow
def test_requests_made_from_the_schema(server: Server, tmp_path: Path) -> None:
    """Schemathesis: right and wrong requests of every route. It knows no link from a job's id to an edit's."""
    settings = tmp_path / "schemathesis.toml"
    settings.write_text(REFUSED_WITH_400)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(settings)]
    command += ["run", f"{server.http.base_url}/memoir/openapi.json"]
    command += ["--header", f"Authorization: Bearer {TOKEN}", "--checks", "all", "--max-examples", "15", "--no-color"]
    command += ["--exclude-checks", "allow_header_conformance", "--phases", "examples,coverage,fuzzing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[done.stdout.find("= FAILURES =") :]


@pytest.mark.slow
def test_a_server_killed_between_disk_and_activation_serves_the_edit_when_it_starts_again(
    base: BaseModel, model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "edits"
    with Editor(base, folder, chat=True) as editor:
        editor.add([Edit(prompt=QUESTIONS[0], target=TARGETS[0])])
    server = serve(model_folder, folder, tmp_path / "log")
    edits = (
        (NEW, ANSWER),
        ("Who painted the harbour wall of Exampleton?", "Ada Lind"),
        ("When did the fog come?", "Never"),
    )
    log = folder / "audit.jsonl"
    for number, (prompt, target) in enumerate(edits, 1):
        job = server.http.post("/memoir/edits", json={"prompt": prompt, "target": target}, headers=KNOWN).json()
        added, until = folder / f"added-{number + 1}.safetensors", time.monotonic() + 120
        while not added.exists():
            assert time.monotonic() < until
            time.sleep(0.0005)
        os.killpg(server.process.pid, signal.SIGSTOP)
        if not is_active(log, job["id"]):
            break
        os.killpg(server.process.pid, signal.SIGCONT)  # too late to test anything: once more
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
    assert not is_active(log, job["id"]), "killed too late to test anything"
    again = serve(model_folder, folder, tmp_path / "log", server.port)
    try:
        assert decision_of(ask(again, prompt))[1:] == (number, number + 1)
        entries = again.http.get("/memoir/audit", headers=KNOWN).json()["entries"]
    finally:
        again.stop()
    assert entries[0]["job"] == job["id"] and len({entry["job"] for entry in entries}) == number
    assert (entries[0]["what"], entries[0]["stored"], entries[0]["edit"]) == ("interrupted", True, number)


def is_active(log: Path, job: str) -> bool:
    """Whether an audit log says that a change is served."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return any((entry["job"], entry["what"]) == (job, "active") for entry in entries)
