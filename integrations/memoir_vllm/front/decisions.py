"""A request's decision in the API process: kept from its first output on, counted and given away with its last.

The scheduler sends a decision with the first output of a request. The front end may end a request itself, at a stop
string or because its client has left; then nothing more comes from the scheduler. So every last output is made with
what was kept, by a wrapper of `RequestState.make_request_output` (vllm/v1/engine/output_processor.py).

A response has one field for all of its choices. Where these have several decisions, as the answers to several prompts
in one request have, it names them choice by choice under `memoir_choices` instead of `memoir`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memoir_vllm.front.metrics import TRAFFIC
from memoir_vllm.patches import wrap_once

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine import FinishReason
    from vllm.v1.engine.output_processor import RequestState

__all__ = ["choice_decisions", "install", "params_of", "without_decisions"]

Params = dict[str, Any]


def install() -> None:
    """Wrap `RequestState.make_request_output` once; called in a process that has seen a `memoir` section."""
    from vllm.v1.engine.output_processor import RequestState

    wrap_once(RequestState, "make_request_output", _keeping_the_decision)


def _keeping_the_decision(original: Any) -> Any:
    def make_request_output(
        self: RequestState,
        new_token_ids: list[int],
        pooling_output: Any,
        finish_reason: FinishReason | None,
        stop_reason: int | str | None,
        kv_transfer_params: Params | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        decision = (kv_transfer_params or {}).get("memoir")
        if decision is not None:
            self._memoir = decision
        decision = getattr(self, "_memoir", None)
        if decision is not None:
            if finish_reason is not None:
                TRAFFIC.count(self.external_req_id, decision)
            if self.parent_req is not None:
                kv_transfer_params = _among_siblings(self, kv_transfer_params, decision)
            elif finish_reason is not None:
                kv_transfer_params = without_decisions(kv_transfer_params) | {"memoir": decision}
        return original(
            self, new_token_ids, pooling_output, finish_reason, stop_reason, kv_transfer_params, *args, **kwargs
        )

    return make_request_output


def _among_siblings(request: Any, params: Params | None, decision: Params) -> Params:
    """Of a request that samples n answers: each is decided by itself, so a reload may lie between two of them.

    Every output names what is known of all n, since a stream that is read slowly merges the outputs of several, and of
    their params keeps those of the last one (`RequestOutput.add`).
    """
    parent = request.parent_req
    known: dict[int, Params] = parent.__dict__.setdefault("_memoir", {})
    known[request.request_index] = decision
    alike = all(other == decision for other in known.values())
    decisions = {"memoir": decision} if alike else {"memoir_choices": [known.get(n) for n in range(parent.n)]}
    return without_decisions(params) | decisions


def choice_decisions(outputs: Sequence[RequestOutput]) -> list[Params | None]:
    """The decision of each choice of a response.

    outputs: the last one of each prompt, in order.
    """
    decisions: list[Params | None] = []
    for output in outputs:
        params = output.kv_transfer_params or {}
        decisions += params.get("memoir_choices") or [params.get("memoir")] * len(output.outputs)
    return decisions


def params_of(decisions: Sequence[Params | None], prompts: int = 1) -> Params:
    """The part of `kv_transfer_params` for the choices of one response; empty without a decision.

    decisions: of each choice.
    prompts: how many prompts the response is to.
    """
    if all(decision is None for decision in decisions):
        return {}
    if prompts == 1 and all(decision == decisions[0] for decision in decisions):
        return {"memoir": decisions[0]}
    return {"memoir_choices": list(decisions)}


def without_decisions(params: Mapping[str, Any] | None) -> Params:
    """What else is in `kv_transfer_params`.

    params: all of them.
    """
    return {key: value for key, value in (params or {}).items() if not key.startswith("memoir")}
