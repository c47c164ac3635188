"""Decisions on their way through the scheduler, over a stand-in for vLLM's (the real ones run in test_engine.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from memoir_vllm.requests import Decision, put_decisions
from memoir_vllm.scheduler import MemoirAsyncScheduler, MemoirScheduler, _Decisions

MATCHED = Decision(5, 0.75, "matched", 3)
SAID = {"edit": 5, "overlap": 0.75, "result": "matched", "generation": 3}


class Stock:
    """What of vLLM's scheduler the mixin builds on. `finishing`: requests that the next step ends."""

    def __init__(self) -> None:
        self.requests = {name: SimpleNamespace(request_id=name, is_finished=lambda: False) for name in "ab"}
        self.finishing: list[str] = []
        self.kv_params: dict[str, Any] | None = None

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> list[Any]:
        return [self._free_request(self.requests.pop(name)) for name in self.finishing]

    def _free_request(self, request: Any, delay_free_blocks: bool = False) -> tuple[Any, Any]:
        return self.kv_params, None


class Following(_Decisions, Stock):
    pass


@pytest.fixture
def scheduler() -> Following:
    return Following()


def step(scheduler: Following, **decisions: Decision) -> Any:
    return scheduler.update_from_output(None, put_decisions(SimpleNamespace(), decisions))  # type: ignore[arg-type]


def test_ours_are_vllms() -> None:
    assert issubclass(MemoirScheduler, Scheduler) and not issubclass(MemoirScheduler, AsyncScheduler)
    assert issubclass(MemoirAsyncScheduler, AsyncScheduler)


def test_a_decision_waits_for_its_request_to_finish(scheduler: Following) -> None:
    step(scheduler, a=MATCHED)
    scheduler.finishing = ["a"]
    assert scheduler.update_from_output(None, SimpleNamespace()) == [({"memoir": SAID}, None)]


def test_a_request_may_finish_in_the_step_that_decides_it(scheduler: Following) -> None:
    scheduler.finishing = ["a", "b"]
    assert step(scheduler, a=MATCHED) == [({"memoir": SAID}, None), (None, None)]


def test_other_parameters_stay(scheduler: Following) -> None:
    scheduler.kv_params, scheduler.finishing = {"remote": 1}, ["a"]
    assert step(scheduler, a=MATCHED) == [({"remote": 1, "memoir": SAID}, None)]


def test_late_decisions_of_aborted_requests_are_not_kept(scheduler: Following) -> None:
    del scheduler.requests["a"]
    scheduler.requests["b"].is_finished = lambda: True
    step(scheduler, a=MATCHED, b=MATCHED)
    assert scheduler._memoir == {}
