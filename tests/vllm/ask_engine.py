"""One engine in a process of its own, for an environment that must not leak into the tests.

Reads flags and prompts as JSON from stdin; the last line of stdout is the answer. `turns`: asked one after another.
`mixes`: seeds of random mixes, each compared with the reference. `stats`: the answer says the counters, too. These two
are for an engine without a process for its core: `naive`: without what keeps edits out of other requests' blocks.
`full_graphs`: with a stand-in for full CUDA graphs, "product" for graphs with the product, which runs in Triton's
interpreter; "plain" for graphs without it; "unguarded" for those that vLLM replays in every decode step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

import torch
from engines import Engine
from mixes import any_mix, prompts_of

from memoir_retrieval.lookup.reference import EditedModel

ROWS = 64  # the most that a stand-in for a full graph has


def main() -> None:
    order = json.load(sys.stdin)
    if order.get("naive"):
        _leave_the_cache_alone()
    replayed = _stand_in_for_full_graphs(order["full_graphs"]) if "full_graphs" in order else []
    engine = Engine(**order["flags"])
    replayed.clear()  # of the self-test
    try:
        replies, edited = [], 0
        if "mixes" in order:
            store = order["flags"]["additional_config"]["memoir"]["store"]
            reference = EditedModel.open(store, order["flags"]["model"])
            for seed in order["mixes"]:
                how = {"requests": order["requests"], "ends_heard": False}  # no step comes after the last
                edited += any_mix(seed, engine, reference, prompts_of(reference), **how)
        for turn in order.get("turns", [] if "mixes" in order else [order]):
            replies += engine.ask(turn["prompts"], turn.get("options"), **order.get("how", {}))
        answer = {"replies": [dataclasses.asdict(reply) for reply in replies]}
        answer |= {"stats": engine.settled()} if order.get("stats") else {}
        answer |= {"edited": edited, "full_graphs": sum(replayed), "decode_steps": len(replayed)}
    finally:
        engine.close()
    print(json.dumps(answer))


def _leave_the_cache_alone() -> None:
    """Blocks are published before the decision and under the hashes of the base model."""
    from memoir_vllm.core import blocks

    guard = blocks.guard

    def hits_only(manager: Any, *judges: Any) -> None:
        publish = manager.coordinator.cache_blocks
        guard(manager, *judges)
        manager.coordinator.cache_blocks = publish

    blocks.guard, blocks.own = hits_only, lambda *args: None


def _stand_in_for_full_graphs(how: str) -> list[bool]:
    """vLLM replays a full graph in decode steps; what a replay is, here: the model runs without the op's Python, with
    the product that a graph captures or without it.

    The stand-in stands on both sides of our guard: below it, it says FULL as vLLM would; above it, it takes that back
    and makes the op deaf. Returns whether each decode step, from now on, was such a replay.
    """
    from vllm.config import CUDAGraphMode

    if how == "product":
        os.environ["TRITON_INTERPRET"] = "1"
        from memoir_vllm.worker.captured import CapturedProduct
    from memoir_vllm.worker import mixin
    from memoir_vllm.worker.residual import ResidualLayer

    guard, run = mixin.keep_full_graphs_from, ResidualLayer.run
    replayed: list[bool] = []
    full, none = CUDAGraphMode.FULL, CUDAGraphMode.NONE
    deaf = False

    def stand_in(runner: Any, layer: ResidualLayer) -> None:
        v2 = hasattr(runner, "cudagraph_manager")
        owner = runner.cudagraph_manager if v2 else runner.cudagraph_dispatcher
        vllms = owner.dispatch

        def below(*args: Any, **kwargs: Any) -> Any:
            graph = vllms(*args, **kwargs)
            if v2:
                return dataclasses.replace(graph, cg_mode=full) if args[2] == 1 else graph
            allowed = full not in (kwargs.get("invalid_modes") or ()) and not kwargs.get("valid_modes")
            return (full, graph[1]) if kwargs["uniform_decode"] and allowed else graph

        def above(*args: Any, **kwargs: Any) -> Any:
            nonlocal deaf
            graph = owner.guarded(*args, **kwargs)
            deaf = (graph.cg_mode if v2 else graph[0]) == full
            if args[2] == 1 if v2 else kwargs["uniform_decode"]:
                replayed.append(deaf)
            if not deaf:
                return graph
            return dataclasses.replace(graph, cg_mode=none) if v2 else (none, graph[1])

        owner.dispatch = below
        if how == "product":
            layer.captured = CapturedProduct(ROWS, "cpu")
            layer.captured.sizes.update(range(ROWS + 1))
        if how != "unguarded":
            guard(runner, layer)
        owner.guarded, owner.dispatch = owner.dispatch, above

    def run_unless_replayed(layer: ResidualLayer, x: torch.Tensor, y: torch.Tensor, *args: Any) -> None:
        if not deaf:
            run(layer, x, y, *args)
        elif layer.captured is not None:
            layer.captured.add(x, y)

    mixin.keep_full_graphs_from, ResidualLayer.run = stand_in, run_unless_replayed
    return replayed


if __name__ == "__main__":
    main()
