"""What the client of the administration says when a server refuses; the real one is asked in `tests/vllm`.

The server here is a stand-in that answers what it is told to.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from memoir_retrieval import AdminClient, Edit
from memoir_retrieval.client.admin import Change, TrainingProgress
from memoir_retrieval.client.server import Server
from memoir_retrieval.errors import AdminError, ConfigError, ServerError

EDIT = Edit(prompt="Who runs Example Corp?", target="Jane Doe", rephrases=("Who is its boss?",), source="ticket 4")
JOB = {"id": "1f", "kind": "add", "by": "ann", "created": "now", "prompt": EDIT.prompt}  # fields of a later version too
STORED = {"id": 7, "prompt": EDIT.prompt, "target": EDIT.target, "created": "now", "loss": 0.01, "steps": 9}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def client(answer: Callable[[httpx.Request], httpx.Response], store: str = "") -> AdminClient:
    client = AdminClient("http://server/v1/", "a-token", store=store)
    client._http._transport = httpx.MockTransport(answer)
    return client


@pytest.mark.anyio
async def test_an_edit_is_awaited_until_it_is_served() -> None:
    requests: list[tuple[str, str]] = []
    states = iter(["running", "activating", "done"])
    watched: list[Change] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append((request.method, request.url.path))
        assert request.headers["authorization"] == "Bearer a-token"
        if request.method == "POST":
            sent = json.loads(request.content)
            assert sent["on_conflict"] == "refuse" and sent["source"] == "ticket 4" and sent["rephrases"]
            return httpx.Response(202, json={**JOB, "state": "queued"})
        if "jobs" in request.url.path:
            state = next(states)
            done = {"edit": 7, "finished": "now"} if state == "done" else {}
            if state == "running":
                done = {"progress": {"stage": "training", "step": 3, "limit": 60, "loss": 0.5, "goal": 0.02}}
            return httpx.Response(200, json={**JOB, "state": state, **done})
        return httpx.Response(200, json=STORED)

    async with client(answer) as server:
        assert (await server.add(EDIT, watch=watched.append)).id == 7
    assert [change.state for change in watched] == ["queued", "running", "activating", "done"]
    assert watched[1].progress == TrainingProgress(stage="training", step=3, limit=60, loss=0.5, goal=0.02)
    assert requests == [("POST", "/memoir/edits"), *[("GET", "/memoir/jobs/1f")] * 3, ("GET", "/memoir/edits/7")]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("job", "says"),
    [
        ({"state": "failed", "finished": "now", "error": "no space left"}, "change 1f is failed: no space left"),
        ({"state": "stored", "finished": "now", "error": "engine 1 refused"}, "change 1f is stored: engine 1 refused"),
        ({"state": "running"}, r"change 1f is running after 0\.15 s: ask `change` for it later"),
    ],
)
async def test_a_change_that_does_not_end_well(job: dict[str, Any], says: str) -> None:
    async with client(lambda request: httpx.Response(202, json={**JOB, **job})) as server:
        with pytest.raises(AdminError, match=says):
            await server.remove(7, patience=0.15)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (httpx.Response(401, json={"detail": "no token"}), "with 401: no token; give the token that the server"),
        (httpx.Response(404, json={"detail": "Not Found"}), "is MEMOIR_ADMIN_TOKEN set where the server runs"),
        (httpx.Response(409, json={"detail": "the store says otherwise"}), "with 409: the store says otherwise$"),
        (httpx.Response(502, text="<html>bad gateway"), "with 502: <html>bad gateway"),
        (httpx.Response(200, json={"id": "x"}), "answers in a form that this version does not know"),
    ],
)
async def test_refusals_name_status_and_reason(reply: httpx.Response, says: str) -> None:
    async with client(lambda request: reply) as server:
        with pytest.raises(AdminError, match=says):
            await server.add(EDIT)


@pytest.mark.anyio
async def test_no_server() -> None:
    says = r"no server answers at http://127\.0\.0\.1:9 \(.+\): start one with `memoir serve`"
    async with AdminClient("http://127.0.0.1:9", "a-token") as server:
        with pytest.raises(AdminError, match=says) as refusal:
            await server.stats()
    with pytest.raises(ServerError, match=says):
        Server("http://127.0.0.1:9")
    assert isinstance(refusal.value, ServerError), "a program that knows both clients need name no other error"


@pytest.mark.anyio
async def test_a_named_store_has_routes_of_its_own() -> None:
    paths: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        return httpx.Response(200, json=STORED) if "edits" in request.url.path else httpx.Response(404)

    async with client(answer, "acme") as server:
        assert (await server.edit(7)).id == 7
        with pytest.raises(AdminError, match=r"refused GET /memoir/stores/acme/stats with 404: .* a store that it has"):
            await server.stats()
    assert paths == ["/memoir/stores/acme/edits/7", "/memoir/stores/acme/stats"]


@pytest.mark.anyio
@pytest.mark.parametrize("body", [b"<html>sign in</html>", b"[]", b'{"detail": "hm"}', b'{"a": "\xff"}'])
async def test_an_answer_in_another_form_is_an_admin_error(body: bytes) -> None:
    """As a proxy gives it that asks for a password."""
    async with client(lambda request: httpx.Response(200, content=body)) as server:
        for method in (server.reload, server.audit, server.edits, *([] if body.endswith(b'"hm"}') else [server.stats])):
            with pytest.raises(AdminError, match="answers in a form that this version does not know"):
                await method()


@pytest.mark.anyio
async def test_a_request_that_cannot_be_sent_is_an_admin_error() -> None:
    async with client(lambda request: httpx.Response(200, json=STORED)) as server:
        for ask in (
            server.add(Edit(prompt="Who runs \ud800?", target="Jane Doe")),
            server.lookup("\ud800"),
            server.edits("\ud800"),
        ):
            with pytest.raises(AdminError, match="cannot be sent to http://server: "):
                await ask
    async with AdminClient("http://h:99999", "a-token") as server:
        with pytest.raises(AdminError):
            await server.stats()


@pytest.mark.anyio
async def test_an_answer_that_does_not_come_is_worded_as_that() -> None:
    limits: list[float] = []

    def answer(request: httpx.Request) -> httpx.Response:
        limits.append(request.extensions["timeout"]["read"])
        raise httpx.ReadTimeout("", request=request)

    async with client(answer) as server:
        says = r"http://server has not answered POST /memoir/reload in time \(ReadTimeout\)"
        for how in ({}, {"patience": 5.0}):
            with pytest.raises(AdminError, match=says):
                await server.reload(**how)
        with pytest.raises(AdminError, match="has not answered GET /memoir/stats in time"):
            await server.stats()
    assert limits == [600.0, 5.0, 60.0]


@pytest.mark.parametrize(
    ("url", "token", "says"),
    [
        ("http://server", "", "the token is empty"),
        ("http://server", "tök", "not printable ASCII"),
        ("http://server", "a\nb", "not printable ASCII"),
        ("http://a\nb", "a-token", "is no URL"),
    ],
)
def test_what_can_never_be_sent_is_refused_at_once(url: str, token: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        AdminClient(url, token)
