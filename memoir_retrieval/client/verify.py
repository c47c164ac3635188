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
from typing import Any, Literal

import msgspec

from memoir_retrieval.background import unrelated_prompts
from memoir_retrieval.client.server import Reply, Server
from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.lookup.decision import Result
from memoir_retrieval.store.manifest import library_version
from memoir_retrieval.store.read import EditStore

__all__ = ["Check", "Overhead", "ServerProbe", "Verification", "distance", "verify"]

State = Literal["ok", "fail", "skip"]
# Nats. Between two batches of other shapes the base model's own log-probabilities differ by 1e-5 in float32 on a CPU.
# An edit that reaches another request through the prefix cache, with the plugin's guard removed, moves them by .07.
LEAST_TOLERANCE = 1e-4
LEAK = 0.05
TOLERANCE_TIMES = 4


class Check(msgspec.Struct, frozen=True):
    """One thing that must hold.

    name: what must hold.
    state: "skip" where it could not be looked at.
    detail: figures, the first counter-example, or what looking at it takes.
    """

    name: str
    state: State
    detail: str


class Overhead(msgspec.Struct, frozen=True):
    """Seconds of a batch over those of the same batch opted out.

    kind: of the prompts.
    ratio: median of the turns.
    turns: the ratio of each pair of neighbouring turns.
    opted_out_s: median seconds of a batch that is opted out.
    """

    kind: Literal["unmatched", "matched"]
    ratio: float
    turns: tuple[float, ...]
    opted_out_s: float


class Verification(msgspec.Struct, frozen=True):
    """What `memoir verify` prints.

    server: its address.
    model: the name that it serves.
    vllm: its version.
    generation: of the store that it serves, or None without the plugin.
    client: what asked.
    checks: in the order in which they were made.
    overhead: what edits cost, for each kind of prompts.
    """

    server: str
    model: str
    vllm: str
    generation: int | None
    client: str
    checks: tuple[Check, ...]
    overhead: tuple[Overhead, ...]

    @property
    def holds(self) -> bool:
        """False where a check failed."""
        return all(check.state != "fail" for check in self.checks)


class ServerProbe(Server):
    """A server that is asked the same thing in several ways.

    url: without /v1.
    model: the name that it serves.
    chat: prompts are user messages for /v1/chat/completions, else raw text for /v1/completions.
    """

    def __init__(self, url: str, *, chat: bool):
        """Reach a server.

        url: with or without /v1.
        chat: ask through the chat template.

        Raises ServerError where no server answers, or it wants another key; ConfigError where `openai` is missing.
        """
        super().__init__(url)
        self.chat = chat

    def probe(
        self, prompt: str, *, off: bool = False, tokens: int = 16, salt: str | None = None, stop: bool = True
    ) -> Reply:
        """A greedy answer with the log-probabilities of its tokens.

        prompt: text.
        off: ask the base model.
        tokens: the most new ones.
        salt: requests of one salt share cached blocks (default: one of its own).
        stop: end at the end token; False goes on for `tokens`.

        Raises ServerError where the server refuses.
        """
        fields = {"ignore_eos": not stop, "cache_salt": salt or secrets.token_hex(16)}
        return self.ask(prompt, chat=self.chat, tokens=tokens, off=off, logprobs=True if self.chat else 1, **fields)

    def probe_together(self, requests: Sequence[tuple[str, bool]], **how: Any) -> list[Reply]:
        """Answers to requests that are all sent at once.

        requests: a prompt each, and whether the base model is asked.
        how: as for `probe`.
        """
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda request: self.probe(request[0], off=request[1], **how), requests))


def distance(left: Reply, right: Reply) -> float:
    """Largest difference of two answers' log-probabilities, up to and including the first token that differs.

    0.0 means equal bits. Infinite where one answer is a true beginning of the other, and where one of them lacks tokens
    or log-probabilities, so that there is nothing to compare.

    left, right: the answers.
    """
    if not (_is_whole(left) and _is_whole(right)):
        return float("inf")
    far = 0.0
    for a, b, x, y in zip(left.tokens, right.tokens, left.logprobs, right.logprobs, strict=False):
        far = max(far, abs(x - y))
        if a != b:
            return far or math.ulp(0.0)  # a tie, broken the other way
    return far if len(left.tokens) == len(right.tokens) else float("inf")


