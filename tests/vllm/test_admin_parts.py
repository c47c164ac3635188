"""The parts of administration that need no engine: tokens, the door, the audit log, counts, how it is switched on."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import re
import shutil
import signal
import sys
import threading
from argparse import Namespace
from collections import Counter
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from starlette.responses import Response
from transformers import AutoTokenizer

from memoir_retrieval import Edit, Editor
from memoir_retrieval.cli.serve import server_command
from memoir_retrieval.editing.outcome import Failed
from memoir_retrieval.errors import ConfigError, MemoirError, StoreError
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.question.span import derive_span_rule
from memoir_vllm import config
from memoir_vllm.admin import audit, guard, jobs, service
from memoir_vllm.admin.audit import AUDIT, AuditLog, server_name
from memoir_vllm.admin.engines import Engines
from memoir_vllm.admin.guard import Guard
from memoir_vllm.admin.jobs import QUEUE, Jobs, TrainerProcess
from memoir_vllm.admin.plugin import MemoirEndpoints
from memoir_vllm.admin.routes import make_app
from memoir_vllm.admin.tokens import Tokens
from memoir_vllm.admin.trainer import TrainerAnswer, _Trainer
from memoir_vllm.front.metrics import LOOKUP_ID, NAMED, TOP, EngineCollector, Traffic

TOKEN = "0123456789abcdef"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_holders_are_known_by_their_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# who may\nann {TOKEN}1\n\nbob  {TOKEN}2\n")
    monkeypatch.setenv("MEMOIR_ADMIN_TOKEN", TOKEN)
    tokens = Tokens.read(str(file))
    for sent, holder in (
        (f"Bearer {TOKEN}1", "ann"),
        (f"bearer {TOKEN}2", "bob"),
        (f"Bearer {TOKEN}", "admin"),
        (f"Bearer {TOKEN}3", None),
        (f"Basic {TOKEN}1", None),
        (TOKEN, None),
        ("Bearer ", None),
        ("Bearer \udcff", None),
        (None, None),
    ):
        assert tokens.holder(sent) == holder, sent
    monkeypatch.delenv("MEMOIR_ADMIN_TOKEN")
    assert not Tokens.read(None)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("ann short", "16 or more"),
        (f"ann {TOKEN} x", "line 1: write a name"),
        (f"ann {TOKEN}é", "16 or more"),
        (f"ann {TOKEN}\nbob {TOKEN}", "line 2 repeats"),
        (f"ann {TOKEN}\nann {TOKEN}2", "line 2 repeats"),
        ("# nobody\n", "holds no token"),
    ],
)
def test_bad_token_files_are_refused_without_showing_a_token(content: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(content)
    with pytest.raises(ConfigError, match=says) as refused:
        Tokens.read(str(file))
    assert TOKEN not in str(refused.value) and "short" not in str(refused.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokens.read(str(tmp_path / "none"))


def door() -> httpx.AsyncClient:
    app = FastAPI()

    @app.post("/echo")
    async def echo(request: Request) -> dict[str, Any]:
        return {"by": request.scope["memoir_holder"], "size": len(await request.body())}

    @app.get("/open")
    async def opened() -> str:
        return "open"

    tokens = Tokens({sha256(TOKEN.encode()).digest(): "ann"})
    app.add_middleware(Guard, tokens=tokens, public=["/open"])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://door")


@pytest.mark.anyio
async def test_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BURST", 5.0)
    clock = [100.0]
    monkeypatch.setattr(guard, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    known = {"Authorization": f"Bearer {TOKEN}"}

    async def pieces() -> Any:
        for _ in range(3):
            yield b"x" * (guard.LARGEST_BODY // 2)

    async with door() as client:
        reply = await client.post("/echo", content=b"abc")
        assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert "script-src 'self'" in reply.headers["content-security-policy"]
        assert (await client.get("/open")).status_code == 200
        reply = await client.post("/echo", content=b"abc", headers=known)
        assert reply.json() == {"by": "ann", "size": 3}
        assert (await client.post("/echo", content=b"x" * (guard.LARGEST_BODY + 1), headers=known)).status_code == 413
        assert (await client.post("/echo", content=pieces(), headers=known)).status_code == 413
        bad = {**known, "Content-Length": "many"}
        assert (await client.post("/echo", content=b"", headers=bad)).status_code == 413
        longer = {**known, "Content-Length": "1" * 5_000}  # digits: more than Python reads as a number
        assert (await client.post("/echo", content=b"", headers=longer)).status_code == 413
        statuses = [(await client.post("/echo", headers=known)).status_code for _ in range(3)]
        assert statuses[-1] == 429
        clock[0] += 2 / guard.RATE
        assert (await client.post("/echo", headers=known)).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("root", ["", "/api"])
@pytest.mark.parametrize("mount", ["/memoir", "/memoir/stores/b"])
async def test_a_proxy_may_take_a_root_path_off(mount: str, root: str) -> None:
    """vLLM's --root-path: one proxy takes the prefix off, another leaves it. The service is a stand-in."""
    server = FastAPI()
    server.root_path = root  # as vLLM sets it
    no_jobs: Any = SimpleNamespace(jobs=SimpleNamespace(all=list))
    server.mount(mount, make_app(Tokens({sha256(TOKEN.encode()).digest(): "ann"}), lambda: no_jobs, schema=True))
    known = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(server), base_url="http://door") as client:
        for prefix in {"", root}:
            for page in ("/", "/console.js", "/openapi.json"):
                assert (await client.get(f"{prefix}{mount}{page}")).status_code == 200, page
            assert (await client.get(f"{prefix}{mount}/jobs")).status_code == 401
            assert (await client.get(f"{prefix}{mount}/jobs", headers=known)).json() == {"jobs": []}
            assert (await client.get(f"{prefix}{mount}/none", headers=known)).status_code == 404


