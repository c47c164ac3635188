"""What a step costs in Python and in arithmetic, without an engine: microseconds, medians.

    python benchmarks/step_cost.py [--device cuda] [--layer llama-3-8b] [--dtype bfloat16] [--edits N] [REQUESTS ...]

Random masks and activations; the layer of SmolLM2-135M, one CPU thread and float32 unless said otherwise. `routing` is
the step in which all requests ask their question of 12 tokens: pooled, looked up, and, where it matches, edited. The
others are of a decode step: `rows` is what is done to find the rows of each request and the edits that act on them,
`arithmetic` the masked product alone, `sums` what the span rule `all` adds. A GPU is waited for at the end of each,
which is counted; `device` is the time that the decode step takes on its own clock, where it never waits for the host.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from memoir_retrieval.model.forward import span_mean
from memoir_retrieval.question.fingerprint import Fingerprint
from memoir_retrieval.question.span import Span, SpanRule
from memoir_retrieval.store.read import EditStore, Masks
from memoir_vllm.requests import Query
from memoir_vllm.worker.block_sums import BlockSums
from memoir_vllm.worker.residual import ResidualLayer
from memoir_vllm.worker.routing import Router
from memoir_vllm.worker.rows import StepRows

LAYERS = {"smollm2-135m": (1536, 576, 438), "llama-3-8b": (14336, 4096, 4096)}  # D, H, k
TOKENS, STEPS = 12, 300


class Bench(NamedTuple):
    """What is measured: a layer of `LAYERS`, on a device, with so many edits."""

    d: int
    h: int
    k: int
    edits: int
    device: str
    dtype: torch.dtype

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def layer(self) -> tuple[ResidualLayer, torch.Tensor]:
        """A layer with a store, and for each of its edits the activations of a question: [edits, TOKENS, D]."""
        questions = self.random(self.edits, TOKENS, self.d)
        background, permutation = np.zeros(self.d, dtype=np.float32), np.random.default_rng(0).permutation(self.d)
        rule = SpanRule(weighted=True)
        means = torch.stack([span_mean(question, Span(0, TOKENS, rule.weighted)) for question in questions])
        fields: dict[str, Any] = {
            "generation": 1,
            "sha256": "1" * 64,
            "span": rule,
            "chat": False,
            "d": self.d,
            "h": self.h,
            "k": self.k,
            "tau": 0.9,
            "judge": "",
            "masked_contexts": (),
        }
        store = EditStore(
            path=Path(),
            manifest=SimpleNamespace(**fields),  # type: ignore[arg-type]
            memories=np.random.default_rng(1).standard_normal((1, self.h, self.d), dtype=np.float32),
            background=background,
            permutation=permutation,
            masks=Masks(
                Fingerprint(background, permutation, self.k, self.device).codes(means),
                np.arange(self.edits),
                np.zeros(self.edits, dtype=np.int32),
            ),
            edits=(),
        )
        router, memories = Router(store, None, self.device, lambda ids: ""), torch.from_numpy(store.memories)
        return ResidualLayer(router, memories, dtype=self.dtype, device=self.device), questions

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def median_us(self, run: Callable[[int], Any], before: Callable[[], Any] = lambda: None) -> float:
        """before: done before each run and not counted."""
        taken = []
        for step in range(STEPS):
            before()
            self.wait()
            began = time.perf_counter()
            run(step)
            self.wait()
            taken.append(time.perf_counter() - began)
        return 1e6 * statistics.median(taken)

    def device_us(self, run: Callable[[int], Any]) -> float:
        """Time of the device itself: steps that are queued behind a long product, so that it never waits for us."""
        if self.device == "cpu":
            return float("nan")
        busy = torch.randn(8192, 8192, device=self.device)
        taken = []
        for step in range(STEPS // 10):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.mm(busy, busy)
            start.record()
            run(step)
            end.record()
            self.wait()
            taken.append(start.elapsed_time(end))
        return 1e3 * statistics.median(taken)


def steps(bench: Bench, n: int, kind: str) -> dict[str, float]:
    """kind: what the n requests match: "nothing", "one edit", or "different edits"."""
    layer, questions = bench.layer()
    ids = [f"request-{i}" for i in range(n)]
    chosen = [0 if kind == "one edit" else i % bench.edits for i in range(n)]
    x = bench.random(n, TOKENS, bench.d) if kind == "nothing" else questions[chosen]
    x, y = x.reshape(-1, bench.d), bench.random(n * TOKENS, bench.h)
    asking = StepRows(ids, np.arange(n + 1) * TOKENS, np.zeros(n, dtype=np.int64))

    def ask_again() -> None:
        layer.drop(ids)
        for name in ids:
            layer.admit(name, [5] * TOKENS, Query(Span(0, TOKENS, True)))
            layer.resume(name, (), 0)

    def ask(_: int) -> None:
        layer.begin_step(asking)
        layer.run(x, y)

    microseconds = {"routing": bench.median_us(ask, ask_again)}
    stats = layer.stats()
    assert stats["matched"] == (0 if kind == "nothing" else stats["routed"])
    edges = np.arange(n + 1)
    x, y = bench.random(n, bench.d), bench.random(n, bench.h)
    rows = bench.median_us(lambda step: layer.begin_step(StepRows(list(ids), edges.copy(), np.full(n, TOKENS + step))))
    run = bench.median_us(lambda _: layer.run(x, y))
    microseconds["rows"] = rows + run
    if kind != "nothing":
        mask, index, memory = (
            bench.random(n, bench.d).sign(),
            torch.arange(n, device=bench.device),
            layer.now.memories[0],
        )
        microseconds["arithmetic"] = bench.median_us(lambda _: y.index_add_(0, index, memory(x[index] * mask)))
        microseconds["rows"] -= microseconds["arithmetic"]
        microseconds["device"] = bench.device_us(lambda _: layer.run(x, y))
    return microseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", nargs="*", type=int, default=[32, 256])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layer", choices=list(LAYERS), default="smollm2-135m")
    parser.add_argument("--edits", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(*LAYERS[options.layer], options.edits, options.device, getattr(torch, options.dtype))
    result: dict[str, Any] = {"torch": torch.__version__}
    if options.device != "cpu":
        result["device"] = torch.cuda.get_device_name(options.device)
    with torch.inference_mode():
        for n in options.requests:
            timings = {kind: steps(bench, n, kind) for kind in ("nothing", "one edit", "different edits")}
            sums, slots = BlockSums(1000, 16, bench.d, bench.device), torch.arange(n, device=bench.device) * 16 + 3
            x = bench.random(n, bench.d)
            weights, begins = torch.ones(n, device=bench.device), np.ones(n, dtype=np.bool_)
            add = partial(sums.add, x, weights, slots, begins)
            timings["all"] = {"sums": bench.median_us(lambda _, add=add: add())}
            result[str(n)] = {
                kind: {part: round(us, 1) for part, us in parts.items() if us == us} for kind, parts in timings.items()
            }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
