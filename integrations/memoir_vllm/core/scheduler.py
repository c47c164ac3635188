"""Scheduling around decisions (vllm/v1/core/sched/scheduler.py). Delivered by name through `scheduler_cls`.

Mode `inline`: prompts are split and cached as usual. The workers decide a request in the step in which its question's
last token passes; an edit acts from the last token before the answer on. Until their decision is back, the request
takes no cached block from the first of these two tokens on, and publishes none from the other on (`blocks.py`). What it
takes of its question, the workers have sums of (`block_sums.py`).

Mode `single`: prompts are neither split nor cached, so nothing is kept back.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from cachetools import LRUCache
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from memoir_retrieval.errors import MemoirError
from memoir_retrieval.question.candidates import Pieces
from memoir_retrieval.question.span import Span
from memoir_vllm import config
from memoir_vllm.core import blocks, rpc
from memoir_vllm.core.offloading import Offloads
from memoir_vllm.patches import wrap_once
from memoir_vllm.requests import Query, Routed, put_queries, query_of, routed_of, store_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

__all__ = ["MemoirAsyncScheduler", "MemoirScheduler"]

# Decisions that are remembered by prompt: about 200 bytes each.
REMEMBERED = 10_000


@dataclass
class _State:
    """What is known of a request. routed: None until it is decided. begun: whether the workers have heard of it.

    prompt: what its decision depends on, None where that is not known here.
    """

    query: Query
    prompt: bytes | None
    routed: Routed | None = None
    begun: bool = False

    @property
    def undecided(self) -> bool:
        return self.routed is None and self.query.is_looked_up


class MemoirScheduler(Scheduler):
    """vLLM's scheduler, with decisions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._states: dict[str, _State] = {}
        self._unreported: set[str] = set()  # decided, and no output has taken it to the front end yet
        self._generations: dict[str, int] = {}  # by store, the one that was adopted last
        self._remembered: LRUCache[bytes, Routed] = LRUCache(REMEMBERED)
        self._stores = config.served_stores(self.vllm_config)
        decode = config.token_decoder(self.vllm_config.model_config)
        if any(store.rule.candidates for store in self._stores.values()):
            decode(())  # the tokenizer is loaded now, not while requests wait
        self._pieces = Pieces(decode)
        self._inline = config.is_inline(self.vllm_config)
        self._offloads = None if self.connector is None else Offloads(self.connector)
        rpc.install()
        _install()
        if self._inline:
            blocks.install()
            groups = self.kv_cache_config.kv_cache_groups
            summed = None
            if config.keeps_sums(self.vllm_config, len(groups)):
                summed = blocks.SummedBlocks(self.kv_cache_config.num_blocks, groups[0].kv_cache_spec.block_size)
            blocks.guard(self.kv_cache_manager, self._query, self._is_undecided, self._recall, summed)

    # ---- before the decision ---------------------------------------------------------------------------------------

    def memoir_arrives(self, request: Request) -> None:
        """Find a request's question; called before `add_request`, beside the steps: a long prompt takes its time.

        request: that was sent.
        """
        request._memoir_query = self._query_of(request)

    def add_request(self, request: Request) -> None:
        """As vLLM's; the request's question is found first, and a decision that is remembered settles it."""
        if request.request_id not in self.requests:
            query = getattr(request, "_memoir_query", None) or self._query_of(request)
            # Who asks for the nearest edits is always looked up: a decision is remembered without them.
            remembers = self._inline and query.is_looked_up and not query.nearest
            prompt = _prompt_key(request, query) if remembers else None
            self._states[request.request_id] = state = _State(query, prompt)
            if self._offloads is not None and state.undecided:
                self._offloads.hold(request, query.span)
            self._recall(request)
        super().add_request(request)

    def _query_of(self, request: Request) -> Query:
        extra_args = request.sampling_params and request.sampling_params.extra_args
        adapter = request.lora_request
        try:
            store = store_of(extra_args, adapter, self._stores)
        except MemoirError as error:  # a front end of another language let it pass
            return Query(Span(0, 0), adapter=adapter is not None, reason=str(error))
        if store is None:
            return Query(Span(0, 0), adapter=True)
        if request.mm_features:
            return Query(Span(0, 0), image=True, store=store)
        prompt = request.prompt_token_ids or []
        return query_of(prompt, extra_args, self._stores[store].rule, self._pieces)._replace(store=store)

    def _recall(self, request: Request) -> None:
        """Settle a request that has not begun, where its prompt was decided before, or while it waited."""
        state = self._states[request.request_id]
        if state.prompt is None or state.begun or state.routed is not None:
            return
        routed = self._remembered.get(state.prompt)
        if routed is not None:
            self._settle(request, state, routed)

    def _query(self, request: Request) -> Query:
        return self._states[request.request_id].query

    def _is_undecided(self, request: Request) -> bool:
        return self._states[request.request_id].undecided

    # ---- the decision ----------------------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """As vLLM's; the output also carries the questions of requests that begin."""
        output = super().schedule(*args, **kwargs)
        queries = {}
        for new in output.scheduled_new_reqs:
            state = self._states[new.req_id]
            state.begun = True
            queries[new.req_id] = state.query._replace(routed=state.routed)
        return put_queries(output, queries) if queries else output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        """As vLLM's; what the workers decided settles its requests first."""
        # Before the stock code, which frees the requests that finish in this very step.
        for request_id, routed in routed_of(model_runner_output).items():
            request = self.requests.get(request_id)
            if request is None or request.is_finished():
                continue
            state = self._states[request_id]
            self._settle(request, state, routed)
            if state.prompt is not None and routed.decision.generation >= self._generations.get(state.query.store, 0):
                self._remembered[state.prompt] = routed
            if self._inline and request.status == RequestStatus.RUNNING:
                # What `allocate_slots` would have published before the forward.
                computed = request.num_computed_tokens - request.num_output_placeholders
                self.kv_cache_manager.cache_blocks(request, min(computed, request.num_tokens))
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._unreported:
            self._report(outputs)
        return outputs

    def _report(self, outputs: Any) -> None:
        """The front end may end a request itself, so it learns of a decision with the first output, not the last."""
        for output in (output for of_client in outputs.values() for output in of_client.outputs):
            if output.request_id in self._unreported:
                self._unreported.remove(output.request_id)
                routed = self._states[output.request_id].routed
                output.kv_transfer_params = _with_decision(output.kv_transfer_params, routed)

    def _settle(self, request: Request, state: _State, routed: Routed) -> None:
        state.routed = routed
        self._unreported.add(request.request_id)
        if self._inline and routed.row >= 0:
            name = f"{routed.store}:{routed.decision.generation}:{routed.row}"
            blocks.own(request, name, state.query.span.acts_from, self.hash_block_size)
        if self._offloads is not None:
            self._offloads.release(request)

    # ---- after it --------------------------------------------------------------------------------------------------

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; nobody finds blocks of the request that were published for this step, which leaves it out now.

        Under the policy `priority` a request that has its place in a step can lose it to a later one of that step.
        """
        groups = self.kv_cache_config.kv_cache_groups
        held = self.kv_cache_manager.get_block_ids(request.request_id)
        left_out: set[int] = set()
        for group, blocks_of_group in zip(groups, held, strict=True):
            left_out.update(blocks_of_group[request.num_computed_tokens // group.kv_cache_spec.block_size :])
        self.kv_cache_manager.evict_blocks(left_out)
        super()._preempt_request(request, *args, **kwargs)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Also called when weights change: what was remembered may be wrong then.

        args, kwargs: as vLLM calls it.
        """
        self._remembered.clear()
        return super().reset_prefix_cache(*args, **kwargs)

    def memoir_adopted(self, generation: int, store: str = "") -> None:
        """The workers decide by another generation of a store from now on; called between steps.

        Steps in flight and requests that the workers know keep the older one, which the workers keep as long. What is
        remembered of it is forgotten, and requests that wait with such a decision are looked up as new ones.

        generation: its number.
        store: its name.
        """
        self._generations[store] = generation
        for prompt in [prompt for prompt, routed in self._remembered.items() if routed.decision.store == store]:
            del self._remembered[prompt]
        for request_id, state in self._states.items():
            if state.query.store == store and state.routed is not None and not state.begun:
                request = self.requests[request_id]
                if state.routed.row >= 0:
                    blocks.disown(request, self.hash_block_size)
                state.routed = None
                if self._offloads is not None and state.undecided:
                    self._offloads.hold(request, state.query.span)
                    self._offloads.rename(request)
                self._unreported.discard(request_id)

    def memoir_loads(self, store: str = "") -> bool:
        """Whether a decided request waits with blocks that are loaded for it. It has to begin with that decision.

        store: name of the one that decided it.
        """
        return any(
            state.query.store == store
            and state.routed is not None
            and not state.begun
            and self._holds_kv_blocks(self.requests[request_id])
            for request_id, state in self._states.items()
        )

    def memoir_stats(self) -> dict[str, int]:
        """What the scheduler adds to the counters of its workers."""
        undecided = sum(state.undecided for state in self._states.values())
        return {"remembered": len(self._remembered), "undecided": undecided}

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Adds to the KV transfer parameters: the one free-form dict that travels from here to the response."""
        kv_params, ec_params = super()._free_request(request, *args, **kwargs)
        state = self._states.pop(request.request_id, None)
        self._unreported.discard(request.request_id)
        return _with_decision(kv_params, state.routed if state else None), ec_params


def _install() -> None:
    """Wrap `EngineCore.preprocess_add_request` once, which runs in the thread that takes requests in."""
    from vllm.v1.engine.core import EngineCore

    wrap_once(EngineCore, "preprocess_add_request", _arriving)


def _arriving(original: Any) -> Any:
    def preprocess_add_request(self: EngineCore, *args: Any, **kwargs: Any) -> tuple[Request, int]:
        request, wave = original(self, *args, **kwargs)
        if isinstance(self.scheduler, MemoirScheduler):
            self.scheduler.memoir_arrives(request)
        return request, wave

    return preprocess_add_request


def _with_decision(params: dict[str, Any] | None, routed: Routed | None) -> dict[str, Any] | None:
    return params if routed is None else {**(params or {}), "memoir": msgspec.to_builtins(routed.decision)}


def _prompt_key(request: Request, query: Query) -> bytes | None:
    """Equal keys have equal decisions: what is pooled depends on the tokens up to its last one, and on which parts of
    the message are looked up. Where a client names the span, none are.

    So do the activations, but for an adapter, whose store has its name.

    Requests of several cache salts share no key, as they share no cached block: how soon a request is decided must not
    tell one tenant what another has asked.
    """
    if request.prompt_token_ids is None:
        return None
    span = query.span
    end = max(part.end for part in query.pooled)
    tokens = np.asarray(request.prompt_token_ids[:end], dtype=np.int64)
    key = blake2b(tokens.tobytes(), digest_size=16, salt=span.start.to_bytes(8, "little"))
    key.update(np.array([(part.start, part.end) for part in query.parts], dtype=np.int64).tobytes())
    if query.store:
        key.update(b"store" + query.store.encode() + b"\0")
    if request.cache_salt:
        key.update(b"salt" + request.cache_salt.encode("utf-8", "surrogatepass"))
    return key.digest()


class MemoirAsyncScheduler(MemoirScheduler, AsyncScheduler):
    """vLLM's scheduler for steps in flight, with decisions."""