def _is_whole(reply: Reply) -> bool:
    return 0 < len(reply.tokens) == len(reply.logprobs)


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

    server: what is proved.
    store: what it serves, for its edits' prompts; without it nothing that matches can be asked.
    base: a server of the same model and flags without the plugin.
    prompts: how many of each kind are asked, and sent together.
    tokens: length of an answer.
    turns: of each kind when the overhead is measured, 0 to leave it out.

    Raises ServerError where a server refuses or stops answering.
    """
    edits = store.edits[-prompts:] if store else ()
    unrelated = unrelated_prompts()[:prompts]
    first = server.probe(unrelated[0], tokens=1)
    checks = list(_checks(server, store, base, unrelated, tokens, first))
    serves = all(check.state != "fail" for check in checks[:2])
    overhead = list(_overhead(server, [e.prompt for e in edits], unrelated, tokens, turns)) if serves else []
    return Verification(
        server=server.url,
        model=server.model,
        vllm=server.version(),
        generation=first.decision.generation if first.decision else None,
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
    if first.decision is None:
        yield Check(
            "serves edits", "fail", "the response names no decision: start it with `memoir serve M --store DIR`"
        )
        return
    generation = first.decision.generation
    yield Check("serves edits", "ok", f"generation {generation}")
    if not _is_whole(first):
        sides = f"{len(first.tokens)} token ids and {len(first.logprobs)} log-probabilities for an answer of one token"
        fix = "ask vLLM's server itself, not a proxy that leaves them out"
        yield Check("gives token ids and log-probabilities", "fail", f"{sides}: {fix}")
        return
    yield Check("gives token ids and log-probabilities", "ok", "what is compared")
    edits = store.edits[-len(unrelated) :] if store else ()
    if store:
        same = generation == store.manifest.generation
        sides = f"{store.path} is at {store.manifest.generation}, the server at {generation}"
        yield Check("same generation", "ok" if same else "fail", sides if same else f"{sides}: restart the server")

    def ask(prompt: str, off: bool = False, **more: Any) -> Reply:
        return server.probe(prompt, off=off, tokens=tokens, **more)

    prompts = [*unrelated, *(edit.prompt for edit in edits)]
    plain = {prompt: ask(prompt, off=True) for prompt in prompts}
    noise = max(distance(plain[prompt], ask(prompt, off=True)) for prompt in prompts)
    limit = 0.0 if noise == 0 else max(TOLERANCE_TIMES * noise, LEAST_TOLERANCE)
    how = "equal bits" if limit == 0 else f"log-probabilities within {limit:.1e}"
    if noise == 0:
        yield Check("opted out repeats", "ok", f"{len(prompts)} of {len(prompts)}, {how}")
    else:
        noisy = f"log-probabilities differ by {noise:.1e} from one time to the next"
        hint = "repeat this while nobody else asks the server, or see VLLM_BATCH_INVARIANT of vLLM"
        state: State = "fail" if noise >= LEAK else "skip"
        yield Check(
            "opted out repeats", state, f"{noisy}, so bits cannot be compared and {how} counts as equal; {hint}"
        )
    wrong = [p for p in prompts if _result(plain[p]) != "off" or plain[p].edit is not None]
    yield _all("opted out, no edit acts", len(prompts), wrong)

    replies = {prompt: ask(prompt) for prompt in unrelated}
    wrong = [f"{p!r} matches edit {r.edit}" for p, r in replies.items() if _result(r) != "unmatched"]
    yield _all("unrelated prompts match no edit", len(unrelated), wrong, fix="`memoir calibrate` suggests another tau")
    wrong = [p for p, r in replies.items() if r.edit is None and distance(r, plain[p]) > limit]
    yield _all("unmatched equals opted out", len(unrelated), wrong, how)
    name = "opted out equals the server without plugin"
    if base is not None:
        wrong = [prompt for prompt in prompts if distance(base.probe(prompt, tokens=tokens), plain[prompt]) > limit]
        yield _all(name, len(prompts), wrong, how)
    else:
        yield Check(name, "skip", "needs --base URL, a server without the plugin on the same hardware")
    if not edits:
        yield Check("matched requests", "skip", "needs --store DIR, a store that holds edits")
        return
    yield from _matched(ask, edits, plain, limit, how)
    yield _batchmates(server, unrelated, [edit.prompt for edit in edits], plain, tokens)


def _result(reply: Reply) -> Result | None:
    return reply.decision.result if reply.decision else None


def _matched(
    ask: Callable[..., Reply], edits: Sequence[StoredEdit], plain: dict[str, Reply], limit: float, how: str
) -> Iterator[Check]:
    replies = {edit.id: ask(edit.prompt) for edit in edits}
    wrong = [f"edit {e.id}, answered by {replies[e.id].edit}" for e in edits if replies[e.id].edit != e.id]
    yield _all("edited prompts match their edit", len(edits), wrong)
    wrong = [f"edit {e.id}" for e in edits if distance(ask(e.prompt), replies[e.id]) > limit]
    yield _all("matched repeats", len(edits), wrong, how)
    right = sum(replies[e.id].text.strip().startswith(e.target.strip()) for e in edits)
    changed = sum(replies[e.id].tokens != plain[e.prompt].tokens for e in edits)
    yield Check(
        "edits change answers",
        "ok" if changed else "fail",
        f"{changed} of {len(edits)} answers differ from the base model's, {right} begin with their target",
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
    calm = server.probe_together([(p, True) for p in mixed], tokens=tokens)
    busy = server.probe_together([(p, False) for p in mixed], tokens=tokens)
    noise = max(distance(reply, plain[p]) for p, reply in zip(mixed, calm, strict=True))
    alone = [(p, r) for p, r in zip(mixed, busy, strict=True) if p in unrelated and r.edit is None]
    if not alone:
        return Check("unmatched among matched", "skip", "every unrelated prompt matches an edit")
    if noise >= LEAK:
        return Check("unmatched among matched", "skip", f"the base model's answers alone move by {noise:.1e}")
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
        server.probe_together([(prompt, off) for prompt in prompts], tokens=tokens, stop=False)
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
