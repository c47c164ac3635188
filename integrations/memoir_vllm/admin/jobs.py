"""Changes of the store, one after another: accepted, made in the trainer's process, written to disk, then activated."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from memoir_retrieval.errors import StoreError
from memoir_vllm.admin.audit import AuditLog
from memoir_vllm.admin.schema import Job, JobProgress
from memoir_vllm.config import TOKEN_VARIABLE

__all__ = ["QUEUE", "Jobs", "QueueFull", "TrainerProcess"]

QUEUE = 32  # changes that may wait
KEPT = 500  # jobs that are done and can still be asked for
IDLE_S = 300.0  # the trainer's process, and the model in it, go after so long without a change


class QueueFull(Exception):
    """As many changes wait as may wait."""


class TrainerProcess:
    """The trainer's process as long as there is something to do. setting: see `trainer.py`."""

    def __init__(self, setting: dict[str, str]):
        self._setting = setting
        self._process: asyncio.subprocess.Process | None = None

    async def ask(self, request: dict[str, Any], progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """One change. progress: told how far it is. Raises StoreError, with one line, where it is not made."""
        if self._process is None or self._process.returncode is not None:
            self._process = await self._start()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            await process.stdin.drain()
            while line := await process.stdout.readline():
                answer = json.loads(line)
                if "progress" not in answer:
                    break
                progress(answer["progress"])
        except OSError:
            line = b""
        if not line:
            code = await process.wait()
            raise StoreError(f"the process that changes the store ended with status {code}: see the server's log")
        if "error" in answer:
            raise StoreError(answer["error"])
        return answer

    async def stop(self) -> None:
        """Let the process end; what it is at is not stored."""
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        environment = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
        if self._setting["device"] == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # a context alone would take memory from the server
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "memoir_vllm.admin.trainer",
            json.dumps(self._setting),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )


class Jobs:
    """The queue. Needs a running event loop: `run` is its worker."""

    def __init__(self, trainer: TrainerProcess, audit: AuditLog, activate: Callable[[], Awaitable[int]]):
        self._trainer, self._audit, self._activate = trainer, audit, activate
        self._all: OrderedDict[str, Job] = OrderedDict()
        self._waiting: deque[tuple[Job, dict[str, Any]]] = deque()
        self._more = asyncio.Event()

    def get(self, job_id: str) -> Job | None:
        return self._all.get(job_id)

    def all(self) -> list[Job]:
        """Newest first."""
        return list(reversed(self._all.values()))

    def open(self) -> list[Job]:
        """Jobs that are not done."""
        return [job for job in self._all.values() if job.state in ("queued", "running", "activating")]

    async def submit(self, who: str, request: dict[str, Any], **about: Any) -> Job:
        """Log a change and queue it. about: fields of the Job. Raises QueueFull; OSError where it cannot be logged."""
        if len(self._waiting) >= QUEUE:
            raise QueueFull
        job = Job(id=secrets.token_hex(8), state="queued", by=who, created=_now(), **about)
        await asyncio.to_thread(self._audit.write, "accepted", who, job.id, change=request)
        self._all[job.id] = job
        self._waiting.append((job, request))
        while len(self._all) > KEPT and next(iter(self._all.values())).state in ("done", "failed", "stored"):
            self._all.popitem(last=False)
        self._more.set()
        return job

    async def run(self) -> None:
        """Make the changes, for ever."""
        while True:
            if not self._waiting:
                self._more.clear()
                try:
                    await asyncio.wait_for(self._more.wait(), IDLE_S)
                except TimeoutError:
                    await self._trainer.stop()
                    await self._more.wait()
                continue
            job, request = self._waiting.popleft()
            await self._make(job, request)

    async def _make(self, job: Job, request: dict[str, Any]) -> None:
        job.state = "running"

        def progress(told: dict[str, Any]) -> None:
            job.progress = JobProgress.model_validate(told)

        try:
            answer = await self._trainer.ask(request, progress)
        except StoreError as error:
            await self._finish(job, "failed", str(error))
            return
        finally:
            job.progress = None
        job.edit, job.generation = answer["edit"], answer["generation"]
        job.loss, job.steps = answer.get("loss"), answer.get("steps")
        job.state = "activating"
        await self._log(job, "stored", edit=job.edit, generation=job.generation)
        try:
            await self._activate()
        except StoreError as error:
            await self._finish(job, "stored", f"stored, but not served yet: {error}")
            return
        await self._finish(job, "done")

    async def _finish(self, job: Job, state: str, error: str | None = None) -> None:
        told = {"error": error} if error else {}
        await self._log(
            job, "active" if state == "done" else "failed", edit=job.edit, generation=job.generation, **told
        )
        job.error, job.finished = error, _now()
        job.state = state  # type: ignore[assignment]

    async def _log(self, job: Job, what: str, **more: Any) -> None:
        try:
            await asyncio.to_thread(self._audit.write, what, job.by, job.id, **more)
        except OSError as error:  # the change is made; who asks for the job learns that the log lacks it
            job.error = f"the audit log cannot be written: {error.strerror}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
