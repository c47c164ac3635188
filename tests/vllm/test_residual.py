"""Pooling, decisions and residual without an engine: random activations, hand-made steps."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from simulation import Rows, step_of
from torch.nn import functional
from vllm.sequence import IntermediateTensors
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec
from vllm.v1.worker.gpu import warmup
from vllm.v1.worker.gpu_worker import Worker

from memoir_index import unpack
from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.model.forward import span_mean
from memoir_retrieval.question.candidates import Pieces
from memoir_retrieval.question.fingerprint import Fingerprint
from memoir_retrieval.question.span import Span, SpanRule, find_span
from memoir_retrieval.store.read import EditStore, Masks
from memoir_vllm.requests import Decision, Query, Routed, put_queries, query_of, routed_of
from memoir_vllm.worker import pipeline, selftest
from memoir_vllm.worker.mixin import MemoirWorker
from memoir_vllm.worker.residual import ResidualLayer
from memoir_vllm.worker.routing import Router
from memoir_vllm.worker.rows import Batch
from memoir_vllm.worker.runner import follow
from memoir_vllm.worker.selftest import self_test

D, H, K, EDITS = 64, 16, 16, 3
RULE = SpanRule(starts=((101,),), end=(102,), weighted=True, acts="last")  # token 101 before a question, 102 after it


def prompt(question: int, before: int = 0, after: int = 0) -> list[int]:
    """Token ids with `before` tokens (the last a marker) around the question."""
    return [1] * (before - 1) + [101] * (before > 0) + [5] * question + [102] * (after > 0) + [1] * (after - 1)


@pytest.fixture
def activations() -> torch.Tensor:
    """What edit e's question of four tokens looks like: float32 [EDITS, 4, D]."""
    return torch.randn(EDITS, 4, D, generator=torch.Generator().manual_seed(1))


