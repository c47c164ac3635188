"""Proving on a running server that edits act where they must and nowhere else, and what that costs there.

A server is asked over HTTP, as clients ask it: no model is loaded and no tokenizer needed. Bits are compared where the
server computes the same thing twice: one request at a time, each with a `cache_salt` of its own, so that no cached
block changes the shape of a step. In a batch the shape depends on the moment, and floating point on the shape; there,
log-probabilities may differ by a few times as much as the base model's own do.
"""

from __future__ import annotations

import math
import platform
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from memoir_retrieval.background import unrelated_prompts
from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.store.read import EditStore, library_version

__all__ = ["Check", "Overhead", "Reply", "ServerProbe", "Verification", "distance", "verify"]

State = Literal["ok", "fail", "skip"]
# Nats. Between two batches of other shapes the base model's own log-probabilities differ by 1e-5 in float32 on a CPU.
# An edit that reaches another request through the prefix cache, with the plugin's guard removed, moves them by .07.
LEAST_TOLERANCE = 1e-4
LEAK = 0.05
TOLERANCE_TIMES = 4


class Check(msgspec.Struct, frozen=True):
    """One thing that must hold. `skip`: it could not be looked at, and `detail` says what that takes."""

    name: str
    state: State
    detail: str


class Overhead(msgspec.Struct, frozen=True):
    """Seconds of a batch over those of the same batch opted out: median of neighbouring turns, and each of them."""

    kind: Literal["unmatched", "matched"]
    ratio: float
    turns: tuple[float, ...]
    opted_out_s: float


class Verification(msgspec.Struct, frozen=True):
    """What `memoir verify` prints. `holds` is false where a check failed."""

    server: str
    model: str
    vllm: str
    generation: int | None
    client: str
    checks: tuple[Check, ...]
    overhead: tuple[Overhead, ...]

    @property
    def holds(self) -> bool:
        return all(check.state != "fail" for check in self.checks)


@dataclass(frozen=True)
class Reply:
    """One answer. tokens: ids. logprobs: of those tokens, nats. memoir: the plugin's part of the response, or {}."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    memoir: dict[str, Any]

    @property
    def edit(self) -> int | None:
        return self.memoir.get("edit")


class ServerProbe:
    """A running OpenAI-compatible server of vLLM.

    chat: prompts are user messages for /v1/chat/completions, else raw text for /v1/completions.
    """

    def __init__(self, url: str, *, chat: bool, api_key: str = "none"):
        """url: with or without /v1. Raises ConfigError where no server answers, or `openai` is missing."""
        try:
            from openai import OpenAI
        except ImportError:
            raise ConfigError("asking a server needs openai: pip install 'memoir-retrieval[eval]'") from None
        self.url = url.rstrip("/").removesuffix("/v1")
        self.chat = chat
        self._client = OpenAI(base_url=self.url, api_key=api_key, timeout=600, max_retries=0)
        self.model = str(self._call(self._client.get, "/v1/models")["data"][0]["id"])
        try:
            self.vllm = str(self._call(self._client.get, "/version")["version"])
        except (ConfigError, LookupError, TypeError):  # a proxy in front may hide it
            self.vllm = "unknown"

    def ask(
        self, prompt: str, *, off: bool = False, tokens: int = 16, salt: str | None = None, stop: bool = True
    ) -> Reply:
        """A greedy answer. salt: requests of one salt share cached blocks (default: one of its own). stop: end at the
        end token; False goes on for `tokens`. Raises ConfigError where the server refuses."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": not stop,
            "return_token_ids": True,
            "cache_salt": salt or secrets.token_hex(16),
        }
        if off:
            body["vllm_xargs"] = {"memoir": "off"}
        if self.chat:
            body |= {"messages": [{"role": "user", "content": prompt}], "logprobs": True}
        else:
            body |= {"prompt": prompt, "logprobs": 1}
        path = "/v1/chat/completions" if self.chat else "/v1/completions"
        reply = self._call(self._client.post, path, body=body)
        choice = reply["choices"][0]
        logprobs = choice["logprobs"] or {}
        seen = [t["logprob"] for t in logprobs["content"]] if self.chat else logprobs["token_logprobs"]
        text = choice["message"]["content"] if self.chat else choice["text"]
        told = (reply.get("kv_transfer_params") or {}).get("memoir") or {}
        return Reply(tuple(choice["token_ids"]), tuple(seen), text or "", told)

    def ask_together(self, asked: Sequence[tuple[str, bool]], **how: Any) -> list[Reply]:
        """Answers to (prompt, off) pairs that are all sent at once."""
        with ThreadPoolExecutor(len(asked)) as pool:
            return list(pool.map(lambda one: self.ask(one[0], off=one[1], **how), asked))

    def _call(self, method: Callable[..., Any], path: str, **more: Any) -> Any:
        from openai import APIStatusError, OpenAIError

        try:
            return method(path, cast_to=object, **more)
        except APIStatusError as error:
            raise ConfigError(f"the server at {self.url} refused {path}: {error}") from error
        except OpenAIError as error:
            raise ConfigError(f"no server answers at {self.url} ({error}): start one with `memoir serve`") from error


