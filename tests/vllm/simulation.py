"""A stand-in for model and worker under vLLM's real schedulers: every row's key-value entry is a tag that says what
was computed, so a request that reads another request's edit, or misses its own, is seen at the row.

The real parts are the scheduler with its KV cache manager, our mixin, and the `ResidualLayer` with its index. The
stand-in is the transformer: a token's activation is a fixed random vector, an edit is the question whose tokens have
that mean, and a generated token follows from all tags before it.
"""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm import SamplingParams
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from memoir_index import unpack
from memoir_retrieval.model.forward import span_mean
from memoir_retrieval.question.fingerprint import Fingerprint
from memoir_retrieval.question.span import Span, SpanRule, find_span
from memoir_retrieval.store.read import EditStore, Masks
from memoir_vllm.config import keeps_sums
from memoir_vllm.requests import put_routed
from memoir_vllm.worker.residual import ResidualLayer
from memoir_vllm.worker.routing import Router
from memoir_vllm.worker.rows import StepRows
from memoir_vllm.worker.runner import take_up

VOCABULARY = 90  # ordinary tokens; the two markers of a question come after them
RULE = SpanRule(starts=((VOCABULARY,),), end=(VOCABULARY + 1,), weighted=True, acts="last", behind=2)
ALL = SpanRule(rule="all", weighted=True, acts="last")
D, K = 64, 16


def _hash(*parts: Any) -> int:
    """Stable between processes: of integers and None only."""
    return hash(tuple(-7 if part is None else part for part in parts))


class Rows(NamedTuple):
    """Rows `[start, end)` of a step hold a request's tokens from `position` on."""

    request_id: str
    start: int
    end: int
    position: int


def step_of(rows: Sequence[Rows]) -> StepRows:
    """Rows that follow each other, as a runner tells the layer."""
    edges = np.array([rows[0].start, *(r.end for r in rows)])
    assert edges[:-1].tolist() == [r.start for r in rows]
    return StepRows([r.request_id for r in rows], edges, np.array([r.position for r in rows]))


@dataclass
class _State:
    """A request as the worker sees it."""

    tokens: list[int]
    prompt_len: int
    blocks: list[int]


class HostMemory(OffloadingWorker):
    """Stands in for the copies between a GPU and its host. A copy is done at once, and heard of one step later."""

    def __init__(self, kv: dict[tuple[int, int], int], block_size: int):
        self._kv, self._offsets = kv, range(block_size)
        self._chunks: dict[tuple[int, int], int] = {}
        self._done: list[list[TransferResult]] = [[], []]
        self.loaded = self.stored = 0

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self.stored += self._copy(self._kv, src_spec, self._chunks, dst_spec, job_id)
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self.loaded += self._copy(self._chunks, src_spec, self._kv, dst_spec, job_id)
        return True

    def _copy(self, source: dict, blocks: Any, target: dict, others: Any, job_id: int) -> int:
        for block, other in zip(blocks.block_ids.tolist(), others.block_ids.tolist(), strict=True):
            for offset in self._offsets:
                target[other, offset] = source[block, offset]
        self._done[-1].append(TransferResult(job_id, True))
        return len(blocks.block_ids)

    def get_finished(self) -> Any:
        self._done.append([])
        return self._done.pop(0)

    def wait(self, job_ids: Any) -> None:
        pass

    def shutdown(self) -> None:
        pass


