"""Scheduling around decisions (vllm/v1/core/sched/scheduler.py). Delivered by name through `scheduler_cls`.

Mode `inline`: a question passes in one step, which looks it up and applies the edit at once, while everything before
it is split and cached as usual. Until the workers' decision is back, a request takes no cached block of its question
and publishes none (`blocks.py`). A question too long for a step passes in several, as the base model's; where it
matches, the request is preempted and computed once more with its edit. So is, under the span rule `all`, one that
found the beginning of its question in the cache, whose sums the workers keep (`sums.py`).

Mode `single`: prompts are neither split nor cached, so nothing is scheduled differently.
"""

from __future__ import annotations

import time
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
from cachetools import LRUCache
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from memoir_retrieval.errors import ConfigError
from memoir_retrieval.question.span import Span
from memoir_vllm import config
from memoir_vllm.core import blocks
from memoir_vllm.core import rpc as core
from memoir_vllm.requests import Routed, parse_options, put_routed, routed_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

__all__ = ["MemoirAsyncScheduler", "MemoirScheduler"]

# Decisions that are remembered by prompt: about 200 bytes each.
REMEMBERED = 10_000


class _Question(NamedTuple):
    """Of a request that is not decided yet.

    long: it passes without its edit, in several steps or from the cache on; the workers judge alike. prompt: what its
    decision depends on, None where that is not known here.
    """

    span: Span
    long: bool
    prompt: bytes | None


