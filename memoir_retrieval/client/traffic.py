"""Requests of many kinds at one running server, and what becomes of them: the traffic of `soak.py`."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, NamedTuple

import httpx
import msgspec

from memoir_retrieval.client.server import LAST_REQUEST, TIMEOUT_S, api_key, base_url, no_key, past_proxies, request_of
from memoir_retrieval.errors import ServerError
from memoir_retrieval.lookup.decision import Decision
from memoir_retrieval.question.prompts import Prompt

__all__ = ["Kind", "NoAnswer", "Reference", "ServedAnswer", "SoakClient", "SoakQuestion", "difference"]

Kind = Literal["plain", "stream", "abort", "several"]
KINDS: tuple[Kind, ...] = ("plain", "plain", "plain", "stream", "stream", "abort", "several")
OPTED_OUT = 0.25
SALTED, SALTS = 0.3, ("first", "second", "")  # "" is a salt of the request's own


class SoakQuestion(NamedTuple):
    """What is asked.

    prompt: text, or messages.
    span: the tokens that `memoir_span` names, such as "12:30"; "" leaves the question to the server.
    """

    prompt: Prompt
    span: str = ""


class ServedAnswer(NamedTuple):
    """One choice of a response.

    tokens: ids of all that was generated.
    decision: what became of the request: matched, unmatched and so on, and by which edit.
    """

    tokens: tuple[int, ...]
    decision: Decision


@dataclass(frozen=True)
class Reference:
    """An answer of the quiet server.

    tokens: all of it.
    clear: how many of them come before the first that has another one near.
    decision: what became of the request.
    length: tokens of the prompt.
    """

    tokens: tuple[int, ...]
    clear: int
    decision: Decision
    length: int


class NoAnswer(ServerError):
    """A request that got no answer, and why, in one line."""


def difference(answer: ServedAnswer, reference: Reference) -> str | None:
    """What an answer has that its reference has not, in one line, or None where they agree.

    answer: from the server under load.
    reference: from the quiet server. What follows its first near tie is not compared.
    """
    decision, wanted = answer.decision, reference.decision
    if (decision.result, decision.edit) != (wanted.result, wanted.edit):
        return f"{decision.result} by edit {decision.edit}, not {wanted.result} by {wanted.edit}"
    whole = reference.clear == len(reference.tokens)
    tokens = answer.tokens if whole else answer.tokens[: reference.clear]
    if tokens != reference.tokens[: reference.clear]:
        return f"tokens {list(tokens)}, not {list(reference.tokens[: reference.clear])}"
    return None


class SoakClient:
    """One server and how it is asked.

    priorities: whether it takes the field `priority`, which `begin` finds out.
    length: the most tokens of a prompt with its answer.
    """

    def __init__(self, url: str, *, tokens: int, clients: int, near: float):
        """Nothing is sent yet.

        url: with or without /v1.
        tokens: of an answer, at most.
        clients: requests at a time.
        near: nats between the two best tokens, below which rounding decides between them.
        """
        self.url, self._tokens, self._near = base_url(url), tokens, near
        self.priorities = False
        self.length = 0
        self._model = ""
        self._http = httpx.AsyncClient(
            base_url=self.url,
            timeout=TIMEOUT_S,
            mounts=past_proxies(self.url),
            headers={"Authorization": f"Bearer {api_key()}", **LAST_REQUEST},
            limits=httpx.Limits(max_connections=clients + 4),
        )

    async def begin(self) -> None:
        """Ask what is served. Raises ServerError where no server with edits answers, or it wants another key."""
        try:
            reply = await self._http.get("/v1/models")
            if reply.status_code == httpx.codes.UNAUTHORIZED:
                raise no_key(self.url)
            models = reply.raise_for_status().json()["data"]
            self._model, self.length = models[0]["id"], int(models[0]["max_model_len"])
            fields = {"model": self._model, "prompt": "a", "max_tokens": 1, "priority": 1}
            self.priorities = (await self._http.post("/v1/completions", json=fields)).status_code == httpx.codes.OK
        except (httpx.HTTPError, LookupError, ValueError, TypeError) as error:
            reason = str(error) or type(error).__name__
            raise ServerError(
                f"no vLLM server answers at {self.url} ({reason}): start one with `memoir serve`"
            ) from error

    async def close(self) -> None:
        """Close the connections; nothing can be asked afterwards."""
        await self._http.aclose()

    async def refer(self, question: SoakQuestion, *, off: bool) -> Reference:
        """The answer to a question that shares nothing with any other request.

        question: what is asked, greedily.
        off: opt out of edits, which asks the base model.
        Raises NoAnswer where the server refuses or cannot be reached.
        """
        chat = not isinstance(question.prompt, str)
        alternatives = {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
        fields = {**alternatives, "return_tokens_as_token_ids": True, "cache_salt": secrets.token_hex(8)}
        reply = await self._post(*self._request(question, off, fields))
        (answer,) = _answers(reply)
        margins = list(_margins(reply["choices"][0]["logprobs"]))
        clear = next((n for n, margin in enumerate(margins) if margin < self._near), len(answer.tokens))
        return Reference(answer.tokens, clear, answer.decision, int(reply["usage"]["prompt_tokens"]))

    async def ask(self, question: SoakQuestion, kind: Kind, off: bool, dice: Random) -> list[ServedAnswer]:
        """All answers to one request; none where the client leaves before they come.

        question: what is asked.
        kind: plain, streamed, left after the first chunk, or with several choices.
        off: opt out of edits, which asks the base model.
        dice: what decides on cache salt, priority, seed and the number of choices.
        Raises NoAnswer where the server refuses, breaks off or cannot be reached.
        """
        fields: dict[str, Any] = {}
        if dice.random() < SALTED:
            fields["cache_salt"] = dice.choice(SALTS) or secrets.token_hex(8)
        if self.priorities:
            fields["priority"] = dice.randrange(4)
        if kind == "several":  # of one candidate a sampler takes that one, whatever the seed
            fields |= {"n": dice.choice((2, 3)), "seed": dice.randrange(1000), "temperature": 1.0, "top_k": 1}
        if kind in ("stream", "abort"):
            fields["stream"] = True
            path, body = self._request(question, off, fields, memoir_report=1)
            return await self._stream(path, body, leave=kind == "abort")
        return list(_answers(await self._post(*self._request(question, off, fields))))

    async def metrics(self) -> dict[str, float]:
        """Every series of /metrics, summed over its labels; nothing where a proxy hides them."""
        try:
            reply = await self._http.get("/metrics")
        except httpx.HTTPError:
            return {}
        sums: dict[str, float] = {}
        for line in reply.text.splitlines() if reply.is_success else ():
            name, _, value = line.rpartition(" ")
            if line.startswith("#") or not name:
                continue
            try:
                number = float(value)
            except ValueError:  # a page of a proxy
                return {}
            name = name.split("{")[0]
            sums[name] = sums.get(name, 0.0) + number
        return sums

    def _request(
        self, question: SoakQuestion, off: bool, fields: Mapping[str, Any], **options: Any
    ) -> tuple[str, dict[str, Any]]:
        """Path and body of a request."""
        options |= {"memoir": "off"} if off else {"memoir_span": question.span} if question.span else {}
        chat = not isinstance(question.prompt, str)
        return request_of(self._model, question.prompt, chat=chat, tokens=self._tokens, options=options, **fields)

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        try:
            reply = await self._http.post(path, json=body)
        except httpx.HTTPError as error:
            raise NoAnswer(f"{path}: {str(error) or type(error).__name__}") from error
        if not reply.is_success:
            raise _refusal(path, reply)
        try:
            return reply.json()
        except ValueError as error:
            raise NoAnswer(f"{path}: no JSON, but {' '.join(reply.text.split()):.200}") from error

    async def _stream(self, path: str, body: dict[str, Any], *, leave: bool) -> list[ServedAnswer]:
        tokens: list[int] = []
        decision = None
        try:
            async with self._http.stream("POST", path, json=body) as reply:
                if not reply.is_success:
                    await reply.aread()
                    raise _refusal(path, reply)
                async for line in _lines(reply):
                    if line.startswith(":"):  # a comment, by which proxies keep a connection open
                        continue
                    data = line.removeprefix("data: ")
                    if leave and data:
                        return []
                    if data == "[DONE]":
                        break
                    chunk = json.loads(data) if data else {}
                    if "error" in chunk:
                        raise NoAnswer(f"{path}: a stream ends with {chunk['error']!s:.200}")
                    tokens += [token for choice in chunk.get("choices", ()) for token in choice.get("token_ids") or ()]
                    decision = (chunk.get("kv_transfer_params") or {}).get("memoir", decision)
                else:
                    raise NoAnswer(f"{path}: a stream ends without [DONE]")
        except (httpx.HTTPError, ValueError) as error:
            raise NoAnswer(f"{path}: {str(error) or type(error).__name__}") from error
        return [_answer(tokens, decision)]


async def _lines(reply: httpx.Response) -> AsyncIterator[str]:
    """The lines of a stream. `aiter_lines` of httpx 0.28 would also split at a U+2028 or U+0085 of an answer."""
    rest = b""
    async for data in reply.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line.decode().removesuffix("\r")
    if rest:
        yield rest.decode()


def _refusal(path: str, reply: httpx.Response) -> NoAnswer:
    """What a server says instead of an answer; its body has been read."""
    return NoAnswer(f"{path}: {reply.status_code} {' '.join(reply.text.split()):.200}")


def _answers(reply: Mapping[str, Any]) -> Iterator[ServedAnswer]:
    said = reply.get("kv_transfer_params") or {}
    choices = reply["choices"]
    decisions = said.get("memoir_choices") or [said.get("memoir")] * len(choices)
    for choice, decision in zip(choices, decisions, strict=True):
        yield _answer(choice.get("token_ids") or (), decision)


def _answer(tokens: Any, decision: Any) -> ServedAnswer:
    try:
        return ServedAnswer(tuple(tokens), msgspec.convert(decision, Decision))
    except msgspec.ValidationError as error:
        raise NoAnswer(f"an answer has no decision that this version knows ({error})") from None


def _margins(logprobs: Mapping[str, Any]) -> Iterator[float]:
    """How far the best token of each place is ahead of the next, in nats; infinity where there is no other."""
    if "top_logprobs" in logprobs:
        places = [list(place.values()) for place in logprobs["top_logprobs"]]
    else:
        places = [[other["logprob"] for other in place["top_logprobs"]] for place in logprobs["content"]]
    for place in places:
        best = sorted(place, reverse=True)[:2]
        yield best[0] - best[1] if len(best) == 2 else math.inf
