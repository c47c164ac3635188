"""What a client waits for: `memoir bench latency`.

Percentiles of the time to the first token, of the time between tokens and of the lookup alone, with stores of several
sizes and several requests at a time. A store is made large by random masks beside its own, which no question matches:
the lookup scans them all the same.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from memoir_index import pack
from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.question.tasks import Pooled
from memoir_retrieval.store.read import EditStore
from memoir_retrieval.store.write import write_generation
from memoir_vllm.bench.engine import BenchEngine, EngineFlags, Turn
from memoir_vllm.worker.routing import Router

__all__ = ["LatencySettings", "inflate", "main", "measure"]

LOOKUPS = 200
KINDS = ("no plugin", "unmatched", "matched", "cached")
Say = Callable[[str], None]


class LatencySettings(msgspec.Struct, kw_only=True):
    """What is measured.

    store, model: their folders.
    unmatched, matched: token ids of prompts.
    edits: sizes of stores.
    concurrent: requests at a time.
    dtype, eager: see `EngineFlags`.
    requests: each turn asks at least so many.
    tokens: new ones per request.
    rounds: turns of each kind of request.
    """

    store: str
    model: str
    unmatched: list[list[int]]
    matched: list[list[int]]
    edits: list[int]
    concurrent: list[int]
    dtype: str = "float32"
    eager: bool = True
    requests: int = 16
    tokens: int = 16
    rounds: int = 3


class Percentiles(msgspec.Struct, kw_only=True):
    """Percentiles in milliseconds. what: "first_token", "between_tokens" or "lookup", of one kind of request."""

    what: str
    kind: str
    edits: int
    concurrent: int
    p50: float
    p95: float
    p99: float
    samples: int


def inflate(store: EditStore, folder: Path, edits: int) -> Path:
    """Write a large store: the first edits of another, then random masks of the same size. Returns its folder.

    The edits that are made up lie in the first memory.

    store: the other one, whose memories are kept.
    folder: where.
    edits: how many the new one has.
    """
    manifest = store.manifest
    kept = list(store.edits)[:edits]
    rows = np.isin(store.ids, [edit.id for edit in kept])
    count = edits - len(kept)
    ids = manifest.next_id + np.arange(count)
    dice = np.random.default_rng(0)
    codes = [store.codes[rows]]
    for start in range(0, count, 4096):
        drawn = dice.random((min(4096, count - start), manifest.d), dtype=np.float32)
        mask = np.zeros(drawn.shape, dtype=bool)
        np.put_along_axis(mask, drawn.argpartition(manifest.k, axis=1)[:, : manifest.k], True, axis=1)
        codes.append(pack(mask))
    folder.mkdir(parents=True)
    write_generation(
        folder,
        msgspec.structs.replace(manifest, generation=1, next_id=manifest.next_id + count),
        store.content._replace(
            codes=np.concatenate(codes),
            ids=np.concatenate([store.ids[rows], ids]),
            memory_of=np.concatenate([store.memory_of[rows], np.zeros(count, dtype=np.int32)]),
            edits=_edits(kept, ids.tolist()),
        ),
    )
    return folder


def _edits(kept: Sequence[StoredEdit], ids: Sequence[int]) -> Iterator[StoredEdit]:
    yield from kept
    for number in ids:
        yield StoredEdit(id=number, prompt=f"made up {number}", target="", created="", loss=0.0, steps=0)


def measure(settings: LatencySettings, say: Say = lambda _: None) -> dict[str, Any]:
    """Run everything. Returns `rows` and the settings that made them.

    settings: what is measured.
    say: called with each line of news.

    Raises RuntimeError where requests of a kind did not match as they should.
    """
    rows: list[Percentiles] = []
    store = EditStore.open(settings.store)
    batch = max(settings.concurrent)

    def engine(served: Path | None) -> BenchEngine:
        flags = EngineFlags(
            model=settings.model,
            store=str(served) if served else None,
            dtype=settings.dtype,
            eager=settings.eager,
            batch=batch,
        )
        return BenchEngine(flags)

    with tempfile.TemporaryDirectory() as scratch, engine(None) as without:
        for edits in settings.edits:
            say(f"{edits} edits: writing the store, starting an engine")
            served = inflate(store, Path(scratch) / str(edits), edits)
            rows += lookups(EditStore.open(served), settings.concurrent)
            with engine(served) as with_plugin:
                for concurrent in settings.concurrent:
                    rows += _requests(settings, edits, concurrent, without, with_plugin)
                    say(f"{edits} edits, {concurrent} at a time: done")
    kept = ("edits", "concurrent", "dtype", "eager", "requests", "tokens", "rounds")
    return {"rows": msgspec.to_builtins(rows)} | {key: getattr(settings, key) for key in kept}


def lookups(store: EditStore, concurrent: Sequence[int]) -> list[Percentiles]:
    """From pooled activations to decisions, as many as end in one step; without engine and model."""
    router = Router(store, None, "cpu", lambda ids: "")
    means = torch.randn(max(concurrent), router.d, generator=torch.Generator().manual_seed(0))
    pooled = Pooled(means, torch.ones(len(means)))
    rows = []
    for n in concurrent:
        of_step = pooled.taken(range(n), range(n))
        router.route(of_step, [()] * n)
        taken = []
        for _ in range(LOOKUPS):
            began = time.perf_counter()
            router.route(of_step, [()] * n)
            taken.append(time.perf_counter() - began)
        rows.append(_row("lookup", "unmatched", len(store.edits), n, taken))
    return rows


def _requests(
    settings: LatencySettings, edits: int, concurrent: int, without: BenchEngine, with_plugin: BenchEngine
) -> list[Percentiles]:
    """Alternate turns of all kinds. A cached request is a matched one that was asked in the turn before."""
    count = max(settings.requests, concurrent)
    prompts = {
        kind: [texts[i % len(texts)] for i in range(count)]
        for kind, texts in (("unmatched", settings.unmatched), ("matched", settings.matched))
    }
    turns: dict[str, list[Turn]] = {kind: [] for kind in KINDS}
    for turn in range(settings.rounds + 1):
        turn_by_kind = {
            "no plugin": without.run(prompts["unmatched"], settings.tokens, concurrent=concurrent),
            "unmatched": with_plugin.run(prompts["unmatched"], settings.tokens, concurrent=concurrent),
            "matched": with_plugin.run(prompts["matched"], settings.tokens, concurrent=concurrent),
            "cached": with_plugin.run(prompts["matched"], settings.tokens, concurrent=concurrent, warm=True),
        }
        for kind, done in turn_by_kind.items():
            wanted = count if kind in ("matched", "cached") else 0
            if sum(done.matched) != wanted:
                raise RuntimeError(f"{sum(done.matched)} of {count} {kind} requests matched, not {wanted}")
            if turn:  # the first turn warms up
                turns[kind].append(done)
    rows = []
    for kind, kept in turns.items():
        times = [of_one for turn in kept for of_one in turn.tokens]
        rows.append(_row("first_token", kind, edits, concurrent, [t[0] for t in times]))
        between = [b - a for t in times for a, b in pairwise(t)]
        rows.append(_row("between_tokens", kind, edits, concurrent, between))
    return rows


def _row(what: str, kind: str, edits: int, concurrent: int, seconds: Sequence[float]) -> Percentiles:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    p50, p95, p99 = (round(1e3 * cuts[percentile - 1], 4) for percentile in (50, 95, 99))
    return Percentiles(
        what=what, kind=kind, edits=edits, concurrent=concurrent, p50=p50, p95=p95, p99=p99, samples=len(seconds)
    )


def main(argv: Sequence[str]) -> int:
    """`python -m memoir_vllm.bench.latency SETTINGS.json`: progress on stderr, one JSON object on stdout.

    argv: the file of settings.
    """
    settings = msgspec.json.decode(Path(argv[0]).read_bytes(), type=LatencySettings)
    print(json.dumps(measure(settings, lambda line: print(line, file=sys.stderr, flush=True))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