def distance(one: Reply, other: Reply) -> float:
    """Largest difference of two answers' log-probabilities, up to and including the first token that differs.

    0.0 means equal bits. Infinite where one answer is a true beginning of the other.
    """
    far = 0.0
    for a, b, left, right in zip(one.tokens, other.tokens, one.logprobs, other.logprobs, strict=False):
        far = max(far, abs(left - right))
        if a != b:
            return far or math.ulp(0.0)  # a tie, broken otherwise
    return far if len(one.tokens) == len(other.tokens) else float("inf")


def verify(
    server: ServerProbe,
    store: EditStore | None = None,
    base: ServerProbe | None = None,
    *,
    prompts: int = 8,
    tokens: int = 16,
    turns: int = 5,
) -> Verification:
    """Ask a server everything that must hold.

    store: what it serves, for its edits' prompts; without it nothing that matches can be asked. base: a server of the
    same model and flags without the plugin. prompts: how many of each kind are asked, and sent together. tokens: length
    of an answer. turns: of each kind when the overhead is measured, 0 to leave it out.
    Raises ConfigError where a server refuses or stops answering.
    """
    edits = store.edits[-prompts:] if store else ()
    unrelated = unrelated_prompts()[:prompts]
    first = server.ask(unrelated[0], tokens=1)
    generation = first.memoir.get("generation")
    checks = list(_checks(server, store, base, unrelated, tokens, first))
    serves = all(check.state != "fail" for check in checks[:1])
    overhead = list(_overhead(server, [e.prompt for e in edits], unrelated, tokens, turns)) if serves else []
    return Verification(
        server=server.url,
        model=server.model,
        vllm=server.vllm,
        generation=generation,
        client=f"memoir-retrieval {library_version()}, Python {platform.python_version()}, {platform.platform()}",
        checks=tuple(checks),
        overhead=tuple(overhead),
    )


def _checks(
    server: ServerProbe,
    store: EditStore | None,
    base: ServerProbe | None,
    unrelated: list[str],
    tokens: int,
    first: Reply,
) -> Iterator[Check]:
    if not first.memoir:
        yield Check(
            "serves edits", "fail", "the response names no decision: start it with `memoir serve M --store DIR`"
        )
        return
    generation = first.memoir["generation"]
    yield Check("serves edits", "ok", f"generation {generation}")
    edits = store.edits[-len(unrelated) :] if store else ()
    if store:
        same = generation == store.manifest.generation
        said = f"{store.path} is at {store.manifest.generation}, the server at {generation}"
        yield Check("same generation", "ok" if same else "fail", said if same else f"{said}: restart the server")

    def ask(prompt: str, off: bool = False, **more: Any) -> Reply:
        return server.ask(prompt, off=off, tokens=tokens, **more)

    asked = [*unrelated, *(edit.prompt for edit in edits)]
    plain = {prompt: ask(prompt, off=True) for prompt in asked}
    noise = max(distance(plain[prompt], ask(prompt, off=True)) for prompt in asked)
    limit = 0.0 if noise == 0 else max(TOLERANCE_TIMES * noise, LEAST_TOLERANCE)
    how = "equal bits" if limit == 0 else f"log-probabilities within {limit:.1e}"
    if noise == 0:
        yield Check("opted out repeats", "ok", f"{len(asked)} of {len(asked)}, {how}")
    else:
        said = f"log-probabilities differ by {noise:.1e} from one time to the next"
        hint = "is somebody else asking this server? see VLLM_BATCH_INVARIANT"
        state: State = "fail" if noise >= LEAK else "skip"
        yield Check("opted out repeats", state, f"{said}, so bits cannot be compared and {how} counts as equal; {hint}")
    wrong = [p for p in asked if plain[p].memoir.get("result") != "off" or plain[p].edit is not None]
    yield _all("opted out, no edit acts", len(asked), wrong)

    replies = {prompt: ask(prompt) for prompt in unrelated}
    wrong = [f"{p!r} matches edit {r.edit}" for p, r in replies.items() if r.memoir.get("result") != "unmatched"]
    yield _all("unrelated prompts match no edit", len(unrelated), wrong, fix="`memoir calibrate` suggests another tau")
    wrong = [p for p, r in replies.items() if r.edit is None and distance(r, plain[p]) > limit]
    yield _all("unmatched equals opted out", len(unrelated), wrong, how)
    name = "opted out equals the server without plugin"
    if base is not None:
        wrong = [prompt for prompt in asked if distance(base.ask(prompt, tokens=tokens), plain[prompt]) > limit]
        yield _all(name, len(asked), wrong, how)
    else:
        yield Check(name, "skip", "needs --base URL, a server without the plugin on the same hardware")
    if not edits:
        yield Check("matched requests", "skip", "needs --store DIR, a store that holds edits")
        return
    yield from _matched(ask, edits, plain, limit, how)
    yield _batchmates(server, unrelated, [edit.prompt for edit in edits], plain, tokens)


