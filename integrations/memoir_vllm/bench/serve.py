"""What the plugin costs: `memoir bench serve`.

Throughput is compared with vLLM alone; the time to the first token with that of the same requests opted out; the whole
with the published way of serving edits.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from memoir_vllm.bench.engine import BenchEngine, EngineFlags
from memoir_vllm.bench.research import ResearchModel

__all__ = ["ServeSettings", "main", "measure"]

FIRST = 8  # requests whose time to the first token makes one median
RESEARCH_TURNS = 3
LONG_STEP = 8  # tokens of a step that is shorter than a question
Say = Callable[[str], None]


class ServeSettings(msgspec.Struct, kw_only=True):
    """What is measured.

    store, model: their folders.
    unmatched, matched: token ids of prompts.
    cached: prompts of edits that all begin with one long system message; empty where the store's prompts are raw text.
    dtype, eager: see `EngineFlags`.
    batch: requests of a turn.
    tokens: new ones per request.
    pairs: turns of each kind of request.
    adapter, drafts: see `EngineFlags`. Where one is set, only tokens per second are measured.
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
    adapter: str | None = None
    drafts: int | None = None

    @property
    def plain(self) -> bool:
        """Whether there are neither adapters nor drafts."""
        return self.adapter is None and self.drafts is None

    def flags(self, **more: Any) -> EngineFlags:
        """Of an engine without the plugin.

        more: flags that are other than these settings say.
        """
        return EngineFlags(
            model=self.model,
            dtype=self.dtype,
            eager=self.eager,
            batch=self.batch,
            adapter=self.adapter,
            drafts=self.drafts,
            **more,
        )


def measure(settings: ServeSettings, say: Say = lambda _: None) -> dict[str, Any]:
    """Run everything. Returns the figures that docs/measurements/serving.md explains, and the settings that made them.

    settings: what is measured.
    say: called with each line of news.

    Raises RuntimeError where requests of a kind did not match as they should: the ratio would mean nothing.
    """
    say("starting two engines")
    with BenchEngine(settings.flags()) as without, BenchEngine(settings.flags(store=settings.store)) as with_plugin:
        result = _throughput(settings, without, with_plugin, say)
        if settings.plain:
            result |= _latencies(settings, with_plugin, say)
    if settings.plain:
        say("starting an engine whose steps are too small for a question")
        few = msgspec.structs.replace(settings.flags(store=settings.store), batch=LONG_STEP, budget=LONG_STEP)
        with BenchEngine(few) as small:
            result["ttft_ratio_long"] = _first_token(settings, small, settings.matched[:FIRST], say, "long")
    for key in ("dtype", "eager", "batch", "tokens", "pairs", "drafts"):
        result[key] = getattr(settings, key)
    return result


def _throughput(settings: ServeSettings, without: BenchEngine, with_plugin: BenchEngine, say: Say) -> dict[str, Any]:
    """Tokens per second, the plugin over no plugin, in pairs of turns."""
    result: dict[str, Any] = {}
    generated = settings.batch * settings.tokens
    kinds = [("unmatched", settings.unmatched, 0), ("matched", settings.matched, settings.batch)]
    if settings.adapter is not None:
        kinds.append(("adapter", settings.matched, 0))
    for kind, rows, expected in kinds:
        adapted = kind == "adapter"
        prompts = [rows[i % len(rows)] for i in range(settings.batch)]
        without.run(prompts, settings.tokens, adapted=adapted)  # the first turn of a kind warms up
        with_plugin.run(prompts, settings.tokens, adapted=adapted)
        pairs: list[tuple[float, float]] = []
        costs: list[dict[str, float]] = []
        for turn in range(settings.pairs):
            order = (without, with_plugin) if turn % 2 == 0 else (with_plugin, without)
            timed = {engine: engine.run(prompts, settings.tokens, adapted=adapted) for engine in order}
            ours = timed[with_plugin]
            if sum(ours.matched) != expected:
                raise RuntimeError(f"{sum(ours.matched)} of {settings.batch} {kind} requests matched, not {expected}")
            pairs.append((timed[without].seconds, ours.seconds))
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


def _latencies(settings: ServeSettings, with_plugin: BenchEngine, say: Say) -> dict[str, float]:
    """Ratios of times to the first token, and the ratio to the published way."""
    result = {"ttft_ratio_inline": _first_token(settings, with_plugin, settings.matched[:FIRST], say, "inline")}
    if settings.cached:
        matches = with_plugin.run(settings.cached, 1).matched  # behind such a message not every edit is found
        cached = [prompt for prompt, matched in zip(settings.cached, matches, strict=True) if matched]
        result["ttft_ratio_cached"] = _first_token(settings, with_plugin, cached[:FIRST], say, "cached", warm=True)
    result["vs_research_ratio"] = _research(settings, with_plugin, say)
    return result


def _first_token(
    settings: ServeSettings,
    engine: BenchEngine,
    prompts: list[list[int]],
    say: Say,
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
            done = engine.run(prompts, 1, concurrent=1, warm=warm, off=off)
            if sum(done.matched) != (0 if off else len(prompts)):
                raise RuntimeError(f"{name}: {sum(done.matched)} of {len(prompts)} requests matched, opted out: {off}")
            medians[off] = statistics.median(times[0] for times in done.tokens)
        ratios.append(medians[False] / medians[True])
        say(f"first token, {name} {turn}/{settings.pairs}: ratio {ratios[-1]:.3f}")
    return round(statistics.median(ratios[1:]), 4)  # the first turn warms up


def _research(settings: ServeSettings, with_plugin: BenchEngine, say: Say) -> float:
    """Tokens per second at full batch over those of the published way, see `research.py`."""
    research = ResearchModel(settings.store, settings.model)
    prompts = [settings.matched[i % len(settings.matched)] for i in range(settings.batch)]
    ratios = []
    for turn in range(RESEARCH_TURNS + 1):
        ours = settings.batch * settings.tokens / with_plugin.run(prompts, settings.tokens).seconds
        theirs = settings.tokens / research.run(prompts[turn % len(prompts)], settings.tokens)
        ratios.append(ours / theirs)
        say(f"against the research way {turn}/{RESEARCH_TURNS}: ratio {ratios[-1]:.1f}")
    return round(statistics.median(ratios[1:]), 2)  # the first turn warms up


def main(argv: Sequence[str]) -> int:
    """`python -m memoir_vllm.bench.serve SETTINGS.json`: progress on stderr, one JSON object on stdout.

    argv: the file of settings.
    """
    settings = msgspec.json.decode(Path(argv[0]).read_bytes(), type=ServeSettings)
    print(json.dumps(measure(settings, lambda line: print(line, file=sys.stderr, flush=True))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
