"""Throughput with the plugin against vLLM without it: `memoir bench serve`.

Two engines live side by side, one with the plugin and one without, and take turns on the same requests. The one
that waits is stopped by a signal, since vLLM's threads spin while idle and would slow the other. Speeds are told
as ratios of neighbouring turns, so that a machine whose speed drifts does not matter.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

__all__ = ["Settings", "Turn", "main", "measure"]

START_TIMEOUT = 900.0
FIRST = 8  # requests whose time to the first token makes one median
RESEARCH_TURNS = 3


class Settings(msgspec.Struct, kw_only=True):
    """What is measured: `pairs` turns of `batch` requests of `tokens` new tokens each, per kind of request.

    unmatched, matched: token ids of prompts. cached: prompts of edits that all begin with one long system message;
    empty where the store's prompts are raw text.
    """

    store: str
    model: str
    unmatched: list[list[int]]
    matched: list[list[int]]
    cached: list[list[int]]
    dtype: str = "float32"
    eager: bool = True
    batch: int = 32
    tokens: int = 64
    pairs: int = 7
    max_model_len: int = 2048


class Turn(msgspec.Struct):
    """seconds: of each call. matched: of each request. cost: milliseconds a step of lookup and residual."""

    seconds: list[float]
    matched: list[bool]
    cost: dict[str, float]


class _Engine:
    """One vLLM engine in a process of its own, stopped unless it has the turn."""

    def __init__(self, settings: Settings, plugin: bool, budget: int | None = None):
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, msgspec.to_builtins(settings), plugin, budget), daemon=True
        )
        self._process.start()
        theirs.close()
        self._receive(START_TIMEOUT)
        self._signal(signal.SIGSTOP)

    def run(
        self, prompts: list[list[int]], tokens: int, *, single: bool = False, warm: bool = False, off: bool = False
    ) -> Turn:
        """One turn. single: one request at a time. warm: keep the prefix cache. off: opted out of edits."""
        self._signal(signal.SIGCONT)
        self._pipe.send((prompts, tokens, single, warm, off))
        turn = self._receive(START_TIMEOUT)
        self._signal(signal.SIGSTOP)
        return msgspec.convert(turn, Turn)

    def close(self) -> None:
        if self._process.is_alive():
            self._signal(signal.SIGCONT)
            self._process.terminate()
            self._process.join(30)

    def _signal(self, number: int) -> None:
        if self._process.pid is not None:
            os.kill(self._process.pid, number)

    def _receive(self, timeout: float) -> Any:
        if not self._pipe.poll(timeout):
            raise TimeoutError(f"the engine gave no answer in {timeout:.0f} s")
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("the engine stopped; its log above says why") from None


def _serve(pipe: Connection, raw: dict[str, Any], plugin: bool, budget: int | None) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the whole engine in this process, so that signals reach it
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    settings = msgspec.convert(raw, Settings)
    llm = LLM(
        settings.model,
        dtype=settings.dtype,
        enforce_eager=settings.eager,
        max_num_seqs=settings.batch,
        max_model_len=settings.max_model_len,
        max_num_batched_tokens=budget or max(2048, settings.max_model_len),
        additional_config={"memoir": {"store": settings.store}} if plugin else {},
        seed=0,
    )

    def stats() -> dict[str, float]:
        return llm.collective_rpc("memoir_stats")[0] if plugin else {}

    pipe.send("ready")
    while True:
        prompts, tokens, single, warm, off = pipe.recv()
        sampling = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, extra_args={"memoir": "off"} if off else None
        )
        if not warm:
            llm.reset_prefix_cache()  # and what the scheduler remembers of prompts
        before, seconds, done = stats(), [], []
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        for call in [[one] for one in asked] if single else [asked]:
            started = time.perf_counter()
            done += llm.generate(call, sampling, use_tqdm=False)
            seconds.append(time.perf_counter() - started)
        after = stats()
        steps = max(1, after.get("steps", 0) - before.get("steps", 0))
        cost = {key: 1e3 * (after[key] - before[key]) / steps for key in after if key.endswith("_s")}
        said = [(out.kv_transfer_params or {}).get("memoir", {}) for out in done]
        pipe.send(msgspec.to_builtins(Turn(seconds, [s.get("result") == "matched" for s in said], cost)))


@contextmanager
def _engines(settings: Settings) -> Iterator[tuple[_Engine, _Engine]]:
    without = _Engine(settings, plugin=False)
    try:
        with_plugin = _Engine(settings, plugin=True)
        try:
            yield without, with_plugin
        finally:
            with_plugin.close()
    finally:
        without.close()


def measure(settings: Settings, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Run everything. Returns the figures that `docs/measurements.md` explains, and the settings that made them.

    Raises RuntimeError where requests of a kind did not match as they should: the ratio would mean nothing.
    """
    say("starting two engines")
    with _engines(settings) as (without, with_plugin):
        result = _throughput(settings, without, with_plugin, say)
        result["ttft_ratio_inline"] = _first_token(settings, with_plugin, settings.matched[:FIRST], say, "inline")
        if settings.cached:
            found = with_plugin.run(settings.cached, 1).matched  # behind such a message not every edit is found
            cached = [prompt for prompt, matched in zip(settings.cached, found, strict=True) if matched]
            result["ttft_ratio_cached"] = _first_token(settings, with_plugin, cached[:FIRST], say, "cached", warm=True)
        result |= _research(settings, with_plugin, say)
    say("starting an engine whose steps are too small for a question")
    small = _Engine(settings, plugin=True, budget=settings.batch + 8)
    try:
        result["ttft_ratio_reroute"] = _first_token(settings, small, settings.matched[:FIRST], say, "reroute")
    finally:
        small.close()
    for key in ("dtype", "eager", "batch", "tokens", "pairs"):
        result[key] = getattr(settings, key)
    return result


