"""Changes of the store, one after another: accepted, made in the trainer's process, written to disk, then activated."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import sys
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
from vllm.logger import init_logger

from memoir_retrieval.errors import MemoirError, StoreError
from memoir_vllm.admin.audit import AuditLog
from memoir_vllm.admin.schema import Job, JobProgress
from memoir_vllm.admin.trainer import LONGEST_LINE, TrainerAnswer
from memoir_vllm.config import TOKEN_VARIABLE

__all__ = ["QUEUE", "Jobs", "QueueFull", "TrainerProcess"]

logger = init_logger("vllm.memoir")

QUEUE = 32  # changes that may wait
KEPT = 500  # jobs that are done and can still be asked for
IDLE_S = 300.0  # the trainer's process, and the model in it, go after so long without a change
STOP_S = 10.0  # a trainer that has no more to do ends within a second or so
SILENCE_S = 1800.0  # a trainer that writes no line for so long is ended: reading a large model takes minutes

_WHO = "the process that changes the store"
_decode = msgspec.json.Decoder(TrainerAnswer).decode


class QueueFull(MemoirError):
    """As many changes wait as may wait."""


class TrainerProcess:
    """The trainer's process as long as there is something to do."""

    def __init__(self, setting: dict[str, str]):
        """setting: see `trainer.py`."""
        self._setting = setting
        self._process: asyncio.subprocess.Process | None = None

    async def ask(self, request: dict[str, Any], progress: Callable[[JobProgress], None]) -> TrainerAnswer:
        """Have one change made.

        request: as the trainer reads it.
        progress: called with how far it is.

        Raises StoreError, with one line, where the change is not made, and where the process does not say so: then it
        is ended, and the next change gets a new one.
        """
        if self._process is None or self._process.returncode is not None:
            self._process = await self._start()
        try:
            answer = await self._converse(self._process, request, progress)
        except TimeoutError:
            await self._end()
            raise StoreError(f"{_WHO} sent nothing for {SILENCE_S:.0f} seconds and was ended") from None
        except (EOFError, OSError):
            raise StoreError(f"{_WHO} ended with status {await self._end()}: see the server's log") from None
        except ValueError as error:  # a line that is too long, no JSON, or no answer
            await self._end()
            reason = " ".join(str(error).split())
            raise StoreError(f"{_WHO} gave an answer that cannot be read ({reason:.200}) and was ended") from None
        if answer.error is not None:
            raise StoreError(answer.error)
        return answer

    @staticmethod
    async def _converse(
        process: asyncio.subprocess.Process, request: dict[str, Any], progress: Callable[[JobProgress], None]
    ) -> TrainerAnswer:
        assert process.stdin is not None and process.stdout is not None
        async with asyncio.timeout(SILENCE_S):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            await process.stdin.drain()
        while True:
            async with asyncio.timeout(SILENCE_S):
                line = await process.stdout.readline()
            if not line:
                raise EOFError
            answer = _decode(line)
            if answer.progress is not None:
                progress(JobProgress.model_validate(msgspec.structs.asdict(answer.progress)))
            elif answer.error is not None or (answer.generation is not None and answer.edit is not None):
                return answer
            else:
                raise ValueError("neither an edit nor an error")

    async def stop(self) -> None:
        """Let the process end; what it is at is not stored. One that does not end is killed."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), STOP_S)
        except TimeoutError:
            await self._end()

    async def _end(self) -> int | None:
        """Kill the process, whatever it does, and return its status."""
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdout is not None
        try:
            await asyncio.wait_for(process.wait(), 0.2)  # one that has closed its output ends by itself
        except TimeoutError:
            process.kill()
        with contextlib.suppress(TimeoutError):  # asyncio sees the end of a process behind that of its output
            async with asyncio.timeout(5):
                while await process.stdout.read(LONGEST_LINE):
                    pass
        return await process.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        environment = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
        if self._setting["device"] == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # a context alone would take memory from the server
        try:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "memoir_vllm.admin.trainer",
                json.dumps(self._setting),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=environment,
                start_new_session=True,
                limit=LONGEST_LINE,
            )
        except OSError as error:
            raise StoreError(f"{_WHO} cannot be started: {error.strerror or error}; send the change again") from error


class Jobs:
    """The queue. Needs a running event loop: `run` is its worker."""

    def __init__(
        self,
        trainer: TrainerProcess,
        audit: AuditLog,
        activate: Callable[[], Awaitable[int]],
        in_store: Callable[[dict[str, Any]], TrainerAnswer | None],
    ):
        """trainer: makes the changes.
        audit: the log.
        activate: has the engines serve what the store holds.
        in_store: whether the store holds a change, whatever the trainer's process said of it, or said no more.
        """
        self._trainer, self._audit, self._activate, self._in_store = trainer, audit, activate, in_store
        self._all: OrderedDict[str, Job] = OrderedDict()
        self._waiting: deque[tuple[Job, dict[str, Any]]] = deque()
        self._accepting = 0  # changes that have a place in the queue while they are written to the audit log
        self._more = asyncio.Event()

    def get(self, job_id: str) -> Job | None:
        """A job, or None.

        job_id: its id.
        """
        return self._all.get(job_id)

    def all(self) -> list[Job]:
        """Newest first."""
        return list(reversed(self._all.values()))

    def open(self) -> list[Job]:
        """Jobs that are not done."""
        return [job for job in self._all.values() if job.state in ("queued", "running", "activating")]

    async def submit(self, who: str, request: dict[str, Any], **about: Any) -> Job:
        """Log a change and queue it.

        It is among the open jobs, and has its place, before anything else runs: what a caller has checked without
        waiting since still holds.

        who: the holder of the token.
        request: as the trainer reads it.
        about: fields of the Job.

        Raises QueueFull; OSError where it cannot be logged.
        """
        if len(self._waiting) + self._accepting >= QUEUE:
            raise QueueFull(f"{QUEUE} changes are waiting already: send this one again later")
        job = Job(id=secrets.token_hex(8), state="queued", by=who, created=_now(), **about)
        self._all[job.id] = job
        self._accepting += 1
        try:
            await asyncio.to_thread(self._audit.write, "accepted", who, job.id, change=request)
        except BaseException:
            del self._all[job.id]
            raise
        finally:
            self._accepting -= 1
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
            try:
                await self._make(job, request)
            except Exception as error:  # one change that goes wrong must not be the last
                logger.exception("memoir: change %s of the store failed", job.id)
                reason = f"{type(error).__name__}: {' '.join(str(error).split()):.300}; the server's log has more"
                await self._finish(job, "failed", reason)

    async def _make(self, job: Job, request: dict[str, Any]) -> None:
        job.state = "running"

        def progress(now: JobProgress) -> None:
            job.progress = now

        reason = None
        try:
            answer = await self._trainer.ask(request, progress)
        except StoreError as error:
            reason = str(error)
            stored = await self._stored(request)
            if stored is None:
                await self._finish(job, "failed", reason)
                return
            answer = stored
        finally:
            job.progress = None
        job.edit, job.generation = answer.edit, answer.generation
        job.loss, job.steps, job.damaged = answer.loss, answer.steps, list(answer.damaged)
        job.state = "activating"
        note: dict[str, Any] = {"error": reason} if reason else {}
        note |= {"damaged": job.damaged} if job.damaged else {}
        unlogged = await self._log(job, "stored", edit=job.edit, generation=job.generation, **note)
        try:
            await self._activate()
        except MemoirError as error:
            await self._finish(job, "stored", f"stored, but not served yet: {error}", unlogged)
            return
        await self._finish(job, "done", unlogged=unlogged)

    async def _stored(self, request: dict[str, Any]) -> TrainerAnswer | None:
        """Whether a change is in the store although its trainer failed: it may have ended after it was written."""
        try:
            return await asyncio.to_thread(self._in_store, request)
        except (MemoirError, OSError):
            return None

    async def _finish(self, job: Job, state: str, error: str | None = None, unlogged: str | None = None) -> None:
        fault = {"error": error} if error else {}
        what = "active" if state == "done" else "failed"
        unlogged = await self._log(job, what, edit=job.edit, generation=job.generation, **fault) or unlogged
        job.error, job.finished = "; ".join(filter(None, (error, unlogged))) or None, _now()
        job.state = state  # type: ignore[assignment]

    async def _log(self, job: Job, what: str, **more: Any) -> str | None:
        """Write to the audit log. Returns why it cannot be: the change is made, and its job says what the log lacks."""
        try:
            await asyncio.to_thread(self._audit.write, what, job.by, job.id, **more)
        except OSError as error:
            logger.warning("memoir: %r of change %s is not in the audit log: %s", what, job.id, error.strerror)
            return f"the audit log cannot be written: {error.strerror}"
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
