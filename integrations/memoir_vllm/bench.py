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

__all__ = ["Settings", "main", "measure"]

START_TIMEOUT = 900.0


class Settings(msgspec.Struct, kw_only=True):
    """What is measured: `pairs` turns of `batch` requests of `tokens` new tokens each, per kind of request."""

    store: str
    model: str
    unmatched: list[list[int]]
    matched: list[list[int]]
    dtype: str = "float32"
    eager: bool = True
    batch: int = 32
    tokens: int = 64
    pairs: int = 7
    max_model_len: int = 1024


class _Engine:
    """One vLLM engine in a process of its own, stopped unless it has the turn."""

    def __init__(self, settings: Settings, plugin: bool):
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, msgspec.to_builtins(settings), plugin), daemon=True
        )
        self._process.start()
        theirs.close()
        self._receive(START_TIMEOUT)
        self._signal(signal.SIGSTOP)

    def run(self, kind: str) -> tuple[float, int]:
        """One turn: (seconds, requests that matched an edit)."""
        self._signal(signal.SIGCONT)
        self._pipe.send(kind)
        seconds, matched = self._receive(START_TIMEOUT)
        self._signal(signal.SIGSTOP)
        return seconds, matched

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


def _serve(pipe: Connection, raw: dict[str, Any], plugin: bool) -> None:
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
        max_num_batched_tokens=max(2048, settings.max_model_len),
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        additional_config={"memoir": {"store": settings.store}} if plugin else {},
        seed=0,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=settings.tokens, ignore_eos=True)
    work = {"unmatched": settings.unmatched, "matched": settings.matched}
    prompts = {
        kind: [{"prompt_token_ids": rows[i % len(rows)]} for i in range(settings.batch)] for kind, rows in work.items()
    }
    pipe.send("ready")
    while True:
        kind = pipe.recv()
        started = time.perf_counter()
        done = llm.generate(prompts[kind], sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        told = [(out.kv_transfer_params or {}).get("memoir", {}) for out in done]
        pipe.send((seconds, sum(t.get("result") == "matched" for t in told)))


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
    """Run the pairs. Returns `unmatched_ratio` and `matched_ratio` (plugin over no plugin, medians of pairs in
    tokens/s), every pair's ratio, both speeds, and the settings that made them.

    Raises RuntimeError where requests of a kind did not match as they should: the ratio would mean nothing.
    """
    result: dict[str, Any] = {}
    generated = settings.batch * settings.tokens
    say("starting two engines")
    with _engines(settings) as (without, with_plugin):
        for kind, expected in (("unmatched", 0), ("matched", settings.batch)):
            without.run(kind)  # the first turn of a kind warms up
            with_plugin.run(kind)
            pairs: list[tuple[float, float]] = []
            for turn in range(settings.pairs):
                order = (without, with_plugin) if turn % 2 == 0 else (with_plugin, without)
                timed = {engine: engine.run(kind) for engine in order}
                matched = timed[with_plugin][1]
                if matched != expected:
                    raise RuntimeError(f"{matched} of {settings.batch} {kind} requests matched an edit, not {expected}")
                pairs.append((timed[without][0], timed[with_plugin][0]))
                say(f"{kind} {turn + 1}/{settings.pairs}: ratio {pairs[-1][0] / pairs[-1][1]:.3f}")
            ratios = [a / b for a, b in pairs]
            result[f"{kind}_ratio"] = round(statistics.median(ratios), 4)
            result[f"{kind}_pairs"] = [round(r, 4) for r in ratios]
            result[f"{kind}_tokens_per_s"] = {
                "no_plugin": round(generated / statistics.median(a for a, _ in pairs), 1),
                "plugin": round(generated / statistics.median(b for _, b in pairs), 1),
            }
    for key in ("dtype", "eager", "batch", "tokens", "pairs"):
        result[key] = getattr(settings, key)
    return result


def main(argv: Sequence[str]) -> int:
    """`python -m memoir_vllm.bench SETTINGS.json`: progress on stderr, one JSON object on stdout."""
    settings = msgspec.json.decode(Path(argv[0]).read_bytes(), type=Settings)
    print(json.dumps(measure(settings, lambda line: print(line, file=sys.stderr, flush=True))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