class _Decisions:
    """Mixin in front of a vLLM scheduler."""

    requests: dict[str, Request]
    vllm_config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._routed: dict[str, Routed] = {}
        self._questions: dict[str, _Question] = {}
        self._passing: dict[bytes, str] = {}  # by prompt, the request that asks a long question first
        # Decided on arrival, with what they would be without that: the workers have not heard of them yet.
        self._early: dict[str, _Question] = {}
        self._generation = 0
        self._remembered: LRUCache[bytes, Routed] = LRUCache(REMEMBERED)
        ours = config.section_of(self.vllm_config)
        self._inline = ours is not None and ours.mode == "inline"
        core.install()
        if self._inline:
            self._rule = config.span_rule(self.vllm_config)
            self._longest = config.longest_question(self.vllm_config)
            groups = len(self.kv_cache_config.kv_cache_groups)  # type: ignore[attr-defined]
            self._sums = config.keeps_sums(self.vllm_config, groups)
            blocks.install()
            blocks.guard(self.kv_cache_manager, self._boundary, self._found)  # type: ignore[attr-defined]

    # ---- before the decision ---------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        if self._inline and request.request_id not in self.requests:
            self._arrive(request)
        super().add_request(request)  # type: ignore[misc]

    def _arrive(self, request: Request) -> None:
        prompt = request.prompt_token_ids or []
        try:
            options = parse_options(request.sampling_params and request.sampling_params.extra_args, len(prompt))
        except ConfigError:  # the worker serves it as the base model and says so, see ResidualLayer.admit
            return
        span = options.span_of(prompt, self._rule)
        if options.off or span.start == span.end:
            return
        # Who asks for the nearest edits is always looked up: a decision is remembered without them.
        prompt_key = None if options.nearest else _prompt_key(request, span)
        question = self._questions[request.request_id] = _Question(span, self._too_long(span), prompt_key)
        self._recall(request, question)

    def _recall(self, request: Request, question: _Question) -> bool:
        """Settle a request that has not begun, where its prompt was decided before. Returns whether it was."""
        known = self._remembered.get(question.prompt) if question.prompt else None
        if known is None:
            return False
        self._decided(request.request_id)
        self._early[request.request_id] = question
        self._settle(request, question.span, known)
        return True

    def _decided(self, request_id: str) -> _Question | None:
        question = self._questions.pop(request_id, None)
        if question is not None and question.prompt is not None:
            self._passing.pop(question.prompt, None)
        return question

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Whether a request that waits may be scheduled; the others do not wait for it."""
        ready: bool = super()._handle_blocked_waiting_request(request)  # type: ignore[misc]
        return ready and not self._twin_passes(request)

    def _twin_passes(self, request: Request) -> bool:
        """Whether a request does better to begin later: its long question is being passed by another already."""
        question = self._questions.get(request.request_id)
        if question is None or question.prompt is None or not question.long or request.status != RequestStatus.WAITING:
            return False
        first = self.requests.get(self._passing.get(question.prompt, ""))
        if first is not None and first is not request and first.status == RequestStatus.RUNNING:
            return True
        self._passing[question.prompt] = request.request_id
        return False

    def _boundary(self, request: Request) -> int | None:
        question = self._questions.get(request.request_id)
        return None if question is None else question.span.start

    def _found(self, request: Request) -> int | None:
        """Asked of a request that is about to begin."""
        question = self._questions.get(request.request_id)
        if question is None:
            return None
        if request.status == RequestStatus.WAITING and self._recall(request, question):  # decided while it waited
            return None
        start, end = question.span[:2]
        return end - 1 if self._sums and start == 0 else start

    def _too_long(self, span: Span) -> bool:
        return span.end - span.start > self._longest

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """The last word on how many tokens a request gets in a step; 0 lets it wait for the next."""
        tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)  # type: ignore[misc]
        question = self._questions.get(request.request_id)
        if question is None or num_computed_tokens >= question.span.end:
            return tokens
        start, end = question.span[:2]
        long = self._too_long(question.span) or start < num_computed_tokens
        if long != question.long:
            question = self._questions[request.request_id] = question._replace(long=long)
        if long:
            return tokens
        if num_computed_tokens <= start < num_computed_tokens + tokens < end:
            return start - num_computed_tokens
        return tokens

    # ---- the decision ----------------------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        begun = [new.req_id for new in output.scheduled_new_reqs] + list(output.scheduled_cached_reqs.resumed_req_ids)
        for request_id in begun:
            self._early.pop(request_id, None)
        known = {request_id: self._routed[request_id] for request_id in begun if request_id in self._routed}
        return put_routed(output, known) if known else output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        # Before the stock code, which frees the requests that finish in this very step.
        for request_id, routed in routed_of(model_runner_output).items():
            request = self.requests.get(request_id)
            if request is None or request.is_finished():
                continue
            question = self._decided(request_id)
            if question is None:  # the worker knew without a lookup
                self._routed[request_id] = routed
                continue
            self._settle(request, question.span, routed)
            if question.prompt is not None and routed.decision.generation >= self._generation:
                self._remembered[question.prompt] = routed
            if question.long and routed.row >= 0:
                self._start_over(request)
            elif request.status == RequestStatus.RUNNING:
                self._publish(request)
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]

    def _settle(self, request: Request, span: Span, routed: Routed) -> None:
        self._routed[request.request_id] = routed
        if routed.row >= 0:
            name = f"{routed.store}:{routed.decision.generation}:{routed.row}"
            blocks.own(request, name, span.acts_from, self.hash_block_size)  # type: ignore[attr-defined]

    def _publish(self, request: Request) -> None:
        """What `allocate_slots` would have published before the forward."""
        computed = request.num_computed_tokens - request.num_output_placeholders
        self.kv_cache_manager.cache_blocks(request, min(computed, request.num_tokens))  # type: ignore[attr-defined]

    def _start_over(self: Any, request: Request) -> None:
        """Throw away what was computed without the edit, and any token that is on its way."""
        if request.status == RequestStatus.RUNNING:
            self.running.remove(request)
            self._preempt_request(request, time.monotonic(), drop_stale_output=True)
        elif request.num_stale_output_tokens:
            request.drop_stale_output = True

    # ---- after it --------------------------------------------------------------------------------------------------

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Also called when weights change: what was remembered may be wrong then."""
        self._remembered.clear()
        return super().reset_prefix_cache(*args, **kwargs)  # type: ignore[misc]

    def memoir_adopted(self, generation: int) -> None:
        """The workers decide by this generation from now on; called between steps.

        Steps in flight and requests that the workers know keep the older one, which the workers keep as long. What is
        remembered of it is forgotten, and requests that wait with such a decision are looked up as new ones.
        """
        self._generation = generation
        self._remembered.clear()
        for request_id in self._early:
            if self._routed.pop(request_id).row >= 0:
                blocks.disown(self.requests[request_id], self.hash_block_size)  # type: ignore[attr-defined]
        self._questions |= self._early
        self._early = {}

    def memoir_stats(self) -> dict[str, int]:
        """What the scheduler adds to the counters of its workers."""
        return {"remembered": len(self._remembered), "undecided": len(self._questions)}

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Adds to the KV transfer parameters: the one free-form dict that travels from here to the response."""
        kv_params, ec_params = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        self._decided(request.request_id)
        self._early.pop(request.request_id, None)
        routed = self._routed.pop(request.request_id, None)
        if routed is not None:
            kv_params = {**(kv_params or {}), "memoir": msgspec.to_builtins(routed.decision)}
        return kv_params, ec_params


def _prompt_key(request: Request, span: Span) -> bytes | None:
    """Equal keys have equal decisions: what is pooled depends on the tokens up to the question's end alone."""
    if request.mm_features or request.prompt_token_ids is None:
        return None
    tokens = np.asarray(request.prompt_token_ids[: span.end], dtype=np.int64)
    return blake2b(tokens.tobytes(), digest_size=16, salt=span.start.to_bytes(8, "little")).digest()


class MemoirScheduler(_Decisions, Scheduler):
    """vLLM's scheduler, with decisions."""


class MemoirAsyncScheduler(_Decisions, AsyncScheduler):
    """vLLM's scheduler for steps in flight, with decisions."""
