"""What the op does in a step: pool the questions, decide, and add W(M * x) to the rows of matched requests.

One `ResidualLayer` per worker. Its state is keyed by request id and lives from a request's first step until vLLM names
the id finished, so it outlives preemption: a request that is computed again keeps its decision, and the generation of
the store that made it. An older generation is held by its requests alone and goes with the last of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from memoir_retrieval.errors import ConfigError
from memoir_retrieval.question.span import Span
from memoir_vllm.requests import Routed, parse_options
from memoir_vllm.worker.block_sums import BlockSums
from memoir_vllm.worker.pooling import pooled
from memoir_vllm.worker.product import ResidualProduct
from memoir_vllm.worker.routing import Route, Router
from memoir_vllm.worker.rows import Acting, Batch, StepRows, acting_rows

__all__ = ["Generation", "ResidualLayer"]


@dataclass(frozen=True, eq=False)
class Generation:
    """One generation of a store in this worker."""

    router: Router
    memories: Sequence[ResidualProduct]


@dataclass
class _Request:
    """span: the question. question: its tokens. route: None until it is decided. mask: of the matched edit, this rank's
    share, on device. of: the generation that matched it; it acts until the request is done. nearest: how many edits its
    decision names.

    long: the question takes several steps, or begins in the prefix cache. Each step adds its rows to `total`
    (their sum, float32 [D/ranks], and what to divide it by) and moves `seen`, the position after them; `cached` are the
    blocks that were found. By its end the question has passed without the edit: a match acts from the moment on that
    the scheduler has it computed once more.
    """

    span: Span
    question: Sequence[int] = ()
    long: bool = False
    nearest: int = 0
    route: Route | None = None
    mask: torch.Tensor | None = None
    of: Generation | None = None
    acts: bool = False
    total: tuple[torch.Tensor, torch.Tensor | int] | None = None
    seen: int = 0
    cached: Sequence[int] = ()


class _Part(NamedTuple):
    """What a step holds of an undecided question: rows [first, last), its tokens from `position` on."""

    request_id: str
    request: _Request
    first: int
    last: int
    position: int


class ResidualLayer:
    """The edited layer's state in one worker.

    memories: [M, H, D]; this rank keeps its share of D in the serving dtype, as vLLM shards the layer's own weight.
    longest: tokens of the longest question that always passes in one step; None where every question does.
    """

    def __init__(
        self,
        router: Router,
        memories: torch.Tensor,
        *,
        longest: int | None = None,
        rank: int = 0,
        ranks: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        share = memories.shape[2] // ranks
        self._share, self._shard = share, slice(rank * share, (rank + 1) * share)
        self._ranks = ranks
        self._longest = longest
        self._dtype, self._device = dtype, device
        self.now = self.load(router, memories)
        self.probe: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        self._requests: dict[str, _Request] = {}
        self._undecided: dict[str, _Request] = {}
        self._edited: dict[str, _Request] = {}
        self._sums: BlockSums | None = None
        self._step: StepRows | None = None
        self._asking: list[tuple[str, int, int, int]] = []  # of undecided requests: id, rows [start, end), position
        self._last: tuple[StepRows, Acting, list[Batch]] | None = None
        self._routed: dict[str, Routed] = {}
        self._stats = {
            "routed": 0,
            "matched": 0,
            "recalled": 0,
            "replayed": 0,
            "steps": 0,
            "rows": 0,
            "routing_s": 0.0,
            "residual_s": 0.0,
        }

    # ---- generations -----------------------------------------------------------------------------------------------

    def load(self, router: Router, memories: torch.Tensor) -> Generation:
        """Put a generation into this worker's memory; nothing acts before `adopt`. May run in another thread."""
        share = memories[:, :, self._shard].to(device=self._device, dtype=self._dtype, copy=True).contiguous()
        return Generation(router, [ResidualProduct(weight) for weight in share])

    def adopt(self, generation: Generation) -> None:
        """Decide every question that ends from now on by this generation. Decided requests keep theirs."""
        self.now = generation

    def older(self) -> int:
        """How many generations before this one still answer requests."""
        return len({id(r.of) for r in self._requests.values() if r.of not in (None, self.now)})

    # ---- between steps, called by the model runner's wrappers ------------------------------------------------------

    def admit(self, request_id: str, prompt_ids: Sequence[int], extra_args: Mapping[str, Any] | None) -> None:
        """Take up a request whose first rows come in this step. One that is known, as after preemption, is kept."""
        if request_id in self._requests:
            return
        try:
            options = parse_options(extra_args, len(prompt_ids))
        except ConfigError:  # a front end of another language let it pass; the response will say "unroutable"
            self._settle(request_id, self.now.router.unroutable())
            return
        span = options.span_of(prompt_ids, self.now.router.rule)
        if options.off:
            self._settle(request_id, self.now.router.off())
        elif span.start == span.end:
            self._settle(request_id, self.now.router.unroutable())
        else:
            self._requests[request_id] = self._undecided[request_id] = _Request(
                span, list(prompt_ids[span.start : span.end]), self._too_long(span), options.nearest
            )

    def _too_long(self, span: Span) -> bool:
        return self._longest is not None and span.end - span.start > self._longest

    def recall(self, request_id: str, routed: Routed) -> bool:
        """What the scheduler knows of a request whose first rows, or first again, come in this step.

        Returns True where the request starts over with its edit after it has passed without it.
        """
        request = self._requests[request_id]
        starts_over = request.route is not None and request.mask is not None and not request.acts
        if request.route is None:
            route = self.now.router.recall(routed)
            self._decide(request_id, request, route, *self._on_device([route]))
            self._stats["recalled"] += 1
        self._let_act(request_id, request)
        self._stats["replayed"] += starts_over
        return starts_over

    def watch_blocks(self, blocks: int, block_size: int) -> None:
        """Keep a sum for each KV block: from now on a question may begin in the prefix cache, see `sums.py`."""
        self._sums = BlockSums(blocks, block_size, self._share, self._device)

    @property
    def bytes_per_block(self) -> int:
        return 4 * self._share + 8

    def resume(self, request_id: str, cached: Sequence[int], tokens: int) -> None:
        """A request's first rows, or first again, come in this step: `tokens` of it were found, in these KV blocks."""
        request = self._undecided.get(request_id)
        if request is None or self._sums is None:
            return
        found = tokens > request.span.start
        request.long = found or self._too_long(request.span)
        request.cached = cached[: tokens // self._sums.block_size] if found else ()
        request.seen = tokens

    def drop(self, request_ids: Iterable[str]) -> None:
        """Forget requests that finished or were aborted."""
        for request_id in request_ids:
            self._undecided.pop(request_id, None)
            if self._requests.pop(request_id, None) is not None and self._edited.pop(request_id, None) is not None:
                self._last = None
            self._routed.pop(request_id, None)

    def begin_step(self, step: StepRows) -> None:
        """The rows of the coming forward. Without this call (profiling, warm-up, idle ranks) the op does nothing.

        Raises RuntimeError where the rows of an undecided question are not all in this step: serving on would
        silently serve the base model, or half an edit.
        """
        self._step = step
        self._asking = []
        if not self._undecided:
            return
        for at, request_id in enumerate(step.ids):
            request = self._undecided.get(request_id)
            if request is None:
                continue
            row, last, position = int(step.edges[at]), int(step.edges[at + 1]), int(step.positions[at])
            start, end = request.span[:2]
            seen = position + last - row
            if seen <= start:
                continue
            whole = position <= start < end <= seen
            goes_on = request.long and (position <= start or position == request.seen)
            if not whole and not goes_on:
                raise RuntimeError(
                    f"memoir: request {request_id} has tokens {position} to {seen} of its prompt in this step, "
                    f"but its question is {start} to {end}: it must not be split or cached; please report this"
                )
            self._asking.append((request_id, row, last, position))

    def end_step(self) -> None:
        self._step = None

    def take_routed(self) -> dict[str, Routed]:
        """What was decided since the last call, by request id."""
        routed, self._routed = self._routed, {}
        return routed

    def stats(self) -> dict[str, int | float]:
        """Counters since the start. Seconds are those of the host."""
        router = self.now.router
        held = {"live": len(self._requests), "older_generations": self.older()}
        return {"edits": router.edits, "generation": router.generation} | held | self._stats

    # ---- in the forward, called by the op --------------------------------------------------------------------------

    def run(self, x: torch.Tensor, y: torch.Tensor, slots: Mapping[str, torch.Tensor] | None = None) -> None:
        """x: [tokens, D/ranks] into the layer; y: [tokens, H] out of it, this rank's partial sum.

        slots: int64 [tokens or more] for each attention layer, where its rows lie in the KV cache.
        """
        if self.probe is not None:
            self.probe(x, y)
            return
        if self._step is None:
            return
        began = time.perf_counter()
        self._stats["steps"] += 1
        if self._sums is not None and slots:
            rows = int(self._step.edges[-1])
            self._sums.add(x[:rows], next(iter(slots.values()))[:rows])
        if self._asking:
            self._route(x)
        routed = time.perf_counter()
        if self._edited:
            self._act(x, y)
        self._stats["routing_s"] += routed - began
        self._stats["residual_s"] += time.perf_counter() - routed

    def _route(self, x: torch.Tensor) -> None:
        """Look up every question that ends in this step."""
        parts: list[_Part] = []
        for request_id, row, end, position in self._asking:
            request = self._requests[request_id]
            shift = row - position
            first, last = max(request.span.start + shift, row), min(request.span.end + shift, end)
            if first < last:
                parts.append(_Part(request_id, request, first, last, first - shift))
        if not parts:
            return
        sums, weights = pooled(
            x,
            [(part.first, part.last) for part in parts],
            [part.request.span.weighted for part in parts],
            self._ranks,
        )
        ended: list[int] = []
        for at, (_, request, first, last, position) in enumerate(parts):
            if request.cached:
                assert self._sums is not None
                request.total, request.cached = (self._sums.of(request.cached), position), ()
            if position > request.span.start:
                assert request.total is not None
                sums[at] += request.total[0]
                weights[at] += request.total[1]
            request.seen = position + last - first
            if request.seen == request.span.end:
                ended.append(at)
                request.total = None
            else:
                request.total = sums[at], weights[at]
        if not ended:
            return
        means = sums / weights[:, None]
        if len(ended) < len(parts):
            means = means[ended]
        if self._ranks > 1:
            from vllm.distributed import tensor_model_parallel_all_gather

            # Every rank now holds the same numbers in the same order, so every rank decides alike.
            means = tensor_model_parallel_all_gather(means, dim=-1)
        asked = [parts[at] for at in ended]
        questions = [part.request.question for part in asked]
        routes = self.now.router.route(means, questions, [part.request.nearest for part in asked])
        for part, route, mask in zip(asked, routes, self._on_device(routes), strict=True):
            self._settle(part.request_id, route, mask)
            self._stats["routed"] += 1
            self._stats["matched"] += mask is not None

    def _on_device(self, routes: Sequence[Route]) -> list[torch.Tensor | None]:
        """This rank's share of the mask of each route, in the dtype that it acts in. All are brought over together."""
        masks = [route.mask[self._shard] for route in routes if route.mask is not None]
        if not masks:
            return [None] * len(routes)
        there = iter(torch.from_numpy(np.stack(masks)).to(self._device, non_blocking=True).to(self._dtype))
        return [None if route.mask is None else next(there) for route in routes]

    def _settle(self, request_id: str, route: Route, mask: torch.Tensor | None = None) -> None:
        """A decision of this worker, which the scheduler does not know yet. mask: that of a match, on the device."""
        request = self._requests.setdefault(request_id, _Request(Span(0, 0)))
        self._decide(request_id, request, route, mask)
        if not request.long:
            self._let_act(request_id, request)
        self._routed[request_id] = route.routed

    def _decide(self, request_id: str, request: _Request, route: Route, mask: torch.Tensor | None) -> None:
        request.route = route
        self._undecided.pop(request_id, None)
        if mask is not None:
            request.mask, request.of = mask, self.now

    def _let_act(self, request_id: str, request: _Request) -> None:
        request.acts = True
        if request.mask is not None:
            self._edited[request_id] = request
            self._last = None

    def _act(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Unmatched rows are never touched: adding zeros would not keep their bits."""
        for batch in self._batches():
            self.add(x, y, batch)
            self._stats["rows"] += len(batch.index)

    def _batches(self) -> list[Batch]:
        step = self._step
        assert step is not None
        if self._last is not None:  # the same rows of the same requests come back in every pure decode step
            last, acting, batches = self._last
            if step.ids == last.ids and np.array_equal(step.edges, last.edges) and acting.all_rows(step):
                return batches
        at = [i for i, request_id in enumerate(step.ids) if request_id in self._edited]
        if not at:
            return []
        starts, masks, numbers = [], [], []
        memories: dict[tuple[int, int], tuple[int, ResidualProduct]] = {}
        for i in at:
            request = self._edited[step.ids[i]]
            assert request.route is not None and request.of is not None and request.mask is not None
            key = (request.of.router.generation, request.route.memory)
            number, _ = memories.setdefault(key, (len(memories), request.of.memories[request.route.memory]))
            starts.append(request.span.acts_from)
            masks.append(request.mask)
            numbers.append(number)
        acting = Acting(np.array(at), np.array(starts), np.array(numbers), masks, [m for _, m in memories.values()])
        batches = acting_rows(step, acting)
        self._last = (step, acting, batches) if acting.all_rows(step) else None
        return batches

    def add(self, x: torch.Tensor, y: torch.Tensor, batch: Batch) -> None:
        """y += W (mask * x) on the rows of the batch, and on no other."""
        one_row_each = len(batch.masks) == len(batch.owner)
        masks = batch.masks if one_row_each else batch.masks[batch.owner]
        y.index_add_(0, batch.index, batch.memory(x[batch.index] * masks))
