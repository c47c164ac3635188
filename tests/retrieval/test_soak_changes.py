"""What a soak that changes a store leaves there; the server and its traffic are stand-ins."""

from __future__ import annotations

import asyncio
import importlib
import json
from typing import Any

import httpx
import pytest

from memoir_retrieval.client import admin, soak
from memoir_retrieval.client.soak import SoakReport
from memoir_retrieval.errors import ConfigError, MemoirError

REPORT = SoakReport("http://server", 1.0, {}, 1, 0, 0, 0, None, 0, (), 0, (), {}, ())


class Administration:
    """A stand-in for a server: a store of the soak's edit alone.

    refusals: removals that it refuses before it removes.
    slow: additions are stored only after so many questions about them.
    """

    def __init__(self, refusals: int = 0, slow: int = 0):
        self.refusals, self.slow = refusals, slow
        self.edits: list[dict[str, Any]] = []
        self._waiting: dict[str, Any] | None = None

    def answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/memoir")
        job = {"id": "1", "kind": "add", "by": "ann", "created": "now", "edit": 7}
        if path == "/edits" and request.method == "POST":
            edit = {**json.loads(request.content), "id": 7, "created": "now", "loss": 0.1, "steps": 1}
            if self.edits:
                return httpx.Response(200, json=self.edits[0])
            if self._waiting:
                return httpx.Response(409, json={"detail": "job 1 is about the same prompt"})
            self._waiting = edit
            return httpx.Response(202, json={**job, "state": "queued"})
        if path == "/edits":
            return httpx.Response(200, json={"generation": 1, "total": len(self.edits), "edits": self.edits})
        if request.method == "DELETE":
            if self.refusals:
                self.refusals -= 1
                return httpx.Response(503, json={"detail": "no disk"})
            self.edits.clear()
            return httpx.Response(202, json={**job, "kind": "remove", "state": "done", "finished": "now"})
        if path == "/jobs/1":
            self.slow -= 1
            if self.slow < 0 and self._waiting:
                self.edits, self._waiting = [self._waiting], None
            done = {"state": "running"} if self._waiting else {"state": "done", "finished": "now"}
            return httpx.Response(200, json={**job, **done})
        return httpx.Response(200, json=self.edits[0])


class Traffic:
    """A stand-in for the soak itself, which only changes the store."""

    def __init__(self, changes: int, error: Exception | None = None):
        self.changes, self.error, self.failures = changes, error, 0

    async def length(self) -> int:
        return 64

    async def run(self, questions: Any, **how: Any) -> SoakReport:
        for _ in range(self.changes):
            try:
                await how["change"]()
            except MemoirError:
                self.failures += 1
        if self.error:
            raise self.error
        return REPORT


def run(
    monkeypatch: pytest.MonkeyPatch, server: Administration, traffic: Traffic, patience: float = 600.0
) -> SoakReport:
    command = importlib.import_module("memoir_retrieval.cli.verify")  # the name is that of the command in the package

    class Client(admin.AdminClient):
        def __init__(self, *arguments: Any, **more: Any):
            super().__init__(*arguments, **more)
            self._http._transport = httpx.MockTransport(server.answer)

        async def add(self, edit: Any, **more: Any) -> Any:
            return await super().add(edit, patience=patience, **more)

    monkeypatch.setattr(admin, "AdminClient", Client)
    monkeypatch.setattr(admin, "FIRST_POLL_S", 0.01)
    monkeypatch.setattr(soak, "soak_prompts", lambda *arguments, **more: [])
    monkeypatch.setenv("MEMOIR_ADMIN_TOKEN", "0123456789abcdef")
    report: SoakReport = asyncio.run(command._soak(traffic, "http://server", None, True, 1, 1, 1, 3))
    return report


def test_a_removal_that_fails_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    server, traffic = Administration(refusals=1), Traffic(2)
    report = run(monkeypatch, server, traffic)
    assert (server.edits, traffic.failures) == ([], 1)
    assert report.holds and report.checks[-1].name == "the soak's edit is removed"


def test_an_addition_that_took_too_long_is_removed_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    server, traffic = Administration(slow=8), Traffic(2)
    report = run(monkeypatch, server, traffic, patience=0.03)
    assert (server.edits, server._waiting, traffic.failures) == ([], None, 2)
    assert report.holds


def test_a_last_removal_that_fails_is_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Administration(refusals=9)
    report = run(monkeypatch, server, Traffic(1))
    assert not report.holds and report.seconds == REPORT.seconds
    assert "may be in the store still, remove it: " in report.checks[-1].detail
    assert "no disk" in report.checks[-1].detail


def test_a_soak_that_ends_in_an_error_ends_in_that_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot be soaked"):
        run(monkeypatch, Administration(refusals=9), Traffic(1, ConfigError("it cannot be soaked")))
