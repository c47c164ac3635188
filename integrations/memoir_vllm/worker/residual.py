"""What the op does in a step: pool the questions, decide, and add W(M * x) to the rows of matched requests.

One `ResidualLayer` per worker. Its state is keyed by request id and lives from a request's first step until vLLM names
the id finished, so it outlives preemption: a request that is computed again keeps its decision, and the generation of
the store that made it. An older generation is held by its requests alone and goes with the last of them.

A server may have several stores, which all edit this layer: each question is looked up in the store of its request. The
tables of requests and of sums are one for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from memoir_retrieval.question.span import Span
from memoir_retrieval.question.tasks import Pooled, with_leads
from memoir_vllm.requests import Query, Routed
from memoir_vllm.worker.block_sums import BlockSums
from memoir_vllm.worker.pooling import pooled, token_weights
from memoir_vllm.worker.product import ResidualProduct
from memoir_vllm.worker.routing import Route, Router
from memoir_vllm.worker.rows import Acting, Batch, StepRows, acting_rows

if TYPE_CHECKING:
    from memoir_vllm.worker.captured import CapturedProduct

__all__ = ["Generation", "ResidualLayer"]


@dataclass(frozen=True, eq=False)
class Generation:
    """One generation of a store in this worker.

    router: looks questions up.
    memories: this rank's share of each.
    """

    router: Router
    memories: Sequence[ResidualProduct]


@dataclass
class _Sum:
    """The tokens of one span that have passed: float32 [D/ranks] and what to divide it by, None before the first.

    cached: KV blocks whose tokens are not yet added to it.
    """

    span: Span
    total: tuple[torch.Tensor, torch.Tensor] | None = None
    cached: Sequence[int] = ()


@dataclass
class _Request:
    """query: what is looked up of it. questions: the tokens of the message and its parts. prompt: how many tokens it
    begins with; 0: none is looked at. seen: the position after the last that passed.

    sums: of what is pooled, the message first. decisive: that which ends last, when all is decided. route: None until
    then. mask: of the matched edit, this rank's share, on the device. of: the generation that matched it; it acts until
    the request is done.
    """

    query: Query
    questions: Sequence[Sequence[int]]
    prompt: int
    seen: int = 0
    sums: Sequence[_Sum] = ()
    decisive: _Sum | None = None
    route: Route | None = None
    mask: torch.Tensor | None = None
    of: Generation | None = None


class _Part(NamedTuple):
    """What a step holds of a span: rows [first, last) with tokens from `position` on."""

    request_id: str
    sum: _Sum
    first: int
    last: int
    position: int


class _Counted(NamedTuple):
    """Rows of prompts that are counted in the sums of their KV blocks, and whether each begins its block."""

    rows: np.ndarray
    begins: np.ndarray


class ResidualLayer:
    """The edited layer's state in one worker."""

    def __init__(
        self,
        router: Router,
        memories: torch.Tensor,
        *,
        rank: int = 0,
        ranks: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        """router: of the default store's first generation; `adopt` brings other stores.
        memories: float32 [M, H, D]; this rank keeps its share of D in the serving dtype, as vLLM shards the layer's own
            weight.
        rank, ranks: of tensor parallelism.
        dtype: in which it serves.
        device: where the layer lies.

        `captured` is its product in full CUDA graphs, None where there are none; `replays` says that the coming forward
        is such a graph. `warms_up` says that requests come from vLLM's warm-up, of which no scheduler has sent a query.
        """
        share = memories.shape[2] // ranks
        self._share, self._shard = share, slice(rank * share, (rank + 1) * share)
        self._ranks = ranks
        self._dtype, self._device = dtype, device
        self.stores = {"": self.load(router, memories)}
        self.probe: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        self._requests: dict[str, _Request] = {}
        self._passing: dict[str, _Request] = {}  # whose prompt has not passed
        self._edited: dict[str, _Request] = {}
        self._sums: BlockSums | None = None
        self._step: StepRows | None = None
        self.captured: CapturedProduct | None = None
        self.replays = self.warms_up = False
        self._prompts_pass = self._edits_act = self._has_run = False
        self._parts: list[_Part] = []
        self._counted: list[_Counted] = []
        self._last: tuple[StepRows, Acting, list[Batch]] | None = None
        self._routed: dict[str, Routed] = {}
        self._stats = {
            "routed": 0,
            "matched": 0,
            "recalled": 0,
            "steps": 0,
            "replayed": 0,
            "rows": 0,
            "routing_s": 0.0,
            "residual_s": 0.0,
        }

    # ---- generations -----------------------------------------------------------------------------------------------

    def load(self, router: Router, memories: torch.Tensor, before: Generation | None = None) -> Generation:
        """Put a generation into this worker's memory; nothing acts before `adopt`. May run in another thread.

        router: looks its questions up.
        memories: float32 [M, H, D], whole.
        before: of the same store; memories that are as they were in it are shared with it.
        """
        known = before.memories if before else ()
        held: list[ResidualProduct] = []
        for number, memory in enumerate(memories):
            share = memory[:, self._shard].to(device=self._device, dtype=self._dtype, copy=True).contiguous()
            same = number < len(known) and torch.equal(share, known[number].weight)
            held.append(known[number] if same else ResidualProduct(share))
        return Generation(router, held)

    @property
    def now(self) -> Generation:
        """The generation that decides questions of the default store."""
        return self.stores[""]

    def adopt(self, generation: Generation, store: str = "") -> None:
        """Decide every question that ends from now on by another generation. Decided requests keep theirs.

        generation: as `load` returned it.
        store: name of its store.
        """
        self.stores[store] = generation

    def older(self, store: str = "") -> int:
        """How many generations before the present one still answer requests.

        store: name of the generations' store.
        """
        now = self.stores[store]
        return len({id(r.of) for r in self._requests.values() if r.query.store == store and r.of not in (None, now)})

    # ---- between steps, called by the model runner's wrappers ------------------------------------------------------

    def admit(self, request_id: str, prompt_ids: Sequence[int], query: Query) -> None:
        """Take up a request whose first rows come in this step. One that is known, as after preemption, is kept.

        request_id: of the engine.
        prompt_ids: its whole prompt.
        query: what is looked up of it.
        """
        if request_id in self._requests:
            return
        questions = [prompt_ids[part.start : part.end] for part in (query.span, *query.parts)]
        self._requests[request_id] = _Request(query, questions, query.summed(len(prompt_ids)))
        router = self.stores[query.store].router
        if query.routed is not None:
            route = router.recall(query.routed)
            self._decide(request_id, route, *self._on_device([route]))
            self._stats["recalled"] += 1
        elif not query.is_looked_up:
            route = router.unedited_of(query)
            self._decide(request_id, route, None)
            self._routed[request_id] = route.routed

    def watch_blocks(self, blocks: int, block_size: int) -> None:
        """Keep a sum for each KV block: from now on a question may lie in the prefix cache, see `block_sums.py`.

        blocks: how many there are.
        block_size: tokens of each.
        """
        self._sums = BlockSums(blocks, block_size, self._share, self._device)

    @property
    def bytes_per_block(self) -> int:
        """What a KV block costs in sums."""
        return 4 * self._share + 8

    def resume(self, request_id: str, cached: Sequence[int], tokens: int) -> None:
        """A request's first rows, or first again, come in this step.

        request_id: of the engine.
        cached: the KV blocks in which its first tokens were found.
        tokens: how many those are.

        Raises RuntimeError where more of an undecided question was found than may be.
        """
        request = self._requests[request_id]
        request.seen = tokens
        if tokens < request.prompt:
            self._passing[request_id] = request
        if request.route is not None:
            return
        span = request.query.span
        if tokens > (span.start if self._sums is None else request.query.computed_from):
            raise RuntimeError(
                f"memoir: request {request_id} finds {tokens} tokens of its prompt in the cache, but its question is "
                f"{span.start} to {span.end}: the tokens that decide must be computed; please report this"
            )
        request.sums = [_Sum(part) for part in request.query.pooled]
        request.decisive = max(request.sums, key=lambda part: part.span.end)  # the message itself among equals
        if self._sums is not None and tokens > span.start:
            size = self._sums.block_size
            request.sums[0].cached = cached[span.start // size : tokens // size]

    def drop(self, request_ids: Iterable[str]) -> None:
        """Forget requests that finished or were aborted.

        request_ids: of the engine; those that are not known are passed over.
        """
        for request_id in request_ids:
            self._passing.pop(request_id, None)
            if self._requests.pop(request_id, None) is not None and self._edited.pop(request_id, None) is not None:
                self._last = None
            self._routed.pop(request_id, None)

    def expect(self, request_ids: Iterable[str]) -> None:
        """Note whether the coming step has something to do here: tokens of prompts, or requests with an edit.

        request_ids: of the step.
        """
        ids = set(request_ids)
        self._prompts_pass = not ids.isdisjoint(self._passing)
        self._edits_act = not ids.isdisjoint(self._edited)
        self._has_run = self.replays = False
        if not ids:  # V1 may run the model for other engines then (`_dummy_run` in its `execute_model`)
            self.idle()

    def may_replay(self, rows: int) -> bool:
        """Whether the coming forward may replay a full CUDA graph. Where prompts pass it may not; where an edit acts,
        the graph must hold the product.

        rows: of the graph.
        """
        if self.probe is not None or self._prompts_pass:
            return False
        return not self._edits_act or (self.captured is not None and rows in self.captured.sizes)

    def require_run(self) -> None:
        """The model has run. Raises RuntimeError where it has left out an op that had something to do."""
        self._stats["replayed"] += self._step is not None and self.replays
        if self._step is None or self._has_run or not (self._prompts_pass or self._edits_act):
            return
        if not self.replays:
            raise RuntimeError(
                "memoir: a step with edits or questions has not run the edited layer's op, so its answers would be the "
                'base model\'s: serve with --compilation-config \'{"cudagraph_mode": "PIECEWISE"}\', and please report '
                "this"
            )
        self._stats["steps"] += 1
        self._stats["rows"] += sum(len(batch.index) for batch in self._batches())

    def begin_step(self, step: StepRows) -> None:
        """The rows of the coming forward. Without this call (profiling, warm-up, idle ranks) the op does nothing.

        step: which rows belong to which request.

        Raises RuntimeError where tokens of an undecided request are missing between its last step and this one.
        """
        self._step = step
        self._parts, self._counted = [], []
        if self.captured is not None and not self._prompts_pass:
            self.captured.fill(self._batches() if self._edits_act else ())
        if not self._passing:
            return
        for i, request_id in enumerate(step.ids):
            request = self._passing.get(request_id)
            if request is None:
                continue
            row, end, position = int(step.edges[i]), int(step.edges[i + 1]), int(step.positions[i])
            seen = position + end - row
            if request.route is None:
                if position != request.seen:
                    raise RuntimeError(
                        f"memoir: request {request_id} goes on at token {position} of its prompt, but was at "
                        f"{request.seen}: no token may be left out; please report this"
                    )
                self._gather(request_id, request, row - position, position, seen)
            if self._sums is not None:
                self._count(request, row, position, min(seen, request.prompt), self._sums.block_size)
            request.seen = seen
            if seen >= request.prompt:
                del self._passing[request_id]

    def _gather(self, request_id: str, request: _Request, shift: int, position: int, seen: int) -> None:
        """Note which rows of the step, its tokens [position, seen), belong to spans that are looked up."""
        for part in request.sums:
            start, end = max(part.span.start, position), min(part.span.end, seen)
            if start < end:
                self._parts.append(_Part(request_id, part, start + shift, end + shift, start))

    def _count(self, request: _Request, row: int, position: int, end: int, size: int) -> None:
        """A block in which a question begins is counted from there on, every other one from its first token on."""
        positions, start = np.arange(position, end), request.query.span.start
        counted = (positions >= start) | (positions < start // size * size)
        begins = (positions % size == 0) | (positions == start)
        self._counted.append(_Counted(np.flatnonzero(counted) + row, begins[counted]))

    def idle(self) -> None:
        """The coming forward is of no request. A full graph would act by the table of the step before."""
        if self.captured is not None:
            self.captured.fill(())

    def end_step(self) -> None:
        """The step is over."""
        self._step = None
        self._prompts_pass = self._edits_act = False

    def take_routed(self) -> dict[str, Routed]:
        """What was decided since the last call, by request id."""
        routed, self._routed = self._routed, {}
        return routed

    def stats(self) -> dict[str, Any]:
        """Counters since the start, with what the default store holds; `stores` says it of the others by name.

        Seconds are those of the host; `replayed` are steps of full graphs, with edits or without.
        """
        held = {name: self._holds(name) for name in self.stores}
        return held.pop("") | {"live": len(self._requests), "stores": held} | self._stats

    def _holds(self, store: str) -> dict[str, int]:
        router = self.stores[store].router
        return {"edits": router.edits, "generation": router.generation, "older_generations": self.older(store)}

    # ---- in the forward, called by the op --------------------------------------------------------------------------

    def run(self, x: torch.Tensor, y: torch.Tensor, slots: Mapping[str, torch.Tensor] | None = None) -> None:
        """The op: pool what is not decided, and act on what is matched.

        x: [tokens, D/ranks] into the layer.
        y: [tokens, H] out of it, this rank's partial sum, which is changed.
        slots: int64 [tokens or more] for each attention layer, where its rows lie in the KV cache.
        """
        if self.probe is not None:
            self.probe(x, y)
            return
        if self.captured is not None and x.is_cuda and torch.cuda.is_current_stream_capturing():
            self.captured.capture(x, y)
            return
        if self._step is None:
            return
        began = time.perf_counter()
        self._has_run = True
        self._stats["steps"] += 1
        if self._counted or self._parts:
            self._pass_prompts(x[: int(self._step.edges[-1])], slots)
        routed = time.perf_counter()
        if self._edited:
            self._act(x, y)
        self._stats["routing_s"] += routed - began
        self._stats["residual_s"] += time.perf_counter() - routed

    def _pass_prompts(self, x: torch.Tensor, slots: Mapping[str, torch.Tensor] | None) -> None:
        weights = token_weights(x, self.now.router.rule.weighted, self._ranks)
        if self._sums is not None and slots:
            rows = torch.from_numpy(np.concatenate([counted.rows for counted in self._counted]))
            rows = rows.to(x.device, non_blocking=True)
            begins = np.concatenate([counted.begins for counted in self._counted])
            self._sums.add(x[rows], weights[rows], next(iter(slots.values()))[rows], begins)
        if self._parts:
            self._route(x, weights)

    def _route(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        """Add the rows of questions to their sums, and look up every message that ends in this step."""
        parts = self._parts
        totals, divisors = pooled(x, weights, [(part.first, part.last) for part in parts])
        ids: list[str] = []
        for i, (request_id, part, first, last, position) in enumerate(parts):
            if part.cached:
                assert self._sums is not None
                part.total, part.cached = self._sums.of(part.cached, position - part.span.start), ()
            if part.total is not None:
                totals[i] += part.total[0]
                divisors[i] += part.total[1]
            part.total = totals[i], divisors[i]
            if part is self._requests[request_id].decisive and position + last - first == part.span.end:
                ids.append(request_id)
        if not ids:
            return
        requests = [self._requests[request_id] for request_id in ids]
        sums = [part.total for request in requests for part in request.sums if part.total is not None]
        numerators, divisors = (torch.stack(column) for column in zip(*sums, strict=True))
        means = numerators / divisors[:, None]
        if self._ranks > 1:
            from vllm.distributed import tensor_model_parallel_all_gather

            # Every rank now holds the same numbers in the same order, so every rank decides alike. The divisors are
            # those of the first, since a GPU may add up in another order on each.
            ranks = tensor_model_parallel_all_gather(torch.cat([means, divisors[:, None]], dim=1), dim=-1)
            ranks = ranks.view(len(means), self._ranks, self._share + 1)
            means, divisors = ranks[:, :, :-1].flatten(1), ranks[:, 0, -1]
        queries = [request.query for request in requests]
        both = with_leads(Pooled(means, divisors), [(query.span, *query.parts) for query in queries])
        counts = [len(request.questions) for request in requests]
        routes: dict[str, Route] = {}
        for store in dict.fromkeys(query.store for query in queries):
            chosen = [i for i, query in enumerate(queries) if query.store == store]
            rows = np.flatnonzero(np.repeat([query.store == store for query in queries], counts))
            decided = self.stores[store].router.route(
                both.taken(rows.tolist(), chosen),
                [question for i in chosen for question in requests[i].questions],
                [queries[i].nearest for i in chosen],
                [counts[i] for i in chosen],
            )
            routes |= zip([ids[i] for i in chosen], decided, strict=True)
        for (request_id, route), mask in zip(routes.items(), self._on_device([*routes.values()]), strict=True):
            self._decide(request_id, route, mask)
            self._routed[request_id] = route.routed
            self._stats["routed"] += 1
            self._stats["matched"] += mask is not None

    def _on_device(self, routes: Sequence[Route]) -> list[torch.Tensor | None]:
        """This rank's share of the mask of each route, in the dtype that it acts in. All are brought over together."""
        masks = [route.mask[self._shard] for route in routes if route.mask is not None]
        if not masks:
            return [None] * len(routes)
        tensors = iter(torch.from_numpy(np.stack(masks)).to(self._device, non_blocking=True).to(self._dtype))
        return [None if route.mask is None else next(tensors) for route in routes]

    def _decide(self, request_id: str, route: Route, mask: torch.Tensor | None) -> None:
        """mask: that of a match, on the device."""
        request = self._requests[request_id]
        request.route, request.sums = route, ()
        if mask is not None:
            request.mask, request.of = mask, self.stores[request.query.store]
            self._edited[request_id] = request
            self._last = None

    def _act(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Unmatched rows are never touched: adding zeros would not keep their bits."""
        for batch in self._batches():
            batch.add(x, y)
            self._stats["rows"] += len(batch.index)

    def _batches(self) -> list[Batch]:
        step = self._step
        assert step is not None
        if self._last is not None:  # the same rows of the same requests come back in every pure decode step
            last, acting, batches = self._last
            if step.ids == last.ids and np.array_equal(step.edges, last.edges) and acting.all_rows(step):
                return batches
        rows = [i for i, request_id in enumerate(step.ids) if request_id in self._edited]
        if not rows:
            return []
        starts, masks, numbers = [], [], []
        memories: dict[tuple[int, int], tuple[int, ResidualProduct]] = {}
        for i in rows:
            request = self._edited[step.ids[i]]
            assert request.route is not None and request.of is not None and request.mask is not None
            key = (id(request.of), request.route.memory)
            number, _ = memories.setdefault(key, (len(memories), request.of.memories[request.route.memory]))
            starts.append(request.query.span.acts_from)
            masks.append(request.mask)
            numbers.append(number)
        acting = Acting(np.array(rows), np.array(starts), np.array(numbers), masks, [m for _, m in memories.values()])
        batches = acting_rows(step, acting)
        self._last = (step, acting, batches) if acting.all_rows(step) else None
        return batches
