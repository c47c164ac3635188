"""Schedulers that carry the workers' decisions to the response (vllm/v1/core/sched/scheduler.py).

Delivered by name through `SchedulerConfig.scheduler_cls`. In mode `single` nothing is scheduled differently: the
workers decide and apply in one step, and the scheduler only learns of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from memoir_vllm.requests import Decision, decisions_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

__all__ = ["MemoirAsyncScheduler", "MemoirScheduler"]


class _Decisions:
    """Mixin in front of a vLLM scheduler: keeps each live request's decision, returns it when it is freed."""

    requests: dict[str, Request]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._memoir: dict[str, Decision] = {}

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        # Before the stock code, which frees the requests that finish in this very step.
        for request_id, decision in decisions_of(model_runner_output).items():
            request = self.requests.get(request_id)
            if request is not None and not request.is_finished():
                self._memoir[request_id] = decision
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Adds to the KV transfer parameters: the one free-form dict that travels from here to the response."""
        kv_params, ec_params = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        decision = self._memoir.pop(request.request_id, None)
        if decision is not None:
            kv_params = {**(kv_params or {}), "memoir": msgspec.to_builtins(decision)}
        return kv_params, ec_params


class MemoirScheduler(_Decisions, Scheduler):
    """vLLM's scheduler, with decisions."""


class MemoirAsyncScheduler(_Decisions, AsyncScheduler):
    """vLLM's scheduler for steps in flight, with decisions."""
