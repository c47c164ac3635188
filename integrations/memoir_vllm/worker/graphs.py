"""Which CUDA graphs a step may replay.

A full graph's replay runs no Python, so it is right for steps in which nothing is looked up: decode steps, with the
product of `captured.py` in the graph where an edit acts. Every other step runs as if there were no full graphs:
piecewise where vLLM has captured that, else without graphs.

V1 asks `CudagraphDispatcher.dispatch` (vllm/v1/cudagraph_dispatcher.py), V2 `CudaGraphManager.dispatch`
(vllm/v1/worker/gpu/cudagraph_utils.py). Where a vLLM asks neither, `ResidualLayer.require_run` stops the engine.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.config import CUDAGraphMode

if TYPE_CHECKING:
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

    from memoir_vllm.worker.residual import ResidualLayer

__all__ = ["keep_full_graphs_from"]


def keep_full_graphs_from(runner: Any, layer: ResidualLayer) -> None:
    """Have a runner replay full graphs only in steps for which the layer lets it.

    runner: of this worker, once its KV cache is there: V2 then has a new `cudagraph_manager`.
    layer: of this worker.
    """
    if hasattr(runner, "cudagraph_manager"):
        _guard_v2(runner.cudagraph_manager, layer)
    else:
        _guard_v1(runner.cudagraph_dispatcher, layer)


def _guard_v1(dispatcher: CudagraphDispatcher, layer: ResidualLayer) -> None:
    choose = dispatcher.dispatch

    @functools.wraps(choose)
    def dispatch(*args: Any, invalid_modes: Any = None, **kwargs: Any) -> Any:
        graph, batch = choose(*args, invalid_modes=invalid_modes, **kwargs)
        layer.replays = graph == CUDAGraphMode.FULL and layer.may_replay(batch.num_tokens)
        if graph == CUDAGraphMode.FULL and not layer.replays:
            graph, batch = choose(*args, invalid_modes={CUDAGraphMode.FULL, *(invalid_modes or ())}, **kwargs)
        return graph, batch

    dispatcher.dispatch = dispatch


def _guard_v2(manager: CudaGraphManager, layer: ResidualLayer) -> None:
    choose = manager.dispatch

    @functools.wraps(choose)
    def dispatch(
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        num_active_loras: int,
        *args: Any,
        **kwargs: Any,
    ) -> BatchExecutionDescriptor:
        graph = choose(num_reqs, num_tokens, uniform_token_count, num_active_loras, *args, **kwargs)
        layer.replays = graph.cg_mode == CUDAGraphMode.FULL and layer.may_replay(graph.num_tokens)
        if graph.cg_mode != CUDAGraphMode.FULL or layer.replays:
            return graph
        if manager.dp_size == 1:
            # As for a step with a prefill, which no graph of decode steps takes.
            graph = choose(num_reqs, num_tokens, None, num_active_loras)
        # Engines that go in step would pad to another engine's graph. If one of them uses none, vLLM has none use any.
        if graph.cg_mode == CUDAGraphMode.FULL:
            return replace(
                graph,
                cg_mode=CUDAGraphMode.NONE,
                num_tokens=num_tokens,
                num_reqs=num_reqs,
                uniform_token_count=None,
                max_query_len=None,
            )
        return graph

    manager.dispatch = dispatch