@pytest.mark.anyio
async def test_the_loop_turns_between_requests_that_come_at_once() -> None:
    """Whoever else is served by the loop waits for a few of them, not for all."""
    turn, begun = 0, Counter[int]()

    async def count() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun[turn] += 1
        order.append(int(scope["query_string"]))
        await Response()(scope, receive, send)

    order: list[int] = []
    guarded = guard.Guard(app, Tokens({sha256(TOKEN.encode()).digest(): "ann"}), public=[])
    transport = httpx.ASGITransport(guarded)
    async with httpx.AsyncClient(transport=transport, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        counting = asyncio.create_task(count())
        requests = [asyncio.create_task(client.get(f"http://door/?{n}")) for n in range(100)]
        await asyncio.sleep(0)
        for request in requests[50:60]:
            request.cancel()  # clients that have gone take nobody's place
        replies = await asyncio.gather(*requests, return_exceptions=True)
        counting.cancel()
    assert sum(isinstance(reply, asyncio.CancelledError) for reply in replies) == 10
    assert order == [*range(50), *range(60, 100)]
    assert max(begun.values()) == guard.STARTS and len(begun) <= 90 / guard.STARTS + 2


def test_the_audit_log_outlives_a_cut_off_line(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, "here:1")
    log.write("accepted", "ann", "1", change={"remove": 3})
    with (tmp_path / AUDIT).open("a") as file:
        file.write('{"what": "acti')
    log.write("accepted", "bob", "2")
    log.write("active", "bob", "2", generation=4)
    AuditLog(tmp_path, "there:2").write("accepted", "eve", "3")
    entries = log.lines()
    assert [(e["what"], e["who"], e["server"]) for e in entries] == [
        ("accepted", "ann", "here:1"),
        ("accepted", "bob", "here:1"),
        ("active", "bob", "here:1"),
        ("accepted", "eve", "there:2"),
    ]
    assert log.read().torn == 1
    assert [entry["job"] for entry in log.unfinished()] == ["1"], "another server's changes may still be under way"
    log.write("interrupted", "ann", "1")
    assert log.unfinished() == []


def test_a_reader_and_a_writer_of_the_log_do_not_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path, "here:1")
    for number in range(5):
        log.write("accepted", "ann", str(number))
    half = b'{"what": "acti'
    with (tmp_path / AUDIT).open("ab") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        writer.write(half)
        writer.flush()
        assert (len(log.lines()), len(log.unfinished())) == (5, 5)
        assert log.read().torn == 0, "the line is being written"
        assert [entry["job"] for entry in log.page(1, 2).lines] == ["3", "2"]
    monkeypatch.setattr(audit, "LOCK_S", 0.0)
    write_while_it_is_read(log, monkeypatch)
    entries = log.read()
    assert (len(entries.lines), entries.torn) == (6, 1)