def _matched(
    ask: Callable[..., Reply], edits: Sequence[StoredEdit], plain: dict[str, Reply], limit: float, how: str
) -> Iterator[Check]:
    replies = {edit.id: ask(edit.prompt) for edit in edits}
    wrong = [f"edit {e.id}, answered by {replies[e.id].edit}" for e in edits if replies[e.id].edit != e.id]
    yield _all("edited prompts match their edit", len(edits), wrong)
    wrong = [f"edit {e.id}" for e in edits if distance(ask(e.prompt), replies[e.id]) > limit]
    yield _all("matched repeats", len(edits), wrong, how)
    said = sum(replies[e.id].text.strip().startswith(e.target.strip()) for e in edits)
    changed = sum(replies[e.id].tokens != plain[e.prompt].tokens for e in edits)
    yield Check(
        "edits are felt",
        "ok" if changed else "fail",
        f"{changed} of {len(edits)} answers differ from the base model's, {said} begin with their target",
    )
    wrong = []
    for edit in edits:
        salt = secrets.token_hex(16)  # from here on all six share what the prefix cache has
        turns = [ask(edit.prompt, off=off, salt=salt) for off in (True, True, False, False, True, False)]
        # The first of each kind fills the cache, so those compared take the same blocks from it.
        if distance(turns[1], turns[4]) > limit or distance(turns[3], turns[5]) > limit:
            wrong.append(f"edit {edit.id}")
    yield _all("edited and opted out in turn, from the cache", len(edits), wrong, how)


def _batchmates(
    server: ServerProbe, unrelated: list[str], edited: list[str], plain: dict[str, Reply], tokens: int
) -> Check:
    """Unmatched prompts among matched ones, against the same prompts among the same neighbours opted out."""
    mixed = [p for pair in zip(unrelated, edited, strict=False) for p in pair] + unrelated[len(edited) :]
    calm = server.ask_together([(p, True) for p in mixed], tokens=tokens)
    busy = server.ask_together([(p, False) for p in mixed], tokens=tokens)
    noise = max(distance(reply, plain[p]) for p, reply in zip(mixed, calm, strict=True))
    alone = [(p, r) for p, r in zip(mixed, busy, strict=True) if p in unrelated and r.edit is None]
    if not alone:
        return Check("unmatched among matched", "skip", "no unrelated prompt is unmatched")
    moved = max(distance(reply, plain[p]) for p, reply in alone)
    allowed = max(TOLERANCE_TIMES * noise, LEAST_TOLERANCE)
    return Check(
        "unmatched among matched",
        "ok" if moved <= allowed else "fail",
        f"{len(alone)} of a batch of {len(mixed)}: log-probabilities move by {moved:.1e} when others match, by "
        f"{noise:.1e} when all are opted out; {allowed:.1e} is allowed",
    )


def _all(name: str, count: int, wrong: Sequence[str], how: str = "", fix: str = "") -> Check:
    if not wrong:
        return Check(name, "ok", f"{count} of {count}" + (f", {how}" if how else ""))
    return Check(name, "fail", f"{len(wrong)} of {count} do not, such as {wrong[0]}" + (f"; {fix}" if fix else ""))


def _overhead(
    server: ServerProbe, edited: list[str], unrelated: list[str], tokens: int, turns: int
) -> Iterator[Overhead]:
    """Whole batches, the two kinds in turn, the order of a pair changing; a first pair is thrown away."""

    def seconds(prompts: list[str], off: bool) -> float:
        started = time.perf_counter()
        server.ask_together([(prompt, off) for prompt in prompts], tokens=tokens, stop=False)
        return time.perf_counter() - started

    kinds: tuple[tuple[Literal["unmatched", "matched"], list[str]], ...] = (
        ("unmatched", unrelated),
        ("matched", edited),
    )
    for kind, prompts in kinds:
        if not prompts or not turns:
            continue
        ratios, outs = [], []
        for turn in range(turns + 1):
            # A question that was asked before is decided without a lookup: unmatched ones are new each turn.
            now = [f"{prompt} ({turn})" for prompt in prompts] if kind == "unmatched" else prompts
            taken = {off: seconds(now, off) for off in ((True, False) if turn % 2 else (False, True))}
            if turn:
                ratios.append(round(taken[False] / taken[True], 3))
                outs.append(taken[True])
        yield Overhead(kind, statistics.median(ratios), tuple(ratios), round(statistics.median(outs), 3))
