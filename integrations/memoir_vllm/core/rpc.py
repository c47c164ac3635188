"""The engine core (vllm/v1/engine/core.py): what an RPC to the workers has to tell the scheduler beside them.

`EngineCore.collective_rpc` runs in the loop that also schedules, so nothing is scheduled between the moment in which
the workers adopt a generation and the moment in which the scheduler knows.

No worker's method of ours raises. vLLM reads no further answer after the first failed one
(vllm/v1/executor/multiproc_executor.py), so the answers of the other ranks would be taken for those of the next call,
and of every later one. A worker returns its reason as text, and it is raised here. What our workers refuse of vLLM's
own calls is refused here before they hear of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from memoir_retrieval.errors import StoreError
from memoir_vllm import refusals
from memoir_vllm.patches import wrap_once

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore

__all__ = ["LOADS", "install"]

LOADS = "requests wait for offloaded blocks of the generation that is served: reload again"
"""Why a reload is refused for a moment (`scheduler.memoir_loads`)."""


def install() -> None:
    """Wrap `EngineCore.collective_rpc` and `sleep` once, in a process that holds one of our schedulers."""
    from vllm.v1.engine.core import EngineCore

    wrap_once(EngineCore, "collective_rpc", _beside_the_scheduler)
    wrap_once(EngineCore, "sleep", _refusing)


def _beside_the_scheduler(original: Any) -> Any:
    def collective_rpc(
        self: EngineCore,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        if isinstance(method, str):
            _refuse(_call(method, args, kwargs or {}))
        if method == "memoir_reload" and self.scheduler.memoir_loads(*args, **(kwargs or {})):
            raise StoreError(LOADS)
        results = original(self, method, timeout, args, kwargs)
        if method in ("memoir_reload", "memoir_stats"):  # only one stage of a pipeline has something to say
            results = [result for result in results if result is not None]
        if method == "memoir_reload":
            if refusals := [result for result in results if isinstance(result, str)]:
                raise StoreError(refusals[0])
            self.scheduler.memoir_adopted(results[0], *args, **(kwargs or {}))
        elif method == "memoir_stats":
            results = [result | self.scheduler.memoir_stats() for result in results]
        return results

    return collective_rpc


def _refusing(original: Any) -> Any:
    def sleep(self: EngineCore, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        _refuse(f"sleep level {level}")  # the original would stop scheduling before the workers refuse
        return original(self, level, *args, **kwargs)

    return sleep


def _call(method: str, args: tuple, kwargs: dict[str, Any]) -> str:
    """As `refusals.refusal_of` names it."""
    given = args[0] if args else next(iter(kwargs.values()), None)
    if method == "sleep":
        return f"sleep level {1 if given is None else given}"
    if method == "discard" and "weights" in (given or ()):
        return "discard of weights"
    return method


def _refuse(call: str) -> None:
    if refusal := refusals.refusal_of(call):
        raise RuntimeError(refusal)
