"""Following a model runner through its steps, by wrapping methods of the runner *instance*.

V1 (vllm/v1/worker/gpu_model_runner.py) and V2 (vllm/v1/worker/gpu/model_runner.py) share `execute_model` and
`sample_tokens`; they differ in where the order of the rows is known: `_prepare_inputs` and `prepare_inputs`. The
runner, not the worker, is wrapped because Ray's compiled graphs call it directly (vllm/v1/executor/ray_utils.py).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.sequence import IntermediateTensors
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from memoir_retrieval.question.span import Span
from memoir_vllm.requests import Query, Routed, put_routed, queries_of
from memoir_vllm.worker import pipeline
from memoir_vllm.worker.residual import ResidualLayer
from memoir_vllm.worker.rows import StepRows

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch

__all__ = ["follow", "take_up"]

# V2 warms its kernels up with requests of its own (vllm/v1/worker/gpu/warmup.py), which end before others come.
_WARM_UP = Query(Span(0, 0), off=True)


def follow(runner: Any, layer: ResidualLayer | None) -> str:
    """Have a layer see each step of a runner, and send its decisions along. Returns "V1" or "V2".

    runner: of this worker.
    layer: None on a stage of a pipeline that does not hold the edited layer, which passes on what another has decided.
    """
    version = "V2" if hasattr(runner, "prepare_inputs") else "V1"
    if version == "V1" and runner.device.type == "cpu":
        _keep_draws(runner)
    if layer is not None:
        (_wrap_v2 if version == "V2" else _wrap_v1)(runner, layer)
        _wrap_step(runner, layer)
    _wrap_decisions(runner, layer)
    return version


def _wrap_step(runner: Any, layer: ResidualLayer) -> None:
    execute_model = runner.execute_model

    @functools.wraps(execute_model)
    def execute(scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        take_up(layer, scheduler_output)
        layer.expect(scheduler_output.num_scheduled_tokens)
        try:
            output = execute_model(scheduler_output, *args, **kwargs)
            layer.require_run()
            return output
        finally:
            layer.end_step()

    runner.execute_model = execute


def _wrap_decisions(runner: Any, layer: ResidualLayer | None) -> None:
    """What a step has decided goes with its activations to the next stage, and from the last one with its output."""
    execute_model, sample_tokens = runner.execute_model, runner.sample_tokens
    arrived: dict[str, Routed] = {}

    @functools.wraps(execute_model)
    def execute(
        scheduler_output: SchedulerOutput,
        intermediate_tensors: IntermediateTensors | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        arrived.update(pipeline.unload(intermediate_tensors))
        output = execute_model(scheduler_output, intermediate_tensors, *args, **kwargs)
        if isinstance(output, IntermediateTensors):
            pipeline.load(output, taken(), get_tensor_model_parallel_world_size())
        return output

    @functools.wraps(sample_tokens)
    def sample(*args: Any, **kwargs: Any) -> Any:
        output = sample_tokens(*args, **kwargs)
        if output is None or not (routed := taken()):
            return output
        return _Routed(output, routed) if hasattr(output, "get_output") else put_routed(output, routed)

    def taken() -> dict[str, Routed]:
        routed = arrived | (layer.take_routed() if layer else {})
        arrived.clear()
        return routed

    runner.execute_model, runner.sample_tokens = execute, sample


def take_up(layer: ResidualLayer, step: SchedulerOutput) -> None:
    """Give a layer what a step brings.

    layer: of this worker.
    step: as the scheduler sent it.
    """
    # An id may be finished and given to a new request in the same step: drop first.
    layer.drop(step.finished_req_ids)
    queries = queries_of(step)
    for new in step.scheduled_new_reqs:
        query = queries.get(new.req_id, _WARM_UP) if layer.warms_up else queries[new.req_id]
        layer.admit(new.req_id, new.prompt_token_ids or [], query)
        layer.resume(new.req_id, new.block_ids[0] if new.block_ids else (), new.num_computed_tokens)
    again = step.scheduled_cached_reqs
    if again.resumed_req_ids:
        for request_id, held, tokens in zip(again.req_ids, again.new_block_ids, again.num_computed_tokens, strict=True):
            if request_id in again.resumed_req_ids:
                layer.resume(request_id, held[0] if held else (), tokens)


def _keep_draws(runner: Any) -> None:
    """Let V1 sample the rows of unfinished prompts without their own generators.

    What is sampled there is thrown away, and V1 takes the draw back by `Generator.set_offset`, which a CPU generator
    does not have: a seeded request with a split prompt would stop the engine.
    """
    sample_tokens = runner.sample_tokens

    @functools.wraps(sample_tokens)
    def sample(*args: Any, **kwargs: Any) -> Any:
        generators = runner.input_batch.generators
        unfinished = np.flatnonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs]).tolist()
        kept = {row: generators.pop(row) for row in unfinished if row in generators}
        try:
            return sample_tokens(*args, **kwargs)
        finally:
            generators.update(kept)

    runner.sample_tokens = sample


def _wrap_v1(runner: Any, layer: ResidualLayer) -> None:
    prepare = runner._prepare_inputs

    @functools.wraps(prepare)
    def _prepare_inputs(scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray, *args: Any) -> Any:
        prepared = prepare(scheduler_output, num_scheduled_tokens, *args)
        batch = runner.input_batch
        ids = list(batch.req_ids)
        # The runner's own counts, in the order of its batch; the scheduler's dict has another order.
        edges = np.concatenate(([0], np.cumsum(num_scheduled_tokens)))
        layer.begin_step(StepRows(ids, edges, batch.num_computed_tokens_cpu[: len(ids)].copy()))
        return prepared

    runner._prepare_inputs = _prepare_inputs


def _wrap_v2(runner: Any, layer: ResidualLayer) -> None:
    prepare = runner.prepare_inputs

    @functools.wraps(prepare)
    def prepare_inputs(*args: Any, **kwargs: Any) -> InputBatch:
        batch = prepare(*args, **kwargs)
        ids, n = list(batch.req_ids), len(batch.req_ids)
        layer.begin_step(
            StepRows(ids, batch.query_start_loc_np[: n + 1].copy(), batch.num_computed_tokens_np[:n].copy())
        )
        return batch

    runner.prepare_inputs = prepare_inputs


class _Routed(AsyncModelRunnerOutput):
    """An output that is still on its way, with what its step has decided."""

    def __init__(self, output: AsyncModelRunnerOutput, routed: Mapping[str, Routed]):
        self._output = output
        self._with = routed

    def get_output(self) -> ModelRunnerOutput:
        return put_routed(self._output.get_output(), self._with)

    def get_kv_connector_output(self) -> Any:  # asked for since vLLM 0.33
        return self._output.get_kv_connector_output()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)
