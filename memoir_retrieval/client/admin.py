"""A client of the administration of a running server: the routes below /memoir (docs/reference/administration.md)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from memoir_retrieval.client.server import LAST_REQUEST, base_url, past_proxies
from memoir_retrieval.edits.record import Edit, StoredEdit
from memoir_retrieval.errors import AdminError, ConfigError
from memoir_retrieval.lookup.decision import JudgedPart, Result
from memoir_retrieval.question.prompts import Prompt

__all__ = ["AdminClient", "Change", "EditPage", "Lookup", "Near", "TrainingProgress"]

T = TypeVar("T")
FIRST_POLL_S, LONGEST_POLL_S = 0.1, 2.0


class _PassingError(AdminError):
    """No answer, which says nothing of what the server does."""


class TrainingProgress(msgspec.Struct, frozen=True):
    """How far a running change is.

    stage: loading (the model), opening (the store) or training.
    step: training steps done.
    limit: the most steps.
    loss: nats per target token.
    goal: the loss below which training ends.
    """

    stage: str
    step: int | None = None
    limit: int | None = None
    loss: float | None = None
    goal: float | None = None


class Change(msgspec.Struct, frozen=True):
    """A change of the server's store.

    id: of the change.
    kind: what it does.
    state: done, stored (on disk, not served), failed, or, not yet finished, queued, running or activating.
    by: whose token it was.
    created: ISO 8601, UTC.
    finished: the same, or None while it is going on.
    edit: id of the edit that is added or removed, once it is known.
    generation: of the store that holds the change, once it is written.
    loss: of training, nats per target token.
    steps: of training.
    damaged: ids of earlier edits that training has overwritten and that could not be trained again: the model does not
        answer them with their targets any more.
    error: why it is failed or only stored.
    progress: how far a running change is.
    """

    id: str
    kind: Literal["add", "remove"]
    state: Literal["queued", "running", "activating", "done", "stored", "failed"]
    by: str
    created: str
    finished: str | None = None
    edit: int | None = None
    generation: int | None = None
    loss: float | None = None
    steps: int | None = None
    damaged: tuple[int, ...] = ()
    error: str | None = None
    progress: TrainingProgress | None = None


class EditPage(msgspec.Struct, frozen=True):
    """Edits of one generation.

    generation: of the store.
    total: how many edits there are in all pages.
    edits: those of this page, oldest first.
    """

    generation: int
    total: int
    edits: tuple[StoredEdit, ...]


class Near(msgspec.Struct, frozen=True):
    """An edit near a prompt.

    edit: its id.
    overlap: with the prompt's mask, in [0, 1].
    matched: it would answer.
    prompt: of the edit.
    target: of the edit.
    """

    edit: int
    overlap: float
    matched: bool
    prompt: str | None = None
    target: str | None = None


class Lookup(msgspec.Struct, frozen=True):
    """What a prompt would match, as the server's engine measured it.

    result: as in a `Decision`.
    generation: of the store that answered.
    tau: the least overlap that matches there.
    matches: the nearest edits, best first.
    parts: what was looked up of the message, itself first, and what was said of each part.
    """

    result: Result
    generation: int
    tau: float
    matches: tuple[Near, ...]
    parts: tuple[JudgedPart, ...] = ()


class ServedGeneration(msgspec.Struct, frozen=True):
    """The answer of /reload.

    generation: that every worker serves.
    """

    generation: int


class AuditEntries(msgspec.Struct, frozen=True):
    """The answer of /audit.

    entries: newest first.
    """

    entries: list[dict[str, Any]]


class AdminClient:
    """Changes and asks one store of a running server. An asynchronous context manager.

    >>> import asyncio
    >>> from memoir_retrieval import AdminClient, Edit
    >>> async def correct() -> int:
    ...     async with AdminClient(url, token) as server:
    ...         edit = await server.add(Edit(prompt="Who runs Example Corp?", target="Jane Doe"))
    ...         return edit.id
    >>> asyncio.run(correct())
    0

    Every method raises AdminError, which names the status and the server's reason, where the server cannot be reached,
    does not answer in time, knows no such token, or refuses.
    """

    def __init__(self, url: str, token: str, *, store: str = "", timeout: float = 60.0):
        """Nothing is sent yet.

        url: with or without /v1.
        token: what the server was started with.
        store: name of the store, on a server of several; "" for the default one.
        timeout: of one request, seconds.

        Raises ConfigError for a URL or a token that cannot be sent.
        """
        self._base = base_url(url)
        self._root = f"/memoir/stores/{quote(store, safe='')}" if store else "/memoir"
        if not token or not token.isascii() or not token.isprintable():
            raise ConfigError(
                "the token is empty or not printable ASCII: give the one that the server was started with"
            )
        headers = {"Authorization": f"Bearer {token}", **LAST_REQUEST}
        try:
            self._http = httpx.AsyncClient(
                base_url=f"{self._base}{self._root}", headers=headers, timeout=timeout, mounts=past_proxies(self._base)
            )
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ConfigError(f"{url!r} is no URL ({error}): give one such as http://127.0.0.1:8000") from None

    async def __aenter__(self) -> AdminClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def edits(self, search: str = "", *, offset: int = 0, limit: int = 50) -> EditPage:
        """Edits of the store.

        search: words that must all stand in an edit.
        offset: how many of them to leave out.
        limit: the most of a page, up to 200.
        """
        return await self._get("/edits", EditPage, search=search, offset=offset, limit=limit)

    async def edit(self, edit_id: int) -> StoredEdit:
        """One edit.

        edit_id: its id; AdminError names one that is not stored.
        """
        return await self._get(f"/edits/{edit_id}", StoredEdit)

    async def add(
        self,
        edit: Edit,
        *,
        replace: bool = False,
        patience: float = 600.0,
        watch: Callable[[Change], None] = lambda _: None,
    ) -> StoredEdit:
        """Train an edit and wait until every worker serves it. Returns it as stored; at once if it is there already.

        edit: a plain prompt with its target.
        replace: an edit of the same prompt with another target or `requires` gives way; else that is refused (409).
        patience: how long to wait, seconds; AdminError then, and the server goes on.
        watch: called with the change, when it is accepted and each time the server says how far it is; the last one
            names the edits that it has damaged.

        Raises ConfigError for an edit with messages before its prompt.
        """
        if edit.before:
            raise ConfigError(
                "a running server adds edits of plain prompts only: train a chat with `memoir edit`, or leave out "
                "`before`"
            )
        body: dict[str, Any] = {"prompt": edit.prompt, "target": edit.target, "rephrases": list(edit.rephrases)}
        body |= {"subject": edit.subject, "source": edit.source, "requires": list(edit.requires)}
        body |= {"on_conflict": "last" if replace else "refuse"}
        reply = await self._ask("POST", "/edits", json=body)
        if reply.status_code == 200:
            return self._read(reply, StoredEdit)
        watch(accepted := self._read(reply, Change))
        change = await self.wait(accepted, patience=patience, watch=watch)
        assert change.edit is not None  # a change that is done names its edit
        return await self.edit(change.edit)

    async def remove(self, edit_id: int, *, patience: float = 600.0) -> Change:
        """Remove an edit and wait until no worker serves it.

        edit_id: its id.
        patience: how long to wait, seconds.
        """
        reply = await self._ask("DELETE", f"/edits/{edit_id}")
        return await self.wait(self._read(reply, Change), patience=patience)

    async def change(self, change_id: str) -> Change:
        """How far a change is.

        change_id: its id.
        """
        return await self._get(f"/jobs/{change_id}", Change)

    async def wait(
        self, change: Change, *, patience: float = 600.0, watch: Callable[[Change], None] = lambda _: None
    ) -> Change:
        """Ask until a change is done.

        change: as `add` and `remove` start it.
        patience: how long to wait, seconds.
        watch: called with each answer.

        Raises AdminError where the change fails, is stored but not served, or takes longer.
        """
        until = time.monotonic() + patience
        pause = FIRST_POLL_S
        while change.finished is None:
            if time.monotonic() > until:
                raise AdminError(
                    f"change {change.id} is {change.state} after {patience:g} s: ask `change` for it later"
                )
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_S)
            try:
                change = await self.change(change.id)
            except _PassingError as error:  # the server may go on with the change all the same
                if time.monotonic() > until:
                    raise AdminError(f"change {change.id} was {change.state} when it was last seen: {error}") from error
                continue
            watch(change)
        if change.state != "done":
            raise AdminError(f"change {change.id} is {change.state}: {change.error}")
        return change

    async def lookup(self, prompt: Prompt, *, n: int = 5) -> Lookup:
        """The nearest edits of a prompt.

        prompt: a string is raw text, messages go through the chat template.
        n: how many edits, up to 20.
        """
        body = {"prompt": prompt} if isinstance(prompt, str) else {"messages": list(prompt)}
        return self._read(await self._ask("POST", "/lookup", json={**body, "n": n}), Lookup)

    async def reload(self, *, patience: float = 600.0) -> int:
        """Serve the store's present generation, after something else has written it. Returns its number.

        patience: how long to wait, seconds: the workers read the store meanwhile.
        """
        return self._read(await self._ask("POST", "/reload", timeout=patience), ServedGeneration).generation

    async def stats(self) -> dict[str, Any]:
        """Counters of the server, by name."""
        return await self._get("/stats", dict[str, Any])

    async def audit(self, *, offset: int = 0, limit: int = 50) -> list[dict[str, Any]]:
        """Entries of the audit log, newest first.

        offset: how many to leave out.
        limit: the most of a page, up to 200.
        """
        return (await self._get("/audit", AuditEntries, offset=offset, limit=limit)).entries

    async def _get(self, path: str, kind: type[T], **params: Any) -> T:
        return self._read(await self._ask("GET", path, params=params), kind)

    async def _ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            reply = await self._http.request(method, path, **more)
        except httpx.TimeoutException as error:
            raise _PassingError(
                f"{self._base} has not answered {method} {self._root}{path} in time ({type(error).__name__}); it may "
                "still do what it was sent"
            ) from error
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise _PassingError(
                f"no server answers at {self._base} ({reason}): start one with `memoir serve`"
            ) from error
        except (httpx.InvalidURL, UnicodeError) as error:
            raise AdminError(f"{method} {self._root}{path} cannot be sent to {self._base}: {error}") from error
        if reply.is_success:
            return reply
        try:
            why = reply.json()["detail"]
        except (ValueError, LookupError, TypeError):
            why = reply.text[:200]
        hint = {
            401: "; give the token that the server was started with",
            404: ""
            if path.count("/") > 1
            else "; is MEMOIR_ADMIN_TOKEN set where the server runs, and is this a store that it has?",
        }.get(reply.status_code, "")
        kind = _PassingError if reply.status_code in (502, 503, 504) else AdminError
        raise kind(f"{self._base} refused {method} {self._root}{path} with {reply.status_code}: {why}{hint}")

    def _read(self, reply: httpx.Response, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(reply.content, type=kind)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise AdminError(
                f"{self._base} answers in a form that this version does not know ({error}): install the server's "
                "memoir-retrieval"
            ) from error