def store_of(activations: torch.Tensor, **manifest: Any) -> EditStore:
    """Edit e lies in memory e % 2."""
    n = len(activations)
    background, perm = np.zeros(D, dtype=np.float32), np.random.default_rng(0).permutation(D)
    empty = np.empty((0, D // 8), dtype=np.uint8)
    codes = (
        Fingerprint(background, perm, K).codes(torch.stack([span_mean(a, Span(0, 4, True)) for a in activations]))
        if n
        else empty
    )
    fields = {"generation": 7, "sha256": "7" * 64, "span": RULE, "chat": False, "d": D, "h": H, "k": K, "tau": 0.9}
    fields |= {"judge": "", "masked_contexts": ()}
    fields |= manifest
    return EditStore(
        path=Path(),
        manifest=SimpleNamespace(**fields),  # type: ignore[arg-type]
        memories=np.random.default_rng(1).standard_normal((2, H, D), dtype=np.float32),
        background=background,
        permutation=perm,
        masks=Masks(codes, np.arange(n), (np.arange(n) % 2).astype(np.int32)),
        edits=tuple(StoredEdit(id=i, prompt="", target="", created="", loss=0, steps=0) for i in range(n)),
    )


def layer_of(store: EditStore, tau: float | None = None, **kwargs: Any) -> ResidualLayer:
    return ResidualLayer(Router(store, tau, "cpu", str), torch.from_numpy(store.memories), **kwargs)


@pytest.fixture
def store(activations: torch.Tensor) -> EditStore:
    return store_of(activations)


@pytest.fixture
def layer(store: EditStore) -> ResidualLayer:
    return layer_of(store)


def begin(
    layer: ResidualLayer,
    request_id: str,
    prompt_ids: list[int],
    options: Mapping[str, Any] | None = None,
    *,
    routed: Routed | None = None,
    cached: Sequence[int] = (),
    tokens: int = 0,
) -> None:
    """What a layer hears of a request whose first rows come: `tokens` of its prompt are in the KV blocks `cached`."""
    query = query_of(prompt_ids, options, layer.now.router.rule, Pieces(str))
    layer.admit(request_id, prompt_ids, query._replace(routed=routed))
    layer.resume(request_id, cached, tokens)


def said(layer: ResidualLayer) -> dict[str, Decision]:
    """What the layer has decided since the last call."""
    return {request_id: routed.decision for request_id, routed in layer.take_routed().items()}


def step(layer: ResidualLayer, rows: list[Rows], x: torch.Tensor) -> torch.Tensor:
    """One forward; returns what was added to y, NaN where a row was not touched."""
    y = torch.zeros(len(x), H)
    untouched = y.clone()
    layer.begin_step(step_of(rows))
    layer.run(x, y)
    layer.end_step()
    return torch.where((y == untouched).all(1, keepdim=True), torch.nan, y)


def wanted(store: EditStore, edit: int, x: torch.Tensor) -> torch.Tensor:
    mask = torch.from_numpy(unpack(store.codes[edit][None], D)[0])
    return functional.linear(x * mask, torch.from_numpy(store.memories[edit % 2]))


def test_a_mixed_step(layer: ResidualLayer, store: EditStore, activations: torch.Tensor) -> None:
    """Two memories, an unmatched, an opted-out and an empty prompt; padding rows at the end."""
    noise = torch.randn(20, D)
    begin(layer, "a", prompt(4))
    begin(layer, "b", prompt(4, before=2, after=3), {})
    begin(layer, "none", prompt(4))
    begin(layer, "off", prompt(4), {"memoir": "off"})
    begin(layer, "empty", prompt(0, before=1))
    x = torch.cat([activations[0], noise[:2], activations[1], noise[2:9], activations[1], noise[9:20]])
    rows = [
        Rows("a", 0, 4, 0),
        Rows("b", 4, 13, 0),
        Rows("none", 13, 17, 0),
        Rows("off", 17, 21, 0),
        Rows("empty", 21, 22, 0),
    ]
    added = step(layer, rows, x)
    decisions = said(layer)
    assert {key: (d.edit, d.result) for key, d in decisions.items()} == {
        "a": (0, "matched"),
        "b": (1, "matched"),
        "none": (None, "unmatched"),
        "off": (None, "off"),
        "empty": (None, "unroutable"),
    }
    assert decisions["a"].overlap == 1.0 and decisions["a"].generation == 7
    assert said(layer) == {}
    torch.testing.assert_close(added[3:4], wanted(store, 0, x[3:4]))
    torch.testing.assert_close(added[9:13], wanted(store, 1, x[9:13]))
    assert added[:3].isnan().all() and added[4:9].isnan().all(), "what stands before a question's last token"
    assert added[13:].isnan().all()


def test_generated_tokens_and_recomputed_prompts_are_edited(
    layer: ResidualLayer, store: EditStore, activations: torch.Tensor
) -> None:
    begin(layer, "a", prompt(4, before=2))
    step(layer, [Rows("a", 0, 6, 0)], torch.cat([torch.randn(2, D), activations[0]]))
    for position in (6, 7):  # the second step finds the first one's tensors again
        x = torch.randn(3, D)
        added = step(layer, [Rows("a", 1, 2, position)], x)
        torch.testing.assert_close(added[1:2], wanted(store, 0, x[1:2]))
        assert added[[0, 2]].isnan().all()
    begin(layer, "a", prompt(4, before=2))  # V2 sends a preempted request as a new one
    x = torch.randn(8, D)
    added = step(layer, [Rows("a", 0, 8, 0)], x)
    assert added[:5].isnan().all()
    torch.testing.assert_close(added[5:], wanted(store, 0, x[5:]))
    assert layer.stats()["routed"] == 1


def test_an_id_may_come_back_for_another_request(
    layer: ResidualLayer, store: EditStore, activations: torch.Tensor
) -> None:
    for edit in (0, 1, 2):
        layer.drop({"a"})
        begin(layer, "a", prompt(4))
        step(layer, [Rows("a", 0, 4, 0)], activations[edit])
        x = torch.randn(1, D)
        torch.testing.assert_close(step(layer, [Rows("a", 0, 1, 4)], x), wanted(store, edit, x))
    layer.drop({"a"})
    assert layer.stats()["live"] == 0


def test_stores_that_act_from_the_first_token_do(activations: torch.Tensor) -> None:
    """As older ones do. The whole prompt passes in one step, as it does in mode single."""
    store = store_of(activations, span=msgspec.structs.replace(RULE, acts="first"))
    layer = layer_of(store)
    begin(layer, "a", prompt(4, before=3, after=2))
    x = torch.cat([torch.randn(3, D), activations[1], torch.randn(2, D)])
    added = step(layer, [Rows("a", 0, 9, 0)], x)
    assert added[:3].isnan().all()
    torch.testing.assert_close(added[3:], wanted(store, 1, x[3:]))


@pytest.mark.parametrize("cuts", [(3,), (4,), (6,), (1, 5), (3, 4, 5, 6, 7), (7,), (8,)])
def test_a_prompt_may_be_split_anywhere(
    cuts: tuple[int, ...], layer: ResidualLayer, store: EditStore, activations: torch.Tensor
) -> None:
    """The question is 3 to 7, so the residual acts from token 6 on, in whatever step that passes."""
    begin(layer, "a", prompt(4, before=3, after=2))
    x = torch.cat([torch.randn(3, D), activations[1], torch.randn(2, D)])
    added = []
    for first, last in pairwise((0, *cuts, 9)):
        assert (layer.stats()["routed"] == 1) == (first > 6)
        added.append(step(layer, [Rows("a", 0, last - first, first)], x[first:last]))
    routed = layer.take_routed()["a"]
    assert (routed.decision.edit, routed.decision.overlap, routed.row) == (1, 1.0, 1)
    rows = torch.cat(added)
    assert rows[:6].isnan().all()
    torch.testing.assert_close(rows[6:], wanted(store, 1, x[6:]))


def test_a_preemption_begins_the_sum_again(layer: ResidualLayer, activations: torch.Tensor) -> None:
    begin(layer, "a", prompt(4, before=3))
    x = torch.cat([torch.randn(3, D), activations[1]])
    step(layer, [Rows("a", 0, 5, 0)], x[:5])
    layer.resume("a", (), 0)
    step(layer, [Rows("a", 0, 6, 0)], x[:6])
    assert said(layer) == {}
    step(layer, [Rows("a", 0, 1, 6)], x[6:])
    assert (said(layer)["a"].edit, layer.stats()["routed"]) == (1, 1)


@pytest.mark.parametrize("position", [0, 3, 5, 7])
def test_a_gap_in_an_undecided_prompt_raises(layer: ResidualLayer, position: int) -> None:
    begin(layer, "a", prompt(7, before=3))
    step(layer, [Rows("a", 0, 6, 0)], torch.randn(6, D))
    with pytest.raises(RuntimeError, match=r"goes on at token . of its prompt, but was at 6"):
        layer.begin_step(step_of([Rows("a", 0, 2, position)]))


@pytest.mark.parametrize(("sums", "tokens"), [(False, 4), (True, 8)])
def test_what_decides_must_not_come_from_the_cache(layer: ResidualLayer, sums: bool, tokens: int) -> None:
    if sums:
        layer.watch_blocks(4, 4)
    with pytest.raises(RuntimeError, match=f"finds {tokens} tokens .* its question is 3 to 7"):
        begin(layer, "a", prompt(4, before=3, after=5), cached=(1, 2), tokens=tokens)


def test_what_the_scheduler_remembers_is_not_looked_up(
    layer: ResidualLayer, store: EditStore, activations: torch.Tensor
) -> None:
    """The second request finds its question in the cache and computes the last token only."""
    begin(layer, "a", prompt(4))
    step(layer, [Rows("a", 0, 4, 0)], activations[1])
    routed = layer.take_routed()["a"]
    begin(layer, "b", prompt(4), routed=routed, cached=(1,), tokens=3)
    x = torch.randn(1, D)
    torch.testing.assert_close(step(layer, [Rows("b", 0, 1, 3)], x), wanted(store, 1, x))
    assert layer.take_routed() == {}
    begin(layer, "c", prompt(4), routed=Routed(Decision(None, 0.1, "unmatched", 7)), tokens=3)
    assert step(layer, [Rows("c", 0, 1, 3)], x).isnan().all()
    with pytest.raises(RuntimeError, match="generation 6"):
        begin(layer, "d", prompt(4), routed=Routed(Decision(1, 1.0, "matched", 6), 1))


def test_dummy_steps_do_nothing(layer: ResidualLayer) -> None:
    y = torch.zeros(4, H)
    layer.run(torch.randn(4, D), y)
    assert not y.any()
    assert layer.stats()["steps"] == 0


def test_tau(store: EditStore, activations: torch.Tensor) -> None:
    """tau 1 asks for the very mask; a blend of two questions matches only where tau allows it."""
    blend = 0.6 * activations[0] + 0.4 * activations[1]
    results = {}
    for tau in (None, 1.0, 0.01):
        layer = layer_of(store, tau)
        for name, x in (("same", activations[0]), ("blend", blend)):
            begin(layer, name, prompt(4))
            step(layer, [Rows(name, 0, 4, 0)], x)
        results[tau] = [d.result for d in said(layer).values()]
    assert results == {
        None: ["matched", "unmatched"],
        1.0: ["matched", "unmatched"],
        0.01: ["matched", "matched"],
    }


def test_an_empty_store_serves_the_base_model() -> None:
    layer = layer_of(store_of(torch.empty(0, 4, D)))
    begin(layer, "a", prompt(4))
    assert step(layer, [Rows("a", 0, 4, 0)], torch.randn(4, D)).isnan().all()
    assert said(layer)["a"].overlap == 0.0


def test_overflowing_activations_stop_nobody(layer: ResidualLayer, activations: torch.Tensor) -> None:
    begin(layer, "bad", prompt(4))
    begin(layer, "good", prompt(4))
    x = torch.cat([torch.full((4, D), torch.inf), activations[2]])
    step(layer, [Rows("bad", 0, 4, 0), Rows("good", 4, 8, 0)], x)
    assert [d.result for d in said(layer).values()] == ["unroutable", "matched"]


def test_an_unchecked_bad_option_is_answered_not_raised(layer: ResidualLayer) -> None:
    begin(layer, "a", prompt(4), {"memoir": "on"})
    assert said(layer)["a"].result == "unroutable"


def test_shards_add_up_to_the_whole(
    store: EditStore, activations: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, each with half of D: the same decision, and partial sums whose sum is the residual."""
    x = activations[1]
    mean, seen = span_mean(x, Span(0, len(x), True)), []
    weight = x.square().sum()

    def gather(share: torch.Tensor, dim: int) -> torch.Tensor:
        """The two shares side by side; each rank has added its divisor up in an order of its own."""
        assert share.shape == (1, D // 2 + 1)
        shares = [torch.cat([of_rank, weight[None] * (1 + rank)]) for rank, of_rank in enumerate(mean.chunk(2))]
        return torch.cat(shares)[None]

    monkeypatch.setattr("vllm.distributed.tensor_model_parallel_all_gather", gather)
    route = Router.route
    monkeypatch.setattr(Router, "route", lambda self, both, *rest: seen.append(both) or route(self, both, *rest))
    monkeypatch.setattr("vllm.distributed.tensor_model_parallel_all_reduce", lambda _: x.square().sum(1))
    total = torch.zeros(1, H)
    for rank in range(2):
        layer = layer_of(store, rank=rank, ranks=2)
        begin(layer, "a", prompt(4))
        share = x[:, rank * D // 2 : (rank + 1) * D // 2]
        total += step(layer, [Rows("a", 0, 4, 0)], share)[3:]
        assert said(layer)["a"].edit == 1
    torch.testing.assert_close(total, wanted(store, 1, x[3:]))
    assert all(torch.equal(both.means[0], mean) and torch.equal(both.weights, weight[None]) for both in seen)


class FakeRunner:
    """A model of one projection, with the interface of a model runner that `self_test` and `follow` use."""

    def __init__(self, layer: ResidualLayer, *, calls_op: bool = True, uses_output: bool = True, stale: float = 0.0):
        self.stale = stale  # what a dummy step finds in memory that nothing has written
        self.layer, self.calls_op, self.uses_output = layer, calls_op, uses_output
        self.input_batch = SimpleNamespace(req_ids=["b", "a"], num_computed_tokens_cpu=np.array([0, 0, 9, 9]))
        self.output: Any = SimpleNamespace()
        self.device = torch.device("cuda")

    def get_model(self) -> object:
        return self

    def _dummy_run(self, n: int, uniform_decode: bool) -> tuple[torch.Tensor, None]:
        y = torch.zeros(n, H)
        if self.calls_op:
            self.layer.run(torch.ones(n, D), y)
        return (y if self.uses_output else torch.zeros(n, H)) + self.stale, None

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> str:
        return "prepared"

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> None:
        self._prepare_inputs(scheduler_output, np.array([4, 4]))
        self.layer.run(scheduler_output.x, scheduler_output.y)

    def sample_tokens(self) -> Any:
        return self.output


def test_self_test_passes_a_sound_model(layer: ResidualLayer) -> None:
    self_test(FakeRunner(layer), layer)
    assert layer.probe is None
    assert layer.stats()["steps"] == 0


@pytest.mark.parametrize("stale", [1e6, 1e9, 1e18, 1e30])
def test_self_test_is_felt_in_hidden_states_of_any_size(layer: ResidualLayer, stale: float) -> None:
    self_test(FakeRunner(layer, stale=stale), layer)


@pytest.mark.parametrize("broken", [{"calls_op": False}, {"uses_output": False}], ids=str)
def test_self_test_refuses_a_model_that_goes_past_the_op(layer: ResidualLayer, broken: Mapping[str, bool]) -> None:
    with pytest.raises(ConfigError, match="self-test"):
        self_test(FakeRunner(layer, **broken), layer)
    assert layer.probe is None


@pytest.mark.parametrize("uses_output", [True, False])
@pytest.mark.parametrize("stale", [float("nan"), float("inf")])
def test_self_test_says_where_hidden_states_prove_nothing(
    layer: ResidualLayer, monkeypatch: pytest.MonkeyPatch, stale: float, uses_output: bool
) -> None:
    log: list[str] = []
    monkeypatch.setattr(selftest.logger, "warning", lambda text, *values: log.append(text % values))
    self_test(FakeRunner(layer, stale=stale, uses_output=uses_output), layer)
    proven = uses_output and stale == float("inf")  # which a probe of NaN turns into NaN
    assert ["is not proven" in line for line in log] == [] if proven else [True]


def test_self_test_refuses_a_wrong_residual(layer: ResidualLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batch, "add", lambda self, x, y: None)
    with pytest.raises(ConfigError, match="wrong by"):
        self_test(FakeRunner(layer), layer)


def test_self_test_probes_no_graph_that_has_captured_the_op(layer: ResidualLayer) -> None:
    """Neither without the probe: another graph may round otherwise, which would pass for the probe."""
    runner, allowed = FakeRunner(layer), []
    dummy_run = runner._dummy_run

    def seen(n: int, uniform_decode: bool) -> tuple[torch.Tensor, None]:
        allowed.append(layer.may_replay(n))
        return dummy_run(n, uniform_decode)

    runner._dummy_run = seen  # type: ignore[method-assign]
    self_test(runner, layer)
    assert len(allowed) > 1 and not any(allowed) and layer.may_replay(1)


@pytest.mark.parametrize("captured", [False, True], ids=["without the product", "with the product"])
def test_a_full_graph_is_replayed_while_no_prompt_passes_and_no_edit_acts_outside_of_it(
    captured: bool, layer: ResidualLayer, activations: torch.Tensor
) -> None:
    if captured:
        layer.captured = SimpleNamespace(sizes={8}, fill=lambda batches: None)  # type: ignore[assignment]
    begin(layer, "edited", prompt(4))
    begin(layer, "off", prompt(4), {"memoir": "off"})
    begin(layer, "other", prompt(4))
    replays = {}

    def may(*ids: str, rows: int = 8) -> bool:
        layer.expect(ids)
        return layer.may_replay(rows)

    assert not may("edited") and not may("off", "other") and may()
    x = torch.cat([activations[1], activations[1], torch.ones(4, D)])
    step(layer, [Rows("edited", 0, 4, 0), Rows("off", 4, 8, 0), Rows("other", 8, 12, 0)], x)
    layer.end_step()
    assert {name: r.edit for name, r in said(layer).items()} == {"edited": 1, "off": None, "other": None}
    for ids in (["edited"], ["off", "edited"], ["off", "other"], ["other"]):
        replays[" ".join(ids)] = may(*ids)
        layer.end_step()
        assert layer.may_replay(8), "a dummy step comes between steps"
    assert replays == {"edited": captured, "off edited": captured, "off other": True, "other": True}
    assert not may("edited", rows=4) and may("other", rows=4), "a graph of another size has no product"
    layer.drop(["edited"])
    assert may("edited", rows=4)


def test_the_captured_product_is_told_the_rows_of_steps_without_prompts(
    layer: ResidualLayer, activations: torch.Tensor
) -> None:
    """Such a step may be a replay: then its rows are counted here, since no Python of the op runs."""
    tables: list[list[list[int]]] = []
    layer.captured = SimpleNamespace(  # type: ignore[assignment]
        sizes={2}, fill=lambda batches: tables.append([batch.index.tolist() for batch in batches])
    )
    begin(layer, "a", prompt(4))
    begin(layer, "b", prompt(4))
    layer.expect(["a", "b"])
    step(layer, [Rows("a", 0, 4, 0), Rows("b", 4, 8, 0)], torch.cat([torch.ones(4, D), activations[1]]))
    layer.end_step()
    assert not tables
    for replays in (True, False):
        before = layer.stats()
        layer.expect(["a", "b"])
        layer.begin_step(step_of([Rows("a", 0, 1, 4), Rows("b", 1, 2, 4)]))
        layer.replays = replays
        if not replays:
            layer.run(torch.zeros(2, D), torch.zeros(2, H))
        layer.require_run()
        layer.end_step()
        assert [layer.stats()[name] - before[name] for name in ("steps", "rows")] == [1, 1]
    layer.expect(["a"])
    layer.begin_step(step_of([Rows("a", 0, 1, 5)]))
    layer.end_step()
    layer.idle()
    layer.expect([])
    assert tables == [[[1]], [[1]], [], [], []]


def test_a_new_generation_shares_the_memories_that_are_as_they_were(layer: ResidualLayer) -> None:
    before = layer.now
    memories = torch.stack([memory.weight.clone() for memory in before.memories])
    changed, longer = memories.clone(), torch.cat([memories, torch.ones(1, H, D)])
    changed[0, 0, 0] += 1
    assert layer.load(before.router, memories).memories[0] is not before.memories[0]
    assert all(map(operator.is_, layer.load(before.router, longer, before).memories, before.memories))
    now = layer.load(before.router, changed, before).memories
    assert now[0] is not before.memories[0] and torch.equal(now[0].weight, changed[0])
    assert [*map(operator.is_, now, before.memories)] == [False, *[True] * (len(memories) - 1)]


def test_a_step_that_leaves_out_an_op_it_needs_raises(layer: ResidualLayer, activations: torch.Tensor) -> None:
    begin(layer, "a", prompt(4))
    layer.expect(["a"])
    layer.require_run()  # no rows were prepared: vLLM had nothing to run
    layer.begin_step(step_of([Rows("a", 0, 4, 0)]))
    with pytest.raises(RuntimeError, match="has not run the edited layer's op"):
        layer.require_run()
    layer.run(activations[1], torch.zeros(4, H))
    layer.require_run()
    layer.end_step()
    layer.require_run()


def test_following_a_runner(layer: ResidualLayer, activations: torch.Tensor) -> None:
    """The batch's order, not the scheduler's; decisions travel with the output; finished ids go first."""
    runner = FakeRunner(layer)
    assert follow(runner, layer) == "V1"
    fields = {"prompt_token_ids": prompt(4), "sampling_params": None, "block_ids": ([],), "num_computed_tokens": 0}
    scheduled = SimpleNamespace(
        finished_req_ids=set(),
        scheduled_new_reqs=[SimpleNamespace(req_id=name, **fields) for name in "ab"],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
        num_scheduled_tokens={"a": 4, "b": 4},
        x=torch.cat([activations[1], activations[0]]),
        y=torch.zeros(8, H),
    )
    runner.execute_model(put_queries(scheduled, dict.fromkeys("ab", Query(find_span(prompt(4), RULE)))))
    assert {k: r.decision.edit for k, r in routed_of(runner.sample_tokens()).items()} == {"a": 0, "b": 1}
    runner.output = SimpleNamespace(get_output=lambda: SimpleNamespace(tokens=3), more=4)
    begin(layer, "off", prompt(4), {"memoir": "off"})
    delayed = runner.sample_tokens()
    assert delayed.more == 4
    assert routed_of(delayed.get_output())["off"].decision.result == "off"
    assert layer.stats()["live"] == 3


class FakeV2Runner(FakeRunner):
    """What vLLM's warm-up asks of a model runner V2; `ran` says how many rows each step had."""

    def __init__(self, layer: ResidualLayer):
        super().__init__(layer)
        self.ran: list[int] = []
        spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
        self.adaptive_verification = self.rejection_sampler = self.kv_block_zeroer = None
        self.speculative_config = None  # asked for since vLLM 0.33
        self.num_speculative_steps, self.decode_query_len, self.max_model_len = 0, 1, 256
        self.is_pooling_model = self.is_encoder_decoder = False
        self.is_last_pp_rank = True
        self.model_state = SimpleNamespace(max_encoder_len=0)
        self.scheduler_config = SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=64)
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)], num_blocks=100)
        self.kv_connector = SimpleNamespace(set_disabled=lambda disabled: None)
        self.max_num_reqs = 4
        self.model_config = SimpleNamespace(get_vocab_size=lambda: 100)
        self.vllm_config = SimpleNamespace(is_mm_encoder_only=False, num_lookahead_tokens=0)

    def prepare_inputs(self, scheduled: Any) -> Any:
        counts = scheduled.num_scheduled_tokens
        held = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        held |= zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        return SimpleNamespace(
            req_ids=list(counts),
            query_start_loc_np=np.cumsum([0, *counts.values()]),
            num_computed_tokens_np=np.array([held[name] for name in counts]),
        )

    def execute_model(self, scheduled: Any, intermediate_tensors: Any = None) -> None:
        if tokens := scheduled.total_num_scheduled_tokens:
            self.prepare_inputs(scheduled)
            y = torch.zeros(tokens, H)
            self.layer.run(torch.ones(tokens, D), y)
            assert not y.any()
            self.ran.append(tokens)

    def sample_tokens(self, grammar_output: Any) -> Any:
        return SimpleNamespace()