@dataclass
class Simulation:
    """One scheduler and one worker. `lag`: steps that are scheduled before a step's output is processed."""

    scheduler: Any
    layer: ResidualLayer
    embedding: torch.Tensor
    block_size: int
    lag: int = 0
    requests: dict[str, Request] = field(default_factory=dict)
    answers: dict[str, list[int]] = field(default_factory=dict)
    said: dict[str, dict[str, Any]] = field(default_factory=dict)
    hits: dict[str, int] = field(default_factory=dict)
    chunks: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    steps: int = 0
    offload: OffloadingConnectorWorker | None = None
    _states: dict[str, _State] = field(default_factory=dict)
    _kv: dict[tuple[int, int], int] = field(default_factory=dict)
    _in_flight: deque[tuple[Any, Any]] = field(default_factory=deque)

    @classmethod
    def start(
        cls,
        scheduler_cls: Any,
        vllm_config: Any,
        layer: ResidualLayer,
        embedding: torch.Tensor,
        *,
        blocks: int,
        lag: int,
        v2: bool = False,
    ) -> Simulation:
        block_size = vllm_config.cache_config.block_size
        vllm_config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=8, dtype=torch.float32)
        kv = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
        if keeps_sums(vllm_config, 1):
            layer.watch_blocks(blocks, block_size)
        init_none_hash(sha256)
        scheduler = scheduler_cls(
            vllm_config=vllm_config,
            kv_cache_config=kv,
            log_stats=False,
            structured_output_manager=StructuredOutputManager(vllm_config),
            block_size=block_size,
            hash_block_size=block_size,
        )
        scheduler.use_v2_model_runner = v2  # which vLLM asks the platform for, and a CPU has it not
        sim = cls(scheduler, layer, embedding, block_size, lag)
        if vllm_config.kv_transfer_config is not None:
            connector = OffloadingConnector(vllm_config, KVConnectorRole.WORKER, kv)
            sim.offload = connector.connector_worker
            assert sim.offload is not None
            sim.offload.worker = HostMemory(sim._kv, block_size)
        return sim

    def add(
        self,
        name: str,
        prompt: Sequence[int],
        options: Mapping[str, Any] | None = None,
        *,
        max_tokens: int = 3,
        salt: str | None = None,
        adapter: LoRARequest | None = None,
        image: PlaceholderRange | None = None,
        priority: int = 0,
    ) -> None:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=dict(options or {}))
        request = Request(
            request_id=name,
            prompt_token_ids=list(prompt),
            sampling_params=params,
            pooling_params=None,
            block_hasher=get_request_block_hasher(self.block_size, sha256),
            cache_salt=salt,
            lora_request=adapter,
            priority=priority,
            mm_features=[MultiModalFeatureSpec(None, "image", "image", image)] if image else None,
        )
        self.requests[name] = request
        self.answers[name] = []
        self.chunks[name] = []
        self.scheduler.add_request(request)

    def step(self) -> bool:
        """Schedule and run one step, and process the outputs that are due. Returns False when nothing is left."""
        self.steps += 1
        scheduled = self.scheduler.schedule()
        if scheduled.total_num_scheduled_tokens or scheduled.finished_req_ids or self.offload:
            self._in_flight.append((scheduled, self._execute(scheduled)))
        while self._in_flight and (len(self._in_flight) > self.lag or not scheduled.total_num_scheduled_tokens):
            done, output = self._in_flight.popleft()
            for outputs in self.scheduler.update_from_output(done, output).values():
                for request in outputs.outputs:
                    self.answers[request.request_id] += request.new_token_ids
                    if request.kv_transfer_params:
                        self.said[request.request_id] = request.kv_transfer_params["memoir"]
        return self.scheduler.has_requests() or bool(self._in_flight)

    def run(self, limit: int = 2000) -> None:
        while self.step():
            limit -= 1
            assert limit, "requests are waiting for ever"

    def adopt(self, store: EditStore, name: str = "") -> None:
        """What `collective_rpc("memoir_reload")` does between two steps."""
        router = Router(store, None, "cpu", str, name)
        self.layer.adopt(self.layer.load(router, torch.from_numpy(store.memories)), name)
        self.scheduler.memoir_adopted(store.manifest.generation, name)

    # ---- the worker ------------------------------------------------------------------------------------------------

    def _execute(self, scheduled: Any) -> ModelRunnerOutput:
        if self.offload is None:
            return self._forward(scheduled)
        moves = scheduled.kv_connector_metadata
        self.offload.handle_preemptions(moves)
        self.offload.start_kv_transfers(moves)
        output = self._forward(scheduled)
        self.offload.prepare_store_kv(moves)
        _, loaded = self.offload.get_finished(scheduled.finished_req_ids)
        output.kv_connector_output = KVConnectorOutput(
            finished_recving=loaded, kv_connector_worker_meta=self.offload.build_connector_worker_meta()
        )
        return output

    def _forward(self, scheduled: Any) -> ModelRunnerOutput:
        self._follow(scheduled)
        rows, x, tags = [], [], []
        for name, count in scheduled.num_scheduled_tokens.items():
            state, position = self._states[name], self._positions[name]
            self.chunks[name].append((position, count))
            rows.append(Rows(name, len(x), len(x) + count, position))
            for at in range(position, position + count):
                x.append(self.embedding[state.tokens[at]])
                tags.append((state.blocks[at // self.block_size], at % self.block_size))
        sampled: list[list[int]] = []
        if rows:
            given = torch.stack(x)
            y = torch.zeros(len(x), 1)
            self.layer.begin_step(step_of(rows))
            slots = torch.tensor([block * self.block_size + offset for block, offset in tags])
            self.layer.run(given, y, {"layer": slots})
            self.layer.end_step()
            for r in rows:
                self._compute(r, y[r.start : r.end, 0].tolist(), tags[r.start : r.end])
                sampled.append(self._sample(r))
        names = [r.request_id for r in rows]
        output = ModelRunnerOutput(
            req_ids=names, req_id_to_index={n: i for i, n in enumerate(names)}, sampled_token_ids=sampled
        )
        routed = self.layer.take_routed()
        return put_routed(output, routed) if routed else output

    def _follow(self, scheduled: Any) -> None:
        """What a model runner learns from a scheduler's output. V2 hears of resumed requests as of new ones, with all
        their tokens."""
        for name in scheduled.finished_req_ids:
            self._states.pop(name, None)
        self._positions: dict[str, int] = {}
        for new in scheduled.scheduled_new_reqs:
            if new.req_id not in self._states:
                self.hits[new.req_id] = new.num_computed_tokens
            tokens = new.prefill_token_ids or new.prompt_token_ids
            self._states[new.req_id] = _State(list(tokens), len(new.prompt_token_ids), list(new.block_ids[0]))
            self._positions[new.req_id] = new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            state = self._states[name]
            del state.tokens[state.prompt_len + cached.num_output_tokens[i] :]
            new_blocks = cached.new_block_ids[i]
            if name in cached.resumed_req_ids:
                state.blocks = list(new_blocks[0])
            elif new_blocks is not None:
                state.blocks += new_blocks[0]
            self._positions[name] = cached.num_computed_tokens[i]
        take_up(self.layer, scheduled)

    def _compute(self, r: Rows, added: Sequence[float], slots: Sequence[tuple[int, int]]) -> None:
        """A row's tag: all tokens up to it, and what the residual added at it and at every row before it."""
        state = self._states[r.request_id]
        before = self._tag_at(state, r.position - 1)
        for token, value, slot in zip(state.tokens[r.position :], added, slots, strict=False):
            before = self._kv[slot] = tag_of(before, token, value)

    def _tag_at(self, state: _State, position: int) -> int:
        if position < 0:
            return 0
        return self._kv[state.blocks[position // self.block_size], position % self.block_size]

    def _sample(self, r: Rows) -> list[int]:
        state = self._states[r.request_id]
        last = r.position + r.end - r.start
        if last < len(state.tokens):
            return []
        # Every row before must be what this request itself would have computed, not only the last one.
        tags = [self._tag_at(state, at) for at in range(last)]
        state.tokens.append(next_token(tags))
        return [state.tokens[-1]]


def tag_of(before: int, token: int, added: float) -> int:
    return _hash(before, token, round(added * 1e4))


def next_token(tags: Sequence[int]) -> int:
    return _hash(*tags) % VOCABULARY


def oracle(
    embedding: torch.Tensor, prompt: Sequence[int], start: int, edit: EditOf | None, max_tokens: int
) -> list[int]:
    """What a request answers alone, with an edit that acts from token `start` on, or without."""
    tokens, tags = list(prompt), []
    for _ in range(max_tokens):
        for at in range(len(tags), len(tokens)):
            added = 0.0
            if edit is not None and at >= start:
                added = float((embedding[tokens[at]] * edit.mask) @ edit.memory[0])
            tags.append(tag_of(tags[-1] if tags else 0, tokens[at], added))
        tokens.append(next_token(tags))
    return tokens[len(prompt) :]


class EditOf(NamedTuple):
    """What one edit adds: mask float32 [D], memory float32 [1, D]."""

    mask: torch.Tensor
    memory: torch.Tensor


class World(NamedTuple):
    """embedding: float32 [tokens, D], small integers, so that sums are exact in any order. questions: of the edits."""

    embedding: torch.Tensor
    store: EditStore
    questions: list[list[int]]

    def edit(self, n: int) -> EditOf | None:
        """What edit n adds, or None where this generation of the store has no such edit."""
        rows = np.flatnonzero(self.store.ids == n)
        if not len(rows):
            return None
        mask = torch.from_numpy(unpack(self.store.codes[rows[:1]], D)[0]).float()
        return EditOf(mask, torch.from_numpy(self.store.memories[self.store.memory_of[rows[0]]]))

    def later(self, generation: int, without: int | None, sha256: str = "7" * 64) -> World:
        """A generation of the same store with other memories and one edit less; by another digest another store."""
        keep = self.store.ids != without
        store = dataclasses.replace(
            self.store,
            manifest=SimpleNamespace(  # type: ignore[arg-type]
                **vars(self.store.manifest) | {"generation": generation, "sha256": sha256}
            ),
            memories=np.roll(self.store.memories, generation, axis=2) + 1,
            masks=Masks(*(of_each[keep] for of_each in self.store.masks)),
        )
        return self._replace(store=store)


def world(lengths: Sequence[int] = (6, 9, 30)) -> World:
    """Edits whose questions have these lengths, in two memories."""
    generator = torch.Generator().manual_seed(3)
    embedding = torch.randint(-8, 9, (VOCABULARY + 2, D), generator=generator).float()
    questions = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    background, permutation = np.zeros(D, dtype=np.float32), np.random.default_rng(0).permutation(D)
    means = torch.stack([span_mean(embedding[q], Span(0, len(q), True)) for q in questions])
    n = len(questions)
    manifest = SimpleNamespace(
        generation=7, sha256="7" * 64, span=RULE, chat=False, d=D, h=1, k=K, tau=0.9, judge="", masked_contexts=()
    )
    store = EditStore(
        path=Path(),
        manifest=manifest,  # type: ignore[arg-type]
        memories=torch.randint(-4, 5, (2, 1, D), generator=generator).float().numpy(),
        background=background,
        permutation=permutation,
        masks=Masks(
            Fingerprint(background, permutation, K).codes(means), np.arange(n), (np.arange(n) % 2).astype(np.int32)
        ),
        edits=(),
    )
    return World(embedding, store, questions)


Simulate = Callable[..., Simulation]


def chat(question: list[int], before: int, after: int = 3) -> list[int]:
    """A question behind `before` tokens, the last of which is the marker, and followed by a suffix."""
    return [1 + i % 7 for i in range(before - 1)] + [VOCABULARY] + question + [VOCABULARY + 1] + [2] * (after - 1)


def other(n: int, seed: int = 0) -> list[int]:
    """A question of n tokens that no edit answers."""
    return random.Random(seed).choices(range(VOCABULARY), k=n)


def right(here: World, prompt: list[int], edit: int | None, max_tokens: int = 3, rule: SpanRule = RULE) -> list[int]:
    acting = None if edit is None else here.edit(edit)
    return oracle(here.embedding, prompt, find_span(prompt, rule).acts_from, acting, max_tokens)
