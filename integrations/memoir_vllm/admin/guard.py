"""The door of the admin API: a request is read only after its token, its size and its rate are known to be right."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memoir_vllm.admin.tokens import Tokens

__all__ = ["LARGEST_BODY", "Guard"]

LARGEST_BODY = 256 * 1024  # bytes
LONGEST_LENGTH = 20  # digits: Python reads no number of thousands of them
# Requests of one token: on average so many a second, at most so many at once.
RATE, BURST = 50.0, 500.0
STARTS = 4  # requests that are read within one turn of the event loop, which serves /v1 between them

_HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
}


class Turns:
    """Lets a few callers go on in each turn of the event loop, in the order in which they came."""

    def __init__(self, starts: int):
        """starts: how many in a turn."""
        self._starts = self._left = starts
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._counting = False

    async def wait(self) -> None:
        """Wait for a place in a turn."""
        loop = asyncio.get_running_loop()
        if not self._counting:
            self._counting = True
            loop.call_soon(self._next)
        if self._left and not self._waiting:
            self._left -= 1
        else:
            self._waiting.append(loop.create_future())
            await self._waiting[-1]

    def _next(self) -> None:
        """Begin a turn. Callers that go on are called in the next one, so nobody goes on twice."""
        self._left = self._starts
        while self._left and self._waiting:
            place = self._waiting.popleft()
            if not place.done():  # its caller has gone
                place.set_result(None)
                self._left -= 1
        self._counting = self._left < self._starts
        if self._counting:
            asyncio.get_running_loop().call_soon(self._next)


class Guard:
    """ASGI middleware that asks for a token."""

    def __init__(self, app: ASGIApp, tokens: Tokens, public: Iterable[str]):
        """app: what is guarded.
        tokens: which are known.
        public: paths below the mount that need no token: they hold nothing of the store.
        """
        self._app, self._tokens, self._public = app, tokens, frozenset(public)
        self._allowance: dict[str, tuple[float, float]] = {}
        self._turns = Turns(STARTS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        await self._turns.wait()
        if not scope["path"].startswith(scope.get("root_path", "")):
            # A proxy has taken the server's --root-path off, which our mount goes on counting with.
            scope = dict(scope) | {"path": scope.get("app_root_path", "") + scope["path"]}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        answer = self._refuse(scope, headers)
        if answer is None:
            body = await _read(headers, receive)
            if body is None:
                answer = _refusal(413, f"the body is larger than {LARGEST_BODY} bytes, or has no readable length")
            else:
                answer, receive = self._app, _again(body, receive)
        await answer(scope, receive, send_with_headers)

    def _refuse(self, scope: Scope, headers: Headers) -> ASGIApp | None:
        """Why this request is not read, or None; then the scope names the token's holder."""
        if scope["path"].removeprefix(scope.get("root_path", "")) in self._public:
            return None
        name = self._tokens.holder(headers.get("authorization"))
        if name is None:
            return _refusal(401, "send the admin token: Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"})
        if (wait := self._wait(name)) > 0:
            return _refusal(
                429, f"more than {RATE:.0f} requests per second: send fewer", {"retry-after": str(int(wait) + 1)}
            )
        scope["memoir_holder"] = name
        return None

    def _wait(self, name: str) -> float:
        """Seconds until this holder may ask again; 0 or less takes one request off the allowance."""
        now = time.monotonic()
        left, since = self._allowance.get(name, (BURST, now))
        left = min(BURST, left + (now - since) * RATE)
        if left < 1:
            return (1 - left) / RATE
        self._allowance[name] = (left - 1, now)
        return 0.0


def _refusal(status: int, detail: str, headers: dict[str, str] | None = None) -> ASGIApp:
    return JSONResponse({"detail": detail}, status_code=status, headers=headers)


def _again(body: bytes, receive: Receive) -> Receive:
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return unread.pop() if unread else await receive()

    return receive_again


async def _read(headers: Headers, receive: Receive) -> bytes | None:
    """The whole body, or None where it is too large."""
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > LONGEST_LENGTH or int(length) > LARGEST_BODY:
        return None
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":  # the client has gone
            return b""
        body += message.get("body", b"")
        if len(body) > LARGEST_BODY:
            return None
        if not message.get("more_body"):
            return body