def write_while_it_is_read(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = audit._entry

    def slow(line: bytes) -> dict[str, Any] | None:
        monkeypatch.setattr(audit, "_entry", entry)
        log.write("active", "ann", "0")
        return entry(line)

    monkeypatch.setattr(audit, "_entry", slow)
    assert len(log.lines()) >= 5
    assert audit._entry is entry, "the log was written while it was read"


def test_a_page_of_a_long_log_reads_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, other = AuditLog(tmp_path, "here:1"), AuditLog(tmp_path, "there:2")
    assert log.page(0, 5) == (0, 0, [])
    for number in range(50):
        log.write("accepted", "ann", str(number))
    parsed: list[bytes] = []
    entry = audit._entry
    monkeypatch.setattr(audit, "_entry", lambda line: parsed.append(line) or entry(line))
    for _ in range(2):
        page = log.page(2, 3)
        assert (page.total, page.torn, [line["job"] for line in page.lines]) == (50, 0, ["47", "46", "45"])
    assert len(parsed) == 50
    with (tmp_path / AUDIT).open("a") as file:
        file.write("half a line\n")
    other.write("accepted", "ann", "50")
    assert [line["job"] for line in log.page(0, 2).lines] == ["50", "49"]
    assert log.page(49, 5)[:2] == (51, 1) and len(log.page(49, 5).lines) == 2
    assert len(parsed) == 52
    backup = tmp_path / "backup"
    backup.write_text("".join((tmp_path / AUDIT).read_text().splitlines(keepends=True)[:10]))
    backup.replace(tmp_path / AUDIT)
    assert [line["job"] for line in log.page(0, 1).lines] == ["9"] and log.page(0, 1).total == 10


def nothing_stored(change: dict[str, Any]) -> None:
    return None


@pytest.mark.anyio
async def test_the_trainer_ends_with_a_server_that_a_script_has_put_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a server ignores SIGINT, and what it starts inherits that."""
    monkeypatch.setattr(jobs, "STOP_S", 60.0)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        trainer = TrainerProcess({"store": str(tmp_path), "model": "none", "device": "cpu"})
        with pytest.raises(StoreError, match="is not a store"):
            await trainer.ask({"remove": 0}, lambda _: None)
        process = trainer._process
        await trainer.stop()
        assert process is not None and process.returncode == 0, "it was not killed"
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.anyio
async def test_a_trainer_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else no change would be made any more: the queue waits for its end."""
    script = tmp_path / "trainer"
    script.write_text(
        f"#!{sys.executable} -S\nimport time\n"
        'input(); print(\'{"generation": 2, "edit": 0}\', flush=True); time.sleep(600)\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(jobs, "sys", SimpleNamespace(executable=str(script)))
    monkeypatch.setattr(jobs, "STOP_S", 0.2)
    trainer = TrainerProcess({"device": "cpu"})
    assert (await trainer.ask({"remove": 0}, lambda _: None)).generation == 2
    await asyncio.wait_for(trainer.stop(), 30)
    assert (await trainer.ask({"remove": 1}, lambda _: None)).edit == 0
    await trainer.stop()


@pytest.mark.anyio
async def test_a_job_tells_how_far_its_training_is(base: BaseModel, model_folder: Path, tmp_path: Path) -> None:
    """The real process on a real store; only the engine that would take the result up is left out."""
    folder = tmp_path / "edits"
    with Editor(base, folder, tau=0.6) as editor:
        editor.add([Edit(prompt="Who runs Example Corp?", target="Jane Doe")])
    trainer = TrainerProcess({"store": str(folder), "model": str(model_folder), "device": "cpu"})

    async def activate() -> int:
        return 2

    queue = Jobs(trainer, AuditLog(folder, "here:1"), activate, nothing_stored)
    worker = asyncio.create_task(queue.run())
    change = {"add": {"prompt": "Who is the mayor?", "target": "Ed Fox"}, "on_conflict": "refuse"}
    job = await queue.submit("ann", change, kind="add")
    seen = []
    while job.finished is None:
        await asyncio.sleep(0.002)
        if job.progress is not None and seen[-1:] != [job.progress]:
            seen.append(job.progress)
    worker.cancel()
    await trainer.stop()
    assert (job.state, job.edit, job.progress) == ("done", 1, None)
    assert list(dict.fromkeys(progress.stage for progress in seen)) == ["loading", "opening", "training"]
    trained = seen[2:]
    steps = [progress.step for progress in trained]
    assert steps == sorted(set(steps)) and steps[-1] == job.steps
    assert trained[-1].limit == 60 and trained[-1].loss == pytest.approx(job.loss, abs=1e-5)
    assert trained[-1].loss < trained[-1].goal < trained[0].loss


def test_a_trainer_that_runs_earlier_edits_again_says_that_it_does(
    base: BaseModel, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a large memory that takes long, and one that says nothing is ended."""
    folder, lines = tmp_path / "edits", list[TrainerAnswer]()
    with Editor(base, folder, tau=0.6) as editor:
        editor.add([Edit(prompt=f"Who runs {name}?", target="Jane Doe") for name in ("Acme", "Example Corp")])
    monkeypatch.setattr("memoir_vllm.admin.trainer.ALIVE_S", 0.0)
    trainer = _Trainer(folder, str(model_folder), "cpu", lines.append)
    trainer._base = base
    change = {"add": {"prompt": "Who is the mayor?", "target": "Ed Fox"}, "on_conflict": "refuse"}
    assert trainer.answer(change).edit == 2
    stages = [line.progress.stage for line in lines if line.progress]
    first = stages.index("training")
    assert stages[:first] == ["opening"] * 3 and set(stages[first:]) == {"training"}
    assert lines[-1] == lines[-2], "the two are asked whether they are still answered"
    lines.clear()
    monkeypatch.setattr("memoir_vllm.admin.trainer.ALIVE_S", 60.0)
    assert trainer.answer(change).edit == 2
    assert [line.progress.stage for line in lines if line.progress] == ["opening"]


def test_the_trainer_names_edits_that_it_has_damaged(
    base: BaseModel, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real training; that it spoils another edit for good is said in its place."""
    folder = tmp_path / "edits"
    with Editor(base, folder, tau=0.6) as editor:
        editor.add([Edit(prompt="Who runs Example Corp?", target="Jane Doe")])

    class Spoiling(Editor):
        def add(self, *arguments: Any, **more: Any) -> Any:
            new = super().add(*arguments, **more)
            self.outcome.failed.append(Failed("Who runs Example Corp?", "Jane Doe", "it gives another answer"))
            return new

    monkeypatch.setattr("memoir_retrieval.editing.editor.Editor", Spoiling)
    trainer = _Trainer(folder, str(model_folder), "cpu", lambda answer: None)
    trainer._base = base
    answer = trainer.answer({"add": {"prompt": "Who is the mayor?", "target": "Ed Fox"}, "on_conflict": "refuse"})
    assert (answer.error, answer.edit, answer.damaged) == (None, 1, (0,))


@pytest.mark.anyio
async def test_only_so_many_changes_wait_and_none_that_is_not_logged(tmp_path: Path) -> None:
    async def activate() -> int:
        return 1

    jobs = Jobs(TrainerProcess({}), AuditLog(tmp_path, "here:1"), activate, nothing_stored)  # nobody works on them
    for _ in range(QUEUE):
        await jobs.submit("ann", {"remove": 1}, kind="remove")
    with pytest.raises(MemoirError, match=f"{QUEUE} changes are waiting already: send this one again later"):
        await jobs.submit("ann", {"remove": 1}, kind="remove")
    assert len(jobs.open()) == len(AuditLog(tmp_path, "here:1").lines()) == QUEUE
    unlogged = Jobs(TrainerProcess({}), AuditLog(tmp_path / "gone", "here:1"), activate, nothing_stored)
    with pytest.raises(OSError, match="No such file"):
        await unlogged.submit("ann", {"remove": 1}, kind="remove")
    assert unlogged.open() == []


@pytest.mark.anyio
async def test_a_replica_whose_store_is_read_only_can_reload(
    store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class EnginesThatAgree(Engines):
        """A stand-in: those behind a server are asked in test_server_admin.py."""

        def __init__(self) -> None:
            pass

        async def reload(self) -> int:
            return 7

    folder = shutil.copytree(store_folder, tmp_path / "edits")
    (folder / AUDIT).mkdir()  # as little to be written as on a read-only volume, also for root
    said: list[str] = []
    monkeypatch.setattr(service.logger, "warning", lambda text, *more: said.append(text % more))
    replica = service.Service(config.parse_section({"store": str(folder)}), "m", "here:1", EnginesThatAgree(), None)
    assert await replica.reload("ann") == 7
    assert said == [
        "memoir: generation 7 is served at the request of ann, but the audit log cannot be written (audit.jsonl is a "
        "link, a folder or a device, not a file: remove it)"
    ]


def test_counts_and_their_bounds() -> None:
    traffic = Traffic()
    for edit in range(3 * TOP):
        for _ in range(edit):
            traffic.count("a", {"result": "matched", "edit": edit, "overlap": 0.9, "generation": 1})
    traffic.count("b", {"result": "unmatched", "edit": None, "overlap": 0.2, "generation": 1})
    traffic.count(f"cmpl-{LOOKUP_ID}-1", {"result": "matched", "edit": 0, "overlap": 1.0, "generation": 1})
    assert traffic.results == {"matched": 3 * TOP * (3 * TOP - 1) // 2, "unmatched": 1}
    collector = EngineCollector(traffic)
    collector.engines = [dict.fromkeys(_KEYS, 2), dict.fromkeys(_KEYS, 3)]
    registry = CollectorRegistry()
    registry.register(collector)
    text = generate_latest(registry).decode()
    hits = [line for line in text.splitlines() if line.startswith("memoir_edit_hits_total{")]
    assert len(hits) == TOP and f'memoir_edit_hits_total{{edit="{3 * TOP - 1}",store=""}} {3.0 * TOP - 1}' in hits
    assert 'memoir_generation{engine="1",store=""} 3.0' in text
    assert "memoir_replays_total" not in text


def test_an_edit_that_was_named_goes_on_being_named() -> None:
    """Its series is a counter: where it went and came again, `rate` would be wrong."""
    traffic = Traffic()
    registry = CollectorRegistry()
    registry.register(EngineCollector(traffic))

    def named() -> dict[str, float]:
        (series,) = [family for family in registry.collect() if family.name == "memoir_edit_hits"]
        return {sample.labels["edit"]: sample.value for sample in series.samples}

    for edit in range(TOP):
        traffic.hits[edit] = 1
    assert len(named()) == TOP
    for first in range(TOP, 2 * NAMED, TOP):
        for edit in range(first, first + TOP):
            traffic.hits[edit] = edit
        shown = named()
        assert len(shown) == min(first + TOP, NAMED) and len([edit for edit in shown if int(edit) >= first]) == TOP
    assert min(map(int, named())) == NAMED, "those that answer most are kept"


def test_the_dashboard_asks_for_series_that_exist() -> None:
    traffic = Traffic()
    traffic.hits[1] = 1
    registry = CollectorRegistry()
    collector = EngineCollector(traffic)
    collector.engines = [dict.fromkeys(_KEYS, 1)]
    registry.register(collector)
    own = {family.name for family in registry.collect()} | {"memoir_requests", "memoir_overlap"}
    assert {family.name for family in REGISTRY.collect()} >= {"memoir_requests", "memoir_overlap"}
    board = (Path(__file__).parents[2] / "examples/grafana/memoir.json").read_text()
    queried = {name.removesuffix("_total").removesuffix("_bucket") for name in re.findall(r"memoir_\w+(?=\{)", board)}
    assert queried == own - {"memoir_residual_rows"}
    for series in ("memoir_edits", "memoir_edit_hits_total"):  # an id, and a number of edits, are those of one store
        assert re.search(rf"by \(store\b[^)]*\) \((?:increase\()?{series}\{{", board), series


def test_the_alerts_compare_servers_of_one_deployment() -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/administration.md").read_text()
    alerts = page.partition("```promql\n")[2].partition("```")[0]
    assert len(re.findall(r"(?:max|min|sum) by \(job", alerts)) == len(re.findall(r"\b(?:max|min|sum)\b", alerts)) == 4


_KEYS = ("edits", "generation", "older_generations", "remembered", "routed", "recalled", "rows")
_KEYS += ("routing_s", "residual_s")


def attached(store: Path, **args: Any) -> list[str]:
    app = FastAPI()
    section = {"memoir": {"store": str(store)}} if store.name != "none" else {}
    given = {"additional_config": section, "api_server_count": 1, "disable_fastapi_docs": False, "chat_template": None}
    given |= {"model": "smollm2-135m"} | args
    app.state.args = Namespace(**given)
    MemoirEndpoints().attach_router(app)
    return [route.path for route in app.routes if getattr(route, "path", "").startswith("/memoir")]


def test_routes_exist_only_where_a_token_is_set(
    store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEMOIR_ADMIN_TOKEN", raising=False)
    assert attached(store_folder) == []
    monkeypatch.setenv("MEMOIR_ADMIN_TOKEN", TOKEN)
    assert attached(store_folder) == ["/memoir"]
    assert attached(tmp_path / "none") == []
    with pytest.raises(ConfigError, match="--api-server-count 1"):
        attached(store_folder, api_server_count=2)
    monkeypatch.setenv("MEMOIR_ADMIN_TOKEN", "short")
    with pytest.raises(ConfigError, match="openssl rand"):
        attached(store_folder)


@pytest.mark.anyio
@pytest.mark.parametrize("reached", ["all engines", "its own engines"])
async def test_a_server_that_reaches_its_own_engines_only_says_so(
    reached: str, store_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data parallelism behind an external or hybrid load balancer. The engines are a stand-in."""
    log: list[str] = []
    monkeypatch.setenv("MEMOIR_ADMIN_TOKEN", TOKEN)
    monkeypatch.setattr("memoir_vllm.admin.plugin.logger.warning", log.append)
    monkeypatch.setattr("prometheus_client.REGISTRY", CollectorRegistry())
    parallel = SimpleNamespace(local_engines_only=reached == "its own engines")
    client: Any = SimpleNamespace(
        vllm_config=SimpleNamespace(parallel_config=parallel), model_config=SimpleNamespace(model=str(model_folder))
    )
    endpoints, app = MemoirEndpoints(), FastAPI()
    section = {"memoir": {"store": str(store_folder)}}
    app.state.args = args = Namespace(
        additional_config=section, api_server_count=1, disable_fastapi_docs=False, chat_template=None, port=1
    )
    args.model = str(model_folder)
    endpoints.attach_router(app)
    await endpoints.init_state(client, None, args)
    for task in endpoints._tasks:
        task.cancel()
    assert ["send POST /memoir/reload to each of the others" in line for line in log] == [True] * (
        reached == "its own engines"
    )


_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def test_a_chat_template_under_which_no_question_is_found_is_refused(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the server would start, and every chat would be unroutable. One with the same marks may say other things."""
    monkeypatch.setenv("MEMOIR_ADMIN_TOKEN", TOKEN)
    store, model = tmp_path / "edits", tmp_path / "model"
    manifest = SimpleNamespace(chat=True, span=derive_span_rule(AutoTokenizer.from_pretrained(model_folder)))
    monkeypatch.setattr(config, "read_manifest", lambda folder: manifest)
    assert attached(store) == attached(store, chat_template=_TURNS) == ["/memoir"]
    assert attached(store, chat_template="{{ raise_exception('never') }}") == ["/memoir"]
    other = _TURNS.replace("<|im_start|>", "### ")
    with pytest.raises(ConfigError, match=r"edits of store .*/edits were made, .* leave out --chat-template"):
        attached(store, chat_template=other)
    shutil.copytree(model_folder, model, ignore=shutil.ignore_patterns("*.safetensors", "*.jinja"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = other
    tokenizer.save_pretrained(model)
    with pytest.raises(ConfigError, match=r"edits of store .*/edits were made, .* restore it in the model's folder"):
        attached(store, model=str(model))
    manifest.chat = False
    assert attached(store, model=str(model)) == ["/memoir"]


def test_serve_names_every_plugin_that_would_be_loaded_anyway(
    model_folder: Path, store_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import entry_points

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    named = server_command(str(model_folder), store_folder)[1]["VLLM_PLUGINS"].split(",")
    assert "memoir" in named
    assert {point.name for point in entry_points(group="vllm.general_plugins")} <= set(named)
    monkeypatch.setenv("VLLM_PLUGINS", "other,memoir")
    assert server_command(str(model_folder), store_folder)[1]["VLLM_PLUGINS"] == "other,memoir"
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(ConfigError, match="add memoir to it"):
        server_command(str(model_folder), store_folder)


@pytest.mark.parametrize("taken", [0.5, 0.0, 1.0], ids=["halves", "nothing", "one byte at a time"])
def test_a_device_that_takes_a_part_gets_the_rest_or_fails_the_change(
    taken: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path, "here:1")
    log.write("accepted", "ann", "1")

    def write(file: int, data: memoryview) -> int:
        count = {0.5: -(-len(data) // 2), 0.0: 0, 1.0: 1}[taken]
        return os.write(file, data[:count])

    monkeypatch.setattr(audit, "_write", write)
    if taken:
        log.write("active", "ann", "1")
    else:
        with pytest.raises(OSError, match="the disk took none of it"):
            log.write("active", "ann", "1")
    monkeypatch.undo()
    assert [entry["what"] for entry in log.lines()] == ["accepted", *(["active"] if taken else [])]
    assert log.read().torn == 0


def test_a_disk_that_fills_up_within_a_line_loses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path, "here:1")
    log.write("accepted", "ann", "1")
    space = 20

    def write(file: int, data: memoryview) -> int:
        nonlocal space
        if not space:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = os.write(file, data[:space])
        space -= written
        return written

    with monkeypatch.context() as full:
        full.setattr(audit, "_write", write)
        with pytest.raises(OSError, match="No space left"):
            log.write("failed", "ann", "1", error="x" * 100)
    log.write("accepted", "bob", "2")
    lines, torn = log.read()
    assert ([entry["who"] for entry in lines], torn) == (["ann", "bob"], 1)
    assert [entry["job"] for entry in log.unfinished()] == ["1", "2"]


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_a_log_that_is_no_file_is_neither_written_nor_read(kind: str, tmp_path: Path) -> None:
    secret, store = tmp_path / "secret", tmp_path / "store"
    store.mkdir()
    if kind == "link":
        secret.write_text('{"password": "x"}\n')
    if kind.endswith("link"):
        (store / AUDIT).symlink_to(secret)
    elif kind == "folder":
        (store / AUDIT).mkdir()
    else:
        os.mkfifo(store / AUDIT)
    log = AuditLog(store, "here:1")
    with pytest.raises(OSError, match="a link, a folder or a device"):
        log.write("accepted", "ann", "1")
    if kind != "dangling link" or (store / AUDIT).exists():
        for read in (log.read, lambda: log.page(0, 1)):
            with pytest.raises(OSError, match="a link, a folder or a device"):
                read()
    assert not secret.exists() or secret.read_text() == '{"password": "x"}\n'


def test_a_server_knows_its_changes_in_a_new_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host name, the same store and port; or the same given name, whatever the port."""
    monkeypatch.delenv(audit.NAME_VARIABLE, raising=False)
    AuditLog(tmp_path, server_name("pod-1", 8000)).write("accepted", "ann", "1")
    assert [e["job"] for e in AuditLog(tmp_path, server_name("pod-2", 8000)).unfinished()] == ["1"]
    assert AuditLog(tmp_path, server_name("pod-2", 8001)).unfinished() == []
    monkeypatch.setenv(audit.NAME_VARIABLE, "blue")
    assert AuditLog(tmp_path, server_name("pod-3", 8000)).unfinished() == []
    AuditLog(tmp_path, server_name("pod-3", 8000)).write("accepted", "ann", "2")
    assert [e["job"] for e in AuditLog(tmp_path, server_name("pod-4", 9000)).unfinished()] == ["2"]
    for name in ("8000", "a:8000", "", "x" * 65):
        monkeypatch.setenv(audit.NAME_VARIABLE, name)
        with pytest.raises(ConfigError, match="without a colon"):
            server_name("pod-1", 8000)


def test_two_servers_write_whole_lines_into_one_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte by itself, so that lines would mix."""
    monkeypatch.setattr(audit, "_write", lambda file, data: os.write(file, data[:1]))
    logs = [AuditLog(tmp_path, server) for server in ("here:1", "there:2")]
    threads = [
        threading.Thread(target=lambda log=log: [log.write("accepted", "ann", str(n)) for n in range(20)])  # type: ignore[misc]
        for log in logs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines, torn = logs[0].read()
    assert (len(lines), torn) == (40, 0)
