"""Which CUDA graphs a step may replay, asked of vLLM's own dispatchers. None is captured: a CPU has no such graphs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import flags
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.dp_utils import dispatch_cg_and_sync_dp

from memoir_vllm.worker.graphs import keep_full_graphs_from

FULL, PIECEWISE, NONE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE
# What a decode step that has something for the layer to do runs as, where others replay a full graph.
INSTEAD = {
    CUDAGraphMode.FULL_AND_PIECEWISE: PIECEWISE,
    CUDAGraphMode.FULL_DECODE_ONLY: NONE,
    CUDAGraphMode.FULL: NONE,
}
SIZES = [1, 2, 4, 8, 16]


class Layer:
    """allowed: sizes of the full graphs that the coming step may replay."""

    def __init__(self, *allowed: int):
        self.allowed = allowed
        self.replays = False

    def may_replay(self, rows: int) -> bool:
        return rows in self.allowed


@pytest.fixture(params=INSTEAD, ids=lambda mode: mode.name)
def mode(request: pytest.FixtureRequest) -> CUDAGraphMode:
    return request.param


@pytest.fixture
def vllm_config(mode: CUDAGraphMode, model_folder: Path) -> Any:
    config = EngineArgs(**flags(model_folder)).create_engine_config()
    graphs = config.compilation_config
    graphs.cudagraph_mode, graphs.cudagraph_capture_sizes, graphs.max_cudagraph_capture_size = mode, SIZES, SIZES[-1]
    return config


def v2(config: Any, mode: CUDAGraphMode, monkeypatch: pytest.MonkeyPatch, query: int = 1) -> CudaGraphManager:
    """vLLM's manager, as if it had captured its graphs."""
    group = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: group)
    monkeypatch.setattr(type(cudagraph_utils.current_platform), "get_global_graph_pool", lambda self: None)
    manager = CudaGraphManager(config, torch.device("cpu"), mode, decode_query_len=query)
    manager._graphs_captured = True
    return manager


def test_v1_replays_a_full_graph_only_where_it_may(mode: CUDAGraphMode, vllm_config: Any) -> None:
    graphs = vllm_config.compilation_config
    graphs.mode, graphs.splitting_ops = CompilationMode.VLLM_COMPILE, list(graphs._attention_ops)
    dispatcher = CudagraphDispatcher(vllm_config)
    dispatcher.initialize_cudagraph_keys(mode)
    layer = Layer(*SIZES)
    kinds = [{"num_tokens": tokens, "uniform_decode": decode} for tokens in (1, 3, 16, 40) for decode in (True, False)]
    plain = [dispatcher.dispatch(**kind) for kind in kinds]
    assert FULL in {graph for graph, _ in plain}
    keep_full_graphs_from(SimpleNamespace(cudagraph_dispatcher=dispatcher), layer)
    for kind, was in zip(kinds, plain, strict=True):
        assert dispatcher.dispatch(**kind) == was
        assert layer.replays == (was[0] == FULL)
    layer.allowed = (4,)
    for kind, (was, batch) in zip(kinds, plain, strict=True):
        graph, now = dispatcher.dispatch(**kind)
        assert layer.replays == (graph == FULL) == (was == FULL and batch.num_tokens == 4)
        assert graph == (INSTEAD[mode] if was == FULL and not layer.replays else was)
        assert now.num_tokens == (batch.num_tokens if graph != NONE else kind["num_tokens"])
        assert dispatcher.dispatch(**kind, valid_modes={NONE})[0] == NONE
        assert dispatcher.dispatch(**kind, invalid_modes={FULL, PIECEWISE})[0] == NONE


@pytest.mark.parametrize("query", [1, 3], ids=["one token", "with two drafts"])
def test_v2_replays_a_full_graph_only_where_it_may(
    query: int, mode: CUDAGraphMode, vllm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = v2(vllm_config, mode, monkeypatch, query)
    layer = Layer(*range(2 * SIZES[-1]))
    kinds = [(n, n * query, length, 0, length) for n in (1, 3, 5) for length in (query, None)]
    plain = [manager.dispatch(*kind) for kind in kinds]
    assert FULL in {graph.cg_mode for graph in plain}
    keep_full_graphs_from(SimpleNamespace(cudagraph_manager=manager), layer)
    for kind, was in zip(kinds, plain, strict=True):
        assert manager.dispatch(*kind) == was
        assert layer.replays == (was.cg_mode == FULL)
    layer.allowed = ()
    for (requests, tokens, length, _, longest), was in zip(kinds, plain, strict=True):
        graph = manager.dispatch(requests, tokens, length, num_active_loras=0, max_query_len=longest)
        assert not layer.replays
        assert graph.cg_mode == (INSTEAD[mode] if was.cg_mode == FULL else was.cg_mode)
        assert graph.num_tokens >= tokens and graph.uniform_token_count is None
        if graph.cg_mode == NONE:
            assert (graph.num_tokens, graph.num_reqs) == (tokens, requests)


def test_engines_in_step_run_no_graph_where_one_of_them_may_not(
    mode: CUDAGraphMode, vllm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two engines of a mixture of experts agree on one shape. The group is a stand-in: it holds the other's column."""
    from vllm.v1.worker.gpu import dp_utils

    managers = [v2(vllm_config, mode, monkeypatch) for _ in range(2)]
    layers = [Layer(*SIZES), Layer()]
    vllm_config.parallel_config.data_parallel_size = 2
    columns: dict[int, torch.Tensor] = {}
    for manager, layer in zip(managers, layers, strict=True):
        keep_full_graphs_from(SimpleNamespace(cudagraph_manager=manager), layer)

    def step() -> list[Any]:
        graphs = []
        for rank in (0, 1, 0):  # the first engine once more, now that the second has said its own
            graphs.append(agreed(rank))
        return graphs[1:]

    def agreed(rank: int) -> Any:
        def all_reduce(tensor: torch.Tensor, group: Any = None) -> None:
            columns[rank] = tensor[:, rank].clone()
            tensor[:, 1 - rank] = columns.get(1 - rank, columns[rank])

        # vLLM 0.33 asks the group, 0.32 torch.
        group = SimpleNamespace(cpu_group=None, cpu_all_reduce_=all_reduce)
        monkeypatch.setattr(dp_utils, "get_dp_group", lambda: group)
        monkeypatch.setattr(dp_utils, "dist", SimpleNamespace(all_reduce=all_reduce), raising=False)
        return dispatch_cg_and_sync_dp(managers[rank], 3, 3, 1, 2, rank, max_query_len=1)[0]

    assert {graph.cg_mode for graph in step()} == {NONE}
    layers[1].allowed = layers[0].allowed
    columns.clear()
    assert {graph.cg_mode for graph in step()} == {FULL}
