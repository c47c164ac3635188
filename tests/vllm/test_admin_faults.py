"""Faults in the server's own parts, one by one: the old generation serves on, the change is failed or done, the next
one works, and the audit log says all of it.

Real are the routes, the queue, the trainer's process, the audit log, the store and what a worker does to take a
generation up. The stand-in is the engine around that worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import resource
import stat
import sys
import threading
import unicodedata
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
import torch
from engines import make_store
from vllm import exceptions

from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.question import text
from memoir_retrieval.store.read import EditStore
from memoir_retrieval.store.remove import remove_edits
from memoir_vllm import config
from memoir_vllm.admin import audit, engines, jobs
from memoir_vllm.admin.audit import AUDIT, AuditLog
from memoir_vllm.admin.engines import Engines
from memoir_vllm.admin.jobs import QUEUE
from memoir_vllm.admin.routes import make_app
from memoir_vllm.admin.service import Service
from memoir_vllm.admin.tokens import Tokens
from memoir_vllm.worker.reload import Reloader
from memoir_vllm.worker.residual import ResidualLayer
from memoir_vllm.worker.routing import Router

TOKEN = "0123456789abcdef"
FIRST = 3  # the generation that `make_store` writes

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class OneWorker(Engines):
    """A stand-in for the engines behind a server: what one worker of one does to take a generation up."""

    def __init__(self, folder: Path):
        store = EditStore.open(folder)
        self.layer = ResidualLayer(Router(store, None, "cpu", str), torch.from_numpy(store.memories))
        self.reloader = Reloader(config.MemoirConfig(store=str(folder)), store.manifest, self.layer, 1, "cpu", str)

    async def reload(self) -> int:
        return await asyncio.to_thread(self.reloader.reload)

    async def stats(self) -> list[dict[str, Any]]:
        return [{"generation": self.generation}]

    @property
    def generation(self) -> int:
        return self.layer.now.router.generation


class Server:
    """The administration of one server, as its clients see it."""

    def __init__(self, folder: Path, model: str, name: str = "here:1"):
        self.folder = folder
        self.engines = OneWorker(folder)
        self.service = Service(config.parse_section({"store": str(folder)}), model, name, self.engines, None)
        tokens = Tokens({sha256(TOKEN.encode()).digest(): "ann"})
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(make_app(tokens, lambda: self.service, schema=True)),
            base_url="http://here/",
            headers={"Authorization": f"Bearer {TOKEN}"},
        )
        self._queue: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._queue = asyncio.create_task(self.service.jobs.run())

    async def stop(self) -> None:
        if self._queue is not None:
            self._queue.cancel()
        await self.service.jobs._trainer.stop()
        await self.http.aclose()

    async def finish(self, reply: httpx.Response) -> dict[str, Any]:
        assert reply.status_code == 202, reply.text
        job: dict[str, Any] = reply.json()
        while job["finished"] is None:
            assert self._queue is not None and not self._queue.done(), "the queue has died"
            await asyncio.sleep(0.01)
            job = (await self.http.get(f"/jobs/{job['id']}")).json()
        return job

    async def submit(self, request: dict[str, Any]) -> dict[str, Any]:
        """A change that the routes would not let through."""
        job = await self.service.jobs.submit("ann", request, kind="remove")
        while job.finished is None:
            assert self._queue is not None and not self._queue.done(), "the queue has died"
            await asyncio.sleep(0.01)
        return job.model_dump()

    def log(self, job: dict[str, Any]) -> list[str]:
        """What the audit log says of a job, in order."""
        return [entry["what"] for entry in self.service.audit.lines() if entry["job"] == job["id"]]


@pytest.fixture
def folder(base: BaseModel, tmp_path: Path) -> Path:
    return make_store(base, tmp_path / "edits")


@pytest.fixture
async def server(folder: Path, model_folder: Path) -> AsyncIterator[Server]:
    server = Server(folder, str(model_folder))
    yield server
    await server.stop()


@pytest.fixture
def trainer_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Within the context a new trainer's process runs these lines of Python instead of its own."""

    @contextlib.contextmanager
    def run(lines: str) -> Iterator[None]:
        script = tmp_path / "trainer"
        script.write_text(f"#!{sys.executable}\nimport json, os, sys, time\nrequest = sys.stdin.readline()\n{lines}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        with monkeypatch.context() as other:
            other.setattr(jobs.sys, "executable", str(script))
            yield

    return run


async def the_next_change_works(server: Server, job: dict[str, Any]) -> None:
    """What must hold after a change that has failed."""
    assert job["state"] == "failed" and "\n" not in job["error"], job
    assert server.log(job) == ["accepted", "failed"]
    assert server.engines.generation == EditStore.open(server.folder).manifest.generation == FIRST
    following = await server.finish(await server.http.delete("/edits/1"))
    assert (following["state"], following["generation"], following["error"]) == ("done", FIRST + 1, None)
    assert server.log(following) == ["accepted", "stored", "active"]
    assert server.engines.generation == FIRST + 1 and server.engines.layer.now.router.edits == 3


async def test_a_reason_longer_than_a_line_is_cut(server: Server) -> None:
    """The real process: it refuses to remove an edit whose number it has to quote."""
    server.start()
    job = await server.submit({"remove": "9" * 200_000})
    assert "has no edit 999" in job["error"] and 3_000 < len(job["error"]) < 5_000
    await the_next_change_works(server, job)


async def test_a_trainer_that_cannot_be_started_fails_the_change(server: Server) -> None:
    """There are really no more file descriptors."""
    server.start()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.open(os.devnull, os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 4, limits[1]))  # enough for the audit log, not for three pipes
    try:
        job = await server.submit({"remove": 0})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(spare)
    assert "cannot be started: Too many open files" in job["error"]
    await the_next_change_works(server, job)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("print('x' * 200_000, flush=True); time.sleep(600)", "cannot be read (Separator"),
        ("os.write(1, b'x' * (1 << 22)); time.sleep(600)", "cannot be read (Separator"),
        ("print('Loading weights: 10%', flush=True); time.sleep(600)", "cannot be read (JSON is malformed"),
        ("print('{}', flush=True); time.sleep(600)", "neither an edit nor an error"),
        ("print(json.dumps({'progress': {'stage': 'lunch'}}), flush=True); time.sleep(600)", "cannot be read"),
        ("os._exit(9)", "ended with status 9"),
        ("os.kill(os.getpid(), 9)", "ended with status -9"),
        ("os.close(1); time.sleep(600)", "ended with status -9"),
    ],
    ids=["a long line", "a flood", "no JSON", "no answer", "no such stage", "ended", "killed", "mute"],
)
async def test_a_trainer_that_goes_wrong_fails_the_change(
    lines: str, reason: str, server: Server, trainer_is: Callable[[str], Any]
) -> None:
    server.start()
    with trainer_is(lines):
        job = await server.finish(await server.http.delete("/edits/0"))
    assert reason in job["error"]
    await the_next_change_works(server, job)


