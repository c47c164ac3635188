"""What a decode step costs in Python and in arithmetic, without an engine: microseconds, medians.

    python benchmarks/step_cost.py [--threads N] [--dtype bfloat16] [REQUESTS ...]

Layer of SmolLM2-135M (D 1536, H 576), random masks; one thread and float32 unless said otherwise. `rows` is what is
done to find the rows of each request and the edits that act on them; `arithmetic` is the masked product alone; `sums`
is what the span rule `all` adds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from memoir_retrieval.fingerprint import Fingerprint
from memoir_retrieval.span import SpanRule
from memoir_retrieval.store import EditStore, Masks
from memoir_vllm.residual import ResidualLayer
from memoir_vllm.routing import Router
from memoir_vllm.rows import Step
from memoir_vllm.sums import BlockSums

D, H, K, EDITS, STEPS = 1536, 576, 438, 100, 300


def served() -> tuple[EditStore, torch.Tensor]:
    """A store, and for each of its edits the activations of a question of four tokens: float32 [EDITS, 4, D]."""
    asked = torch.randn(EDITS, 4, D, generator=torch.Generator().manual_seed(0))
    background, permutation = np.zeros(D, dtype=np.float32), np.random.default_rng(0).permutation(D)
    fields: dict[str, Any] = {"generation": 1, "span": SpanRule(rule="all"), "d": D, "h": H, "k": K, "tau": 0.9}
    store = EditStore(
        path=Path(),
        manifest=SimpleNamespace(**fields),  # type: ignore[arg-type]
        memories=np.random.default_rng(1).standard_normal((1, H, D), dtype=np.float32),
        background=background,
        permutation=permutation,
        masks=Masks(
            Fingerprint(background, permutation, K).codes(asked.mean(1)),
            np.arange(EDITS),
            np.zeros(EDITS, dtype=np.int32),
        ),
        edits=(),
    )
    return store, asked


def median_us(run: Callable[[int], Any]) -> float:
    taken = []
    for step in range(STEPS):
        began = time.perf_counter()
        run(step)
        taken.append(time.perf_counter() - began)
    return 1e6 * statistics.median(taken)


def decode(n: int, matched: bool, dtype: torch.dtype) -> dict[str, float]:
    store, asked = served()
    layer = ResidualLayer(Router(store, None, "cpu"), torch.from_numpy(store.memories), dtype=dtype)
    ids = [f"request-{i}" for i in range(n)]
    for name in ids:
        layer.admit(name, [5] * 4, None)
    x = torch.stack([asked[i % EDITS] for i in range(n)]) if matched else torch.randn(n, 4, D)
    layer.begin_step(Step(ids, np.arange(n + 1) * 4, np.zeros(n, dtype=np.int64)))
    layer.run(x.reshape(-1, D).to(dtype), torch.zeros(4 * n, H, dtype=dtype))
    assert layer.stats()["matched"] == (n if matched else 0)
    x, y, edges = torch.randn(n, D).to(dtype), torch.zeros(n, H, dtype=dtype), np.arange(n + 1)
    rows = median_us(lambda step: layer.begin_step(Step(list(ids), edges.copy(), np.full(n, 4 + step))))
    run = median_us(lambda _: layer.run(x, y))
    found = {"rows": rows + run}
    if matched:
        mask, index, memory = torch.rand(n, D).round().to(dtype), torch.arange(n), layer.now.memories[0]
        found["arithmetic"] = median_us(lambda _: y.index_add_(0, index, memory(x[index] * mask)))
        found["rows"] -= found["arithmetic"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", nargs="*", type=int, default=[32, 256])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dtype = getattr(torch, given.dtype)
    result = {}
    for n in given.requests:
        sums, slots = BlockSums(1000, 16, D, "cpu"), torch.arange(n) * 16 + 3
        x = torch.randn(n, D).to(dtype)
        made = {"unmatched": decode(n, False, dtype), "matched": decode(n, True, dtype)}
        made["all"] = {"sums": median_us(lambda _, s=sums, x=x, at=slots: s.add(x, at))}
        result[n] = {kind: {part: round(us, 1) for part, us in parts.items()} for kind, parts in made.items()}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
