"""One running server of vLLM, over HTTP: every request of this library to the OpenAI routes is made here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, cast
from urllib.parse import urlsplit

from memoir_retrieval.errors import ConfigError, ServerError
from memoir_retrieval.lookup.decision import Decision, decision_of
from memoir_retrieval.question.prompts import Prompt, as_messages

__all__ = [
    "LAST_REQUEST",
    "TIMEOUT_S",
    "Reply",
    "Server",
    "api_key",
    "base_url",
    "no_key",
    "past_proxies",
    "request_of",
]

TIMEOUT_S = 600.0
"""Of one request: a long answer of a busy server on a CPU takes minutes."""

LAST_REQUEST = {"Connection": "close"}
"""Each request is the last one on its connection. vLLM's server closes a connection that was idle for 5 s, by its own
clock: a busy client may send a request at that moment, which gets no answer, and one that changes a store cannot simply
be sent again."""


_NO_SERVER = "give the address of a server of vLLM, such as `memoir serve` starts"


@dataclass(frozen=True)
class Reply:
    """One answer.

    tokens: ids, without those of the prompt.
    logprobs: of those tokens, in nats; empty unless they were asked for.
    text: the answer as text.
    decision: what became of the request, or None where the server has no plugin.
    prompt_logprobs: a mapping of token id to log-probability and rank for each position of the prompt, as vLLM gives
        it; empty unless asked for.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    decision: Decision | None
    prompt_logprobs: Sequence[Mapping[str, Any]] = ()

    @property
    def edit(self) -> int | None:
        """Id of the edit that acted, or None."""
        return self.decision.edit if self.decision else None


class Server:
    """A running OpenAI-compatible server of vLLM.

    url: without /v1.
    model: the name that it serves.
    """

    def __init__(self, url: str, *, retries: int = 0):
        """Ask a server for its model, with the key in OPENAI_API_KEY.

        url: with or without /v1.
        retries: how often a request is sent again that met no server or an overloaded one.

        Raises ServerError where no server answers, or it wants another key; ConfigError where `openai` is missing.
        """
        try:
            from openai import DefaultHttpxClient, OpenAI
        except ImportError:
            raise ConfigError("asking a server needs openai: pip install 'memoir-retrieval[eval]'") from None
        self.url = base_url(url)
        client = OpenAI(
            base_url=self.url,
            api_key=api_key(),
            timeout=TIMEOUT_S,
            max_retries=0,
            default_headers=LAST_REQUEST,
            http_client=DefaultHttpxClient(mounts=past_proxies(self.url)),
        )
        try:
            self.model = str(self._call(client.get, "/v1/models")["data"][0]["id"])
        except (LookupError, TypeError):
            raise ServerError(f"{self.url} names no model at /v1/models: {_NO_SERVER}") from None
        self._client = client.with_options(max_retries=retries)

    def version(self) -> str:
        """The server's version of vLLM, or "unknown" where a proxy in front hides it."""
        try:
            return str(self._call(self._client.get, "/version")["version"])
        except (ServerError, LookupError, TypeError):
            return "unknown"

    def ask(self, prompt: str | Sequence[int], *, chat: bool, tokens: int, off: bool = False, **fields: Any) -> Reply:
        """A greedy answer.

        prompt: a user message where `chat` is true, else raw text or token ids.
        chat: ask /v1/chat/completions, else /v1/completions.
        tokens: the most new ones.
        off: ask the base model.
        fields: further fields of the request, such as `prompt_logprobs`.

        Raises ServerError where the server refuses or stops answering.
        """
        options = {"memoir": "off"} if off else {}
        path, body = request_of(self.model, prompt, chat=chat, tokens=tokens, options=options, **fields)
        reply = self._call(self._client.post, path, body=body)
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"] if chat else choice["text"]
            logprobs = choice.get("logprobs") or {}
            content = logprobs.get("content") or ()
        except (LookupError, TypeError, AttributeError):
            raise ServerError(f"{self.url} gives no answer at {path}: {_NO_SERVER}") from None
        return Reply(
            tokens=tuple(choice.get("token_ids") or ()),
            logprobs=tuple(t["logprob"] for t in content) if chat else tuple(logprobs.get("token_logprobs") or ()),
            text=text or "",
            decision=decision_of(reply),
            prompt_logprobs=choice.get("prompt_logprobs") or (),
        )

    def _call(self, method: Callable[..., Any], path: str, **more: Any) -> Any:
        from openai import APIStatusError, AuthenticationError, OpenAIError

        try:
            return method(path, cast_to=object, **more)
        except AuthenticationError as error:
            raise no_key(self.url) from error
        except APIStatusError as error:
            raise ServerError(f"the server at {self.url} refused {path}: {error}") from error
        except OpenAIError as error:
            raise ServerError(f"no server answers at {self.url} ({error}): start one with `memoir serve`") from error
        except ValueError as error:
            raise ServerError(f"{self.url} sends no JSON at {path}: {_NO_SERVER}") from error


def request_of(
    model: str,
    prompt: Prompt | Sequence[int],
    *,
    chat: bool,
    tokens: int,
    options: Mapping[str, Any],
    **fields: Any,
) -> tuple[str, dict[str, Any]]:
    """Path and body of a request for a greedy answer.

    model: the name that the server gives it.
    prompt: a user message or messages where `chat` is true, else raw text or token ids.
    chat: ask /v1/chat/completions, else /v1/completions.
    tokens: the most new ones.
    options: of the plugin, by name (docs/reference/serving.md).
    fields: further fields of the body, or other values of these.
    """
    body = {"model": model, "max_tokens": tokens, "temperature": 0, "return_token_ids": True}
    body |= {"vllm_xargs": dict(options)} if options else {}
    body |= {"messages": as_messages(cast(Prompt, prompt))} if chat else {"prompt": prompt}
    body |= fields
    return "/v1/chat/completions" if chat else "/v1/completions", body


def api_key() -> str:
    """The key that is sent to a server: OPENAI_API_KEY, as OpenAI's own client reads it, or "none"."""
    return os.environ.get("OPENAI_API_KEY") or "none"


def no_key(url: str) -> ServerError:
    """The error where a server answers 401.

    url: of the server.
    """
    return ServerError(f"the server at {url} wants an API key: set OPENAI_API_KEY to it")


def base_url(url: str) -> str:
    """The address of a server without a slash at the end and without /v1.

    url: as it was typed.

    Raises ConfigError for one without http:// or https://, which httpx takes for a server that does not answer.
    """
    if not url.lower().startswith(("http://", "https://")):
        rest = url.rpartition("://")[2] or "127.0.0.1:8000"
        raise ConfigError(f"{url!r} does not begin with http:// or https://: write http://{rest}")
    return url.rstrip("/").removesuffix("/v1")


def past_proxies(url: str) -> dict[str, None]:
    """The `mounts` of an httpx client by which a server of this machine is asked without the proxies of the
    environment: they reach other machines, and would be given its token.

    url: of the server.
    """
    host = urlsplit(url).hostname or ""
    try:
        local = ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    return {f"all://[{host}]" if ":" in host else f"all://{host}": None} if local else {}