async def test_a_trainer_that_says_nothing_is_ended(
    server: Server, trainer_is: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "SILENCE_S", 0.5)
    server.start()
    with trainer_is("time.sleep(600)"):
        job = await server.finish(await server.http.delete("/edits/0"))
    assert "sent nothing for" in job["error"]
    monkeypatch.setattr(jobs, "SILENCE_S", 60)
    await the_next_change_works(server, job)


async def test_a_trainer_that_is_slow_is_awaited_while_it_says_so(
    server: Server, trainer_is: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer in all than it may say nothing. Whoever reads is answered meanwhile, and a second change waits."""
    monkeypatch.setattr(jobs, "SILENCE_S", 5)
    server.start()
    step = {"progress": {"stage": "training", "step": 1, "limit": 60, "loss": 2.0, "goal": 0.1}}
    with trainer_is(
        f"for _ in range(12): print(json.dumps({step!r}), flush=True); time.sleep(0.5)\n"
        "for _ in range(2): print(json.dumps({'error': 'not learnt'}), flush=True); sys.stdin.readline()"
    ):
        slow, waiting = [await server.http.delete(f"/edits/{number}") for number in (0, 1)]
        job = slow.json()
        while job["progress"] is None:
            await asyncio.sleep(0.01)
            job = (await server.http.get(f"/jobs/{job['id']}")).json()
        assert (job["state"], job["progress"]) == ("running", step["progress"])
        assert (await server.http.get(f"/jobs/{waiting.json()['id']}")).json()["state"] == "queued"
        assert (await server.http.get("/edits/0")).status_code == 200
        job = await server.finish(slow)
        assert (job["state"], job["error"]) == ("failed", "not learnt")
        assert (await server.finish(waiting))["error"] == "not learnt"
        await server.service.jobs._trainer.stop()
    monkeypatch.setattr(jobs, "SILENCE_S", 60)
    await the_next_change_works(server, job)


async def test_a_change_that_was_written_is_activated_although_its_trainer_died(
    server: Server, trainer_is: Callable[[str], Any]
) -> None:
    """It ends behind the disk and before its answer: neither lost, nor half."""
    server.start()
    with trainer_is(
        "from memoir_retrieval.store.remove import remove_edits\n"
        f"from pathlib import Path\nremove_edits(Path({str(server.folder)!r}), [0])\nos.kill(os.getpid(), 9)"
    ):
        job = await server.finish(await server.http.delete("/edits/0"))
    assert (job["state"], job["edit"], job["generation"]) == ("done", 0, FIRST + 1)
    assert server.engines.generation == FIRST + 1
    entries = [entry for entry in server.service.audit.lines() if entry["job"] == job["id"]]
    assert [entry["what"] for entry in entries] == ["accepted", "stored", "active"]
    assert "ended with status -9" in entries[1]["error"]


async def test_of_many_changes_of_one_prompt_at_once_one_is_taken(server: Server) -> None:
    """Nobody works on them: they wait."""
    targets = [{"prompt": "Who runs Example Corp?", "target": f"Person {n}"} for n in range(20)]
    replies = await asyncio.gather(*(server.http.post("/edits", json=edit) for edit in targets))
    assert sorted(reply.status_code for reply in replies) == [202] + 19 * [409]
    assert all("same prompt" in reply.json()["detail"] for reply in replies if reply.status_code == 409)
    removals = await asyncio.gather(*(server.http.delete("/edits/2") for _ in range(20)))
    assert sorted(reply.status_code for reply in removals) == [202] + 19 * [409]
    assert len(server.service.audit.lines()) == len(server.service.jobs.open()) == 2


async def test_a_key_that_is_there_twice_is_refused(server: Server) -> None:
    """Of two targets the parser would take the last, and nobody would hear of the first."""
    json = {"Content-Type": "application/json"}
    for body, key in (
        (b'{"prompt": "Who?", "target": "Ann", "target": "Bob"}', "target"),
        (b'{"prompt": "Who?", "target": "Ann", "\\u0070rompt": "Why?"}', "prompt"),
    ):
        reply = await server.http.post("/edits", content=body, headers=json)
        assert (reply.status_code, reply.json()["detail"]) == (400, f"key {key!r} is given twice; keep one")
    body = b'{"messages": [{"role": "user", "role": "system", "content": "Who?"}]}'
    assert (await server.http.post("/lookup", content=body, headers=json)).status_code == 400
    assert server.service.jobs.all() == [] == server.service.audit.lines()


async def test_half_a_surrogate_pair_is_refused_wherever_it_stands(server: Server) -> None:
    """vLLM's handlers, the chat template and the tokenizer would each end in an error of their own."""
    json = {"Content-Type": "application/json"}
    user = '{"role": "user", "content": "Who?"}'
    for path, body in (
        ("edits", r'{"prompt": "\ud800", "target": "b"}'),
        ("edits", r'{"prompt": "a", "target": "b", "requires": [["\ud800"]]}'),
        ("lookup", r'{"prompt": "Who \ud800?"}'),
        ("lookup", r'{"messages": [{"role": "user", "content": "\ud800"}]}'),
        ("lookup", r'{"messages": [{"\ud800": "user"}]}'),
        ("lookup", f'{{"messages": [{user}], "chat_template_kwargs": {{"a": "\\udfff"}}}}'),
        ("lookup", f'{{"messages": [{user}], "tools": [{{"\\ud800": 1}}]}}'),
        ("lookup", b'{"prompt": "\xed\xa0\x80"}'),  # the same as bytes
    ):
        reply = await server.http.post(f"/{path}", content=body, headers=json)
        assert (reply.status_code, "has half a surrogate pair" in str(reply.json()["detail"])) == (400, True), body
    whole = r'{"prompt": "Who is \ud83d\ude00?", "target": "b"}'
    assert (await server.http.post("/edits", content=whole, headers=json)).status_code == 202


@pytest.mark.parametrize("name", ["GenerationError", "RetryableRequestError", "QueueOverflowError"])
async def test_a_lookup_that_vllm_has_no_place_for_is_no_fault_of_the_request(
    name: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it is paused, or has too many requests."""
    kind = getattr(exceptions, name, None)
    if kind is None:
        pytest.skip("this vLLM has no such error")

    class Busy:
        async def create_completion(self, request: Any) -> None:
            raise kind()

    monkeypatch.setattr(server.service, "_state", SimpleNamespace(openai_serving_completion=Busy()))
    reply = await server.http.post("/lookup", json={"prompt": "Who runs Example Corp?"})
    assert (reply.status_code, reply.json()["detail"]) == (503, str(kind()))


async def test_edits_that_training_has_damaged_are_named(server: Server, trainer_is: Callable[[str], Any]) -> None:
    server.start()
    with trainer_is("print(json.dumps({'generation': 3, 'edit': 0, 'damaged': [2, 3]}), flush=True); sys.stdin.read()"):
        job = await server.finish(await server.http.delete("/edits/0"))
    assert (job["state"], job["damaged"]) == ("done", [2, 3])
    damaged = {entry["what"]: entry.get("damaged") for entry in server.service.audit.lines()}
    assert damaged == {"accepted": None, "stored": [2, 3], "active": None}


async def test_an_edit_is_given_with_the_chat_before_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"})
    edit = msgspec.structs.replace(EditStore.open(server.folder).edits[0], before=before)
    monkeypatch.setattr(server.service, "edit", lambda number: edit)
    assert (await server.http.get("/edits/0")).json()["before"] == list(before)
    assert (await server.http.get("/edits")).json()["edits"][0]["before"] == []


@pytest.mark.parametrize(
    ("name", "adapter", "asked_as"),
    [("", None, ("m", "")), ("acme", None, ("m", "acme")), ("french", "f" * 64, ("french", ""))],
)
async def test_the_counters_say_how_the_store_is_asked(
    name: str, adapter: str | None, asked_as: tuple[str, str], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_counters() -> list[Any]:
        return []

    store = EditStore.open(server.folder)
    if adapter:
        base = msgspec.structs.replace(store.manifest.base, adapter=adapter)
        store = replace(store, manifest=msgspec.structs.replace(store.manifest, base=base))
    models = SimpleNamespace(base_model_paths=[SimpleNamespace(name="m")])
    monkeypatch.setattr(server.service, "_state", SimpleNamespace(openai_serving_models=models))
    monkeypatch.setattr(server.service, "_name", name)
    monkeypatch.setattr(server.service, "store", lambda: store)
    monkeypatch.setattr(server.engines, "stats", no_counters)
    stats = (await server.http.get("/stats")).json()
    assert (stats["model"], stats["store"]) == asked_as


async def test_of_many_changes_at_once_no_more_wait_than_may(server: Server) -> None:
    edits = [{"prompt": f"Who runs company {n}?", "target": "Jane Doe"} for n in range(3 * QUEUE)]
    replies = await asyncio.gather(*(server.http.post("/edits", json=edit) for edit in edits))
    assert sorted(reply.status_code for reply in replies) == QUEUE * [202] + 2 * QUEUE * [429]
    full = {(reply.headers["retry-after"], reply.json()["detail"]) for reply in replies if reply.status_code == 429}
    assert full == {("10", f"{QUEUE} changes are waiting already: send this one again later")}
    assert len(server.service.audit.lines()) == len(server.service.jobs.open()) == QUEUE


@pytest.mark.parametrize("held", [0, 1, 2], ids=["the prompt", "a rephrase", "what it requires"])
async def test_a_text_of_marks_is_read_beside_the_loop(
    held: int, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unicode's normal form is held back until the loop has answered others: were it made on the loop, nobody would be.

    As long as a body may be. What reaches the normal form has few marks in a row, so its time grows with the length.
    """
    marks = "\u0301\u0323" * 8_000
    edit: dict[str, Any] = {"prompt": "Who runs Example Corp?", "target": "Jane Doe"}
    edit |= [{"prompt": f"a{marks}"}, {"rephrases": [f"a{marks}"]}, {"requires": [["Example", marks[:1_000]]]}][held]
    go_on, threads, runs = threading.Event(), set(), []

    def slow(form: Any, part: str) -> str:
        assert go_on.wait(60), "the loop stood still"
        threads.add(threading.current_thread())
        runs.extend(re.findall("[\u0301\u0323]+", part))
        return unicodedata.normalize(form, part)

    monkeypatch.setattr(text, "unicodedata", SimpleNamespace(normalize=slow))
    change = asyncio.create_task(server.http.post("/edits", json=edit))
    for _ in range(5):
        assert (await server.http.get("/jobs")).status_code == 200
    go_on.set()
    assert (await change).status_code == 202
    found = (await server.http.get("/edits", params={"search": marks[:256]})).json()
    assert found["total"] == 0
    assert threading.current_thread() not in threads
    assert runs and max(map(len, runs)) <= text.MARKS


@pytest.mark.parametrize(("fault", "reason"), [("full", "no space left"), ("read_only", "Read-only file system")])
async def test_a_disk_that_takes_nothing_fails_the_change(
    fault: str, reason: str, server: Server, trainer_is: Callable[[str], Any]
) -> None:
    """The trainer's own code in its own process; each of its changes to the disk fails."""
    server.start()
    with trainer_is(
        f"sys.path.insert(0, {str(Path(__file__).parents[1] / 'retrieval')!r})\n"
        "import faults, msgspec, pathlib\n"
        "from memoir_vllm.admin.trainer import _Trainer\n"
        f"trainer = _Trainer(pathlib.Path({str(server.folder)!r}), '', 'cpu', print)\n"
        f"with faults.fault(1, faults.{fault}, for_ever=True):\n"
        "    answer = trainer.answer(json.loads(request))\n"
        "os.write(1, msgspec.json.encode(answer) + b'\\n'); sys.stdin.read()"
    ):
        job = await server.finish(await server.http.delete("/edits/0"))
    assert reason in job["error"]
    await server.service.jobs._trainer.stop()
    await the_next_change_works(server, job)


async def test_a_file_that_may_not_grow_fails_the_change(server: Server) -> None:
    """The real process under a real limit, which the short lines of the audit log keep."""
    server.start()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        job = await server.finish(await server.http.delete("/edits/0"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "more than a file may have here" in job["error"]
    await server.service.jobs._trainer.stop()  # it has the limit too
    await the_next_change_works(server, job)


async def test_a_change_that_cannot_be_logged_is_not_accepted(server: Server) -> None:
    server.start()
    log = server.folder / AUDIT
    log.mkdir()
    reply = await server.http.delete("/edits/0")
    assert reply.status_code == 503 and "not a file: remove it" in reply.json()["detail"]
    assert (await server.http.get("/audit")).status_code == 503
    assert server.service.jobs.all() == []
    log.rmdir()
    job = await server.finish(await server.http.delete("/edits/0"))
    assert (job["state"], server.log(job)) == ("done", ["accepted", "stored", "active"])


async def test_a_log_that_fills_up_within_a_change_is_named_in_its_job(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.start()
    reply = await server.http.delete("/edits/0")

    def full(file: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(audit, "_write", full)
        job = await server.finish(reply)
    assert job["state"] == "done" and "the audit log cannot be written: No space left" in job["error"]
    assert server.engines.generation == FIRST + 1 and server.log(job) == ["accepted"]
    server.service.close_unfinished()  # as the server does when it starts again
    assert server.log(job) == ["accepted", "interrupted"] and server.service.audit.lines()[-1]["stored"]


async def test_a_worker_that_cannot_take_the_change_up_leaves_it_stored(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.start()

    def no_memory(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as broken:
        broken.setattr(server.engines.layer, "load", no_memory)
        job = await server.finish(await server.http.delete("/edits/0"))
    assert (job["state"], job["error"]) == (
        "stored",
        "stored, but not served yet: OutOfMemoryError: no memory left",
    )
    assert server.log(job) == ["accepted", "stored", "failed"] and server.engines.generation == FIRST
    assert (await server.http.post("/reload")).json() == {"generation": FIRST + 1}
    assert server.service.audit.lines()[-1]["what"] == "reloaded" and server.engines.generation == FIRST + 1
    assert (await server.finish(await server.http.delete("/edits/1")))["state"] == "done"


async def test_an_edit_that_is_stored_but_not_served_is_no_success(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sends it again, as a client that tries again does, has it served or hears why not."""
    # The edits of this store have no target, which no client can send.
    monkeypatch.setattr("memoir_vllm.admin.service.same_edit", lambda stored, edit: stored.prompt == edit.prompt)
    edit = {"prompt": EditStore.open(server.folder).edits[3].prompt, "target": "Jane Doe"}
    remove_edits(server.folder, [0])  # a generation that no engine has adopted yet

    def no_memory(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as full:
        full.setattr(server.engines.layer, "load", no_memory)
        reply = await server.http.post("/edits", json=edit)
    assert reply.status_code == 503 and "no memory left" in reply.json()["detail"]
    assert server.engines.generation == FIRST
    for _ in range(2):
        assert (await server.http.post("/edits", json=edit)).status_code == 200
        assert server.engines.generation == FIRST + 1
    assert [entry["what"] for entry in server.service.audit.lines()] == ["reloaded"]


async def test_a_reload_lets_go_of_the_generation_before(server: Server) -> None:
    """Its large files are mapped, and would stay on the disk until the next time that somebody reads the store."""
    server.start()
    assert (await server.http.get("/edits")).json()["total"] == 4
    held = weakref.ref(server.service.store())
    remove_edits(server.folder, [0])
    assert (await server.http.post("/reload")).json() == {"generation": FIRST + 1}
    assert held() is None
    held = weakref.ref(server.service.store())
    assert (await server.submit({"remove": 1}))["state"] == "done"
    assert held() is None


async def test_engines_that_have_died_leave_the_change_stored(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead:
        """A client of an engine core that is gone."""

        async def collective_rpc(self, method: str) -> Any:
            raise RuntimeError("EngineCore encountered an issue")

    server.start()
    monkeypatch.setattr(server.service.jobs, "_activate", Engines(Dead()).reload)  # type: ignore[arg-type]
    job = await server.finish(await server.http.delete("/edits/0"))
    assert job["state"] == "stored" and "the engines do not say what they serve" in job["error"]
    assert server.log(job) == ["accepted", "stored", "failed"]


class TwoEngines:
    """A stand-in for vLLM's client of two engines, each with one worker."""

    def __init__(self, *workers: OneWorker):
        self.engine_core, self.workers = self, workers

    async def call_utility_all_async(self, utility: str, method: str, *arguments: Any) -> list[list[Any]]:
        assert utility == "collective_rpc"
        return [[await asyncio.to_thread(self._answer, worker, method)] for worker in self.workers]

    @staticmethod
    def _answer(worker: OneWorker, method: str) -> Any:
        reloader = worker.reloader
        calls = {"stage": reloader.stage, "staged": reloader.staged, "reload": reloader.reload}
        return {**calls, "stats": worker.layer.stats}[method.removeprefix("memoir_")]()


async def test_an_engine_that_was_started_again_serves_a_newer_generation_until_the_other_has_it(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store went on while one of two engines was down."""
    server.start()
    older = server.engines
    remove_edits(folder, [0])
    newer = OneWorker(folder)
    both = Engines(TwoEngines(older, newer))  # type: ignore[arg-type]
    monkeypatch.setattr(server.service, "engines", both)
    monkeypatch.setattr(server.service.jobs, "_activate", both.reload)
    assert [engine["generation"] for engine in await both.stats()] == [FIRST, FIRST + 1]

    def no_memory(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as broken:
        broken.setattr(older.layer, "load", no_memory)
        reply = await server.http.post("/reload")
        assert (reply.status_code, "engines serve [3, 4]" in reply.json()["detail"]) == (503, True)
    assert (await server.http.post("/reload")).json() == {"generation": FIRST + 1}
    job = await server.finish(await server.http.delete("/edits/1"))
    assert (job["state"], older.generation, newer.generation) == ("done", FIRST + 2, FIRST + 2)
    assert server.log(job) == ["accepted", "stored", "active"]


@pytest.mark.parametrize("stored", [False, True], ids=["before the disk", "behind the disk"])
async def test_a_server_that_starts_again_says_what_became_of_its_changes(
    stored: bool, folder: Path, model_folder: Path
) -> None:
    """Also in another container, and with its engines at the newer generation."""
    AuditLog(folder, "pod-1:1").write("accepted", "ann", "0", change={"remove": 0})
    if stored:
        remove_edits(folder, [0])
    server = Server(folder, str(model_folder), "pod-2:1")
    try:
        server.service.close_unfinished()
        entry = server.service.audit.lines()[-1]
        assert (entry["what"], entry["stored"], entry["generation"]) == ("interrupted", stored, FIRST + stored)
        assert server.engines.generation == FIRST + stored
        server.start()
        job = await server.finish(await server.http.delete("/edits/1"))
        assert (job["state"], server.engines.generation) == ("done", FIRST + stored + 1)
    finally:
        await server.stop()


@pytest.mark.parametrize(
    "change",
    [
        None,
        "add",
        ["add"],
        {"add": {"prompt": "a", "target": "b", "since": "0.9"}},
        {"add": {"prompt": "a"}},
        {"add": {"prompt": "a", "target": "b", "rephrases": "c"}},
        {"add": [1]},
    ],
    ids=["null", "a text", "a list", "an unknown field", "no target", "one rephrasing", "no object"],
)
async def test_an_odd_line_of_the_log_does_not_keep_the_server_from_starting(
    change: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later version, or a hand, may have written it."""
    warnings: list[str] = []
    monkeypatch.setattr("memoir_vllm.admin.service.logger.warning", lambda text, *more: warnings.append(text % more))
    server.service.audit.write("accepted", "ann", "1", change=change)
    server.service.audit.write("accepted", "ann", ["2"], change={"remove": 0})  # type: ignore[arg-type]
    server.service.close_unfinished()
    assert len(warnings) == 1 and "cannot be read and stays open: job '1'" in warnings[0]
    last = server.service.audit.lines()[-1]
    assert (last["what"], last["job"], last["stored"]) == ("interrupted", ["2"], False)
    assert [entry["job"] for entry in server.service.audit.unfinished()] == ["1"]


async def test_a_clock_that_is_set_back_changes_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    class Earlier(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) - timedelta(days=400)

    server.start()
    first = await server.finish(await server.http.delete("/edits/0"))
    monkeypatch.setattr(audit, "datetime", Earlier)
    monkeypatch.setattr(jobs, "datetime", Earlier)
    second = await server.finish(await server.http.delete("/edits/1"))
    assert (first["state"], second["state"], second["generation"]) == ("done", "done", FIRST + 2)
    assert second["finished"] < first["created"]
    entries = (await server.http.get("/audit")).json()["entries"]
    assert [entry["job"] for entry in entries] == 3 * [second["id"]] + 3 * [first["id"]], "in the order of writing"
    server.service.close_unfinished()
    assert len(server.service.audit.lines()) == 6


async def test_two_servers_change_one_store(server: Server, folder: Path, model_folder: Path) -> None:
    """At the same moment, each with its own trainer. The lock lets one write; whoever is refused says so."""
    other = Server(folder, str(model_folder), "there:2")
    try:
        for service in (server, other):
            service.start()
        replies = await asyncio.gather(server.http.delete("/edits/0"), other.http.delete("/edits/1"))
        jobs = await asyncio.gather(*(s.finish(r) for s, r in zip((server, other), replies, strict=True)))
        for number, (service, job) in enumerate(zip((server, other), jobs, strict=True)):
            if job["state"] != "done":
                assert job["state"] == "failed" and "being written by another process" in job["error"], job
                again = await service.finish(await service.http.delete(f"/edits/{number}"))
                assert again["state"] == "done", again
        assert {edit.id for edit in EditStore.open(folder).edits} == {2, 3}
        for service in (server, other):
            assert (await service.http.post("/reload")).json() == {"generation": FIRST + 2}
        lines, torn = server.service.audit.read()
        assert torn == 0 and {entry["server"] for entry in lines} == {"here:1", "there:2"}
    finally:
        await other.stop()


async def test_a_store_that_cannot_be_read_to_its_end_fails_the_reload(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system that hangs. The workers are asked whether they are done, and never are."""

    class Hanging:
        async def collective_rpc(self, method: str, args: tuple[str, ...]) -> list[Any]:
            assert method != "memoir_reload" and args == ("",)
            return [None if method == "memoir_stage" else False]

    monkeypatch.setattr(engines, "READ_S", 0.2)
    monkeypatch.setattr(server.service, "engines", Engines(Hanging()))  # type: ignore[arg-type]
    reply = await server.http.post("/reload")
    assert (reply.status_code, "have not read the store" in reply.json()["detail"]) == (503, True)