class FakeMachine(Worker):
    """Of vLLM's worker only that it warms its kernels up."""

    def __init__(self, runner: FakeV2Runner):
        self.model_runner = runner

    def compile_or_warm_up_model(self) -> None:
        runner = self.model_runner
        warmup.warmup_kernels(runner, runner.execute_model, runner.sample_tokens)
        assert warmup.run_mixed_prefill_decode_warmup(runner, runner.execute_model, runner.sample_tokens, 8)


class MemoirMachine(MemoirWorker, FakeMachine):
    pass


def test_vllms_warm_up_brings_requests_of_its_own(layer: ResidualLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No scheduler has sent their queries; without one, a request is refused once the engine serves."""
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    runner = FakeV2Runner(layer)
    layer.watch_blocks(100, 16)
    worker = MemoirMachine(runner)
    worker._memoir = layer
    assert follow(runner, layer) == "V2"
    worker.compile_or_warm_up_model()
    assert len(runner.ran) > 4 and layer.stats()["live"] == 0
    assert (layer.stats()["routed"], layer.take_routed()) == (0, {})
    with pytest.raises(KeyError, match="_warmup_0_"):
        FakeMachine(runner).compile_or_warm_up_model()


@pytest.mark.parametrize("ranks", range(1, 9))
def test_decisions_go_from_stage_to_stage(ranks: int) -> None:
    """The first of three stages decides; what each stage's model sees is what vLLM has sent."""
    routed = {"a": Routed(Decision(3, 0.9321, "matched", 7), 5), "é": Routed(Decision(None, 0.1, "unmatched", 7))}
    sent = IntermediateTensors({"hidden_states": torch.ones(2, 3)})
    for _ in range(2):
        pipeline.load(sent, routed, ranks)
        (size,) = {tensor.numel() for key, tensor in sent.items() if key != "hidden_states"}
        assert ranks == 1 or size % ranks, "vLLM would split it"
        assert pipeline.unload(sent) == routed
        assert list(sent.tensors) == ["hidden_states"]
    pipeline.load(sent, {}, ranks)
    assert list(sent.tensors) == ["hidden_states"] and pipeline.unload(sent) == pipeline.unload(None) == {}


class FirstStage(FakeRunner):
    """Hands its activations on instead of sampling."""

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> IntermediateTensors:
        super().execute_model(scheduler_output)
        return IntermediateTensors({"hidden_states": scheduler_output.y})

    def sample_tokens(self) -> Any:
        return self.output


class LaterStage(FakeRunner):
    """Has seen only what vLLM sends when its model runs."""

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> None:
        assert list(intermediate_tensors.tensors) == ["hidden_states"]


def test_the_last_stage_tells_what_the_first_has_decided(
    layer: ResidualLayer, activations: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memoir_vllm.worker.runner.get_tensor_model_parallel_world_size", lambda: 2)
    first, last = FirstStage(layer), LaterStage(layer)
    follow(first, layer)
    follow(last, None)
    fields = {"prompt_token_ids": prompt(4), "sampling_params": None, "block_ids": ([],), "num_computed_tokens": 0}
    for names, edits in (("ab", {"a": 0, "b": 1}), ("", {})):
        scheduled = SimpleNamespace(
            finished_req_ids=set(),
            scheduled_new_reqs=[SimpleNamespace(req_id=name, **fields) for name in names],
            scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
            num_scheduled_tokens={"a": 4, "b": 4},
            x=torch.cat([activations[1], activations[0]]),
            y=torch.zeros(8, H),
        )
        handed_on = first.execute_model(put_queries(scheduled, dict.fromkeys(names, Query(find_span(prompt(4), RULE)))))
        assert routed_of(first.sample_tokens()) == {}
        last.output = SimpleNamespace()
        last.execute_model(scheduled, handed_on)
        assert {k: r.decision.edit for k, r in routed_of(last.sample_tokens()).items()} == edits