def _throughput(
    settings: Settings, without: _Engine, with_plugin: _Engine, say: Callable[[str], None]
) -> dict[str, Any]:
    """Tokens per second, the plugin over no plugin, in pairs of turns."""
    result: dict[str, Any] = {}
    generated = settings.batch * settings.tokens
    for kind, rows, expected in (
        ("unmatched", settings.unmatched, 0),
        ("matched", settings.matched, settings.batch),
    ):
        prompts = [rows[i % len(rows)] for i in range(settings.batch)]
        without.run(prompts, settings.tokens)  # the first turn of a kind warms up
        with_plugin.run(prompts, settings.tokens)
        pairs: list[tuple[float, float]] = []
        costs: list[dict[str, float]] = []
        for turn in range(settings.pairs):
            order = (without, with_plugin) if turn % 2 == 0 else (with_plugin, without)
            timed = {engine: engine.run(prompts, settings.tokens) for engine in order}
            ours = timed[with_plugin]
            if sum(ours.matched) != expected:
                raise RuntimeError(f"{sum(ours.matched)} of {settings.batch} {kind} requests matched, not {expected}")
            pairs.append((timed[without].seconds[0], ours.seconds[0]))
            costs.append(ours.cost)
            say(f"{kind} {turn + 1}/{settings.pairs}: ratio {pairs[-1][0] / pairs[-1][1]:.3f}")
        ratios = [a / b for a, b in pairs]
        result[f"{kind}_ratio"] = round(statistics.median(ratios), 4)
        result[f"{kind}_pairs"] = [round(r, 4) for r in ratios]
        result[f"{kind}_tokens_per_s"] = {
            "no_plugin": round(generated / statistics.median(a for a, _ in pairs), 1),
            "plugin": round(generated / statistics.median(b for _, b in pairs), 1),
        }
        parts = {key.removesuffix("_s"): statistics.median(c[key] for c in costs) for key in costs[0]}
        result[f"{kind}_step_ms"] = {key: round(value, 3) for key, value in parts.items()}
    result["step_overhead_ms"] = round(sum(result["matched_step_ms"].values()), 3)
    return result


def _first_token(
    settings: Settings,
    engine: _Engine,
    prompts: list[list[int]],
    say: Callable[[str], None],
    name: str,
    warm: bool = False,
) -> float:
    """Time to the first token of matched requests over that of the same requests opted out, one at a time.

    warm: what all prompts begin with is in the prefix cache, their questions are not.
    """
    ratios = []
    for turn in range(settings.pairs + 1):
        medians = {}
        for off in (False, True) if turn % 2 else (True, False):
            if warm:
                engine.run([settings.cached[-1]], 1, off=off)
            done = engine.run(prompts, 1, single=True, warm=warm, off=off)
            if sum(done.matched) != (0 if off else len(prompts)):
                raise RuntimeError(f"{name}: {sum(done.matched)} of {len(prompts)} requests matched, opted out: {off}")
            medians[off] = statistics.median(done.seconds)
        ratios.append(medians[False] / medians[True])
        say(f"first token, {name} {turn}/{settings.pairs}: ratio {ratios[-1]:.3f}")
    return round(statistics.median(ratios[1:]), 4)  # the first turn warms up


def _research(settings: Settings, with_plugin: _Engine, say: Callable[[str], None]) -> dict[str, float]:
    """Tokens per second at full batch over those of the published way: one request at a time through Hugging Face,
    each looked up by float products with all masks."""
    from memoir_vllm.research import ResearchModel

    research = ResearchModel(settings.store, settings.model)
    prompts = [settings.matched[i % len(settings.matched)] for i in range(settings.batch)]
    ratios = []
    for turn in range(RESEARCH_TURNS + 1):
        ours = settings.batch * settings.tokens / with_plugin.run(prompts, settings.tokens).seconds[0]
        theirs = settings.tokens / research.run(prompts[turn % len(prompts)], settings.tokens)
        ratios.append(ours / theirs)
        say(f"against the research way {turn}/{RESEARCH_TURNS}: ratio {ratios[-1]:.1f}")
    return {"vs_research_ratio": round(statistics.median(ratios[1:]), 2)}


def main(argv: Sequence[str]) -> int:
    """`python -m memoir_vllm.bench SETTINGS.json`: progress on stderr, one JSON object on stdout."""
    settings = msgspec.json.decode(Path(argv[0]).read_bytes(), type=Settings)
    print(json.dumps(measure(settings, lambda line: print(line, file=sys.stderr, flush=True))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
