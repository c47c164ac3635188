"""The residual on a GPU, without an engine: what is decided, which rows it touches and by how much, and no waiting.

pytest -m gpu tests
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from simulation import Rows, step_of
from vllm.config import CUDAGraphMode

from memoir_index import unpack
from memoir_retrieval.model.forward import span_mean
from memoir_retrieval.question.fingerprint import Fingerprint, permutation
from memoir_retrieval.question.span import Span, SpanRule
from memoir_retrieval.store.read import EditStore, Masks
from memoir_vllm.requests import Query
from memoir_vllm.worker.pooling import pooled, token_weights
from memoir_vllm.worker.residual import ResidualLayer
from memoir_vllm.worker.routing import Router

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LAYERS = {"SmolLM2-135M": (1536, 576, 438), "LLaMA-3-8B": (14336, 4096, 4096)}  # D, H, k
EDITS, TOKENS = 40, 9


class Served(NamedTuple):
    """A layer, its store, and what each edit's question looks like there: [EDITS, TOKENS, D]."""

    layer: ResidualLayer
    store: EditStore
    questions: torch.Tensor

    @property
    def d(self) -> int:
        return int(self.store.manifest.d)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(self.questions.dtype)

    def ask(self, edits: list[int | None], name: str = "r") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step in which each request asks the question of an edit, or of none. Returns x, y before and y after."""
        x = torch.stack([self.random(TOKENS, self.d) if edit is None else self.questions[edit] for edit in edits])
        rows = [Rows(f"{name}{i}", TOKENS * i, TOKENS * (i + 1), 0) for i in range(len(edits))]
        for row in rows:
            self.layer.admit(row.request_id, [5] * TOKENS, Query(Span(0, TOKENS, True)))
            self.layer.resume(row.request_id, (), 0)
        return self.step(rows, x.flatten(0, 1))

    def step(self, rows: list[Rows], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        before = self.random(len(x), int(self.store.manifest.h))
        after = before.clone()
        self.layer.begin_step(step_of(rows))
        self.layer.run(x, after)
        self.layer.end_step()
        return x, before, after

    def wanted(self, edit: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """In float64, of the memory's weights as they are on the device."""
        mask = torch.from_numpy(unpack(self.store.codes[edit][None], self.d)[0]).cuda()
        return y.double() + (x.double() * mask) @ self.layer.now.memories[edit % 2].weight.double().T


@pytest.fixture(scope="module", params=LAYERS)
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return LAYERS[request.param]


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def served(request: pytest.FixtureRequest, shape: tuple[int, int, int]) -> Iterator[Served]:
    d, h, k = shape
    dtype = getattr(torch, request.param)
    torch.manual_seed(0)
    questions = torch.randn(EDITS, TOKENS, d, device="cuda").to(dtype)
    background, perm = np.zeros(d, dtype=np.float32), permutation(d, 0)
    means = torch.stack([span_mean(question, Span(0, TOKENS, True)) for question in questions])
    fields: dict[str, Any] = {"generation": 1, "sha256": "1" * 64, "span": SpanRule(weighted=True), "chat": False}
    fields |= {"d": d, "h": h, "k": k, "tau": 0.9, "judge": "", "masked_contexts": ()}
    store = EditStore(
        path=Path(),
        manifest=SimpleNamespace(**fields),  # type: ignore[arg-type]
        memories=np.random.default_rng(1).standard_normal((2, h, d), dtype=np.float32) / np.float32(k**0.5),
        background=background,
        permutation=perm,
        masks=Masks(
            Fingerprint(background, perm, k).codes(means.cpu()),
            np.arange(EDITS),
            (np.arange(EDITS) % 2).astype(np.int32),
        ),
        edits=(),
    )
    router, memories = Router(store, None, "cuda", str), torch.from_numpy(store.memories)
    yield Served(ResidualLayer(router, memories, dtype=dtype, device="cuda"), store, questions)
    torch.cuda.empty_cache()


def test_every_question_finds_its_edit_alone_and_in_a_batch(served: Served) -> None:
    edits: list[int | None] = [*range(0, EDITS, 2), None, *range(1, EDITS, 2), None]
    served.ask(edits, "batch ")
    together = {name.removeprefix("batch "): routed.decision for name, routed in served.layer.take_routed().items()}
    assert [together[str(i)].edit for i in range(len(edits))] == edits
    for i in range(0, len(edits), 5):
        served.ask(edits[i : i + 1], f"alone {i} ")
        (alone,) = served.layer.take_routed().values()
        assert alone.decision.edit == edits[i]
        assert edits[i] is None or abs(alone.decision.overlap - together[str(i)].overlap) < 1e-3


def test_edited_rows_are_near_and_others_keep_their_bits(served: Served) -> None:
    """Questions first, then steps of one token each, in which every second request is edited."""
    close = max(4 * torch.finfo(served.questions.dtype).eps, 1e-5)
    edits: list[int | None] = [3, None, 4, None, 3, None, 11, None]
    x, before, after = served.ask(edits, "q")
    for position in range(TOKENS, TOKENS + 3):
        for i, edit in enumerate(edits):
            rows = slice(i * len(x) // len(edits), (i + 1) * len(x) // len(edits))
            if edit is None:
                assert torch.equal(after[rows], before[rows])
            else:
                exact = served.wanted(edit, x[rows], before[rows])
                error = (after[rows].double() - exact).abs().max() / exact.abs().max()
                assert error < close, float(error)
        x, before, after = served.step(
            [Rows(f"q{i}", i, i + 1, position) for i in range(len(edits))], served.random(len(edits), served.d)
        )


def test_a_row_does_not_depend_on_the_edits_of_others(served: Served) -> None:
    """The first request's row, among others that match its edit, other edits, or the same in another order."""
    rows = []
    x = served.random(6, served.d)
    for name, edits in {"a": [2] * 6, "b": [2, 4, 6, 8, 10, 12], "c": [2, 12, 8, 4, 2, 2]}.items():
        served.ask(list(edits), name)
        y = torch.ones(6, int(served.store.manifest.h), device="cuda", dtype=x.dtype)
        served.layer.begin_step(step_of([Rows(f"{name}{i}", i, i + 1, TOKENS) for i in range(6)]))
        served.layer.run(x, y)
        rows.append(y[0])
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


def test_a_decode_step_never_waits_for_the_gpu(served: Served) -> None:
    """Nor one in which requests come or go, so that the rows have to be told anew."""
    served.ask([1, None, 5, 6], "w")
    x, y = served.random(4, served.d), served.random(4, int(served.store.manifest.h))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for position, names in enumerate(["w0 w1 w2 w3", "w0 w1 w2 w3", "w3 w0 w1", "w1", "w2 w3"], TOKENS):
            ids = names.split()
            served.layer.begin_step(step_of([Rows(name, i, i + 1, position) for i, name in enumerate(ids)]))
            served.layer.run(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(y).all()


def test_a_graph_adds_what_the_step_in_which_it_is_replayed_says(served: Served) -> None:
    """One graph of eight rows, replayed for steps with other edits, fewer requests and none. It never waits."""
    from memoir_vllm.worker.captured import captured_product

    layer, h, dtype = served.layer, int(served.store.manifest.h), served.questions.dtype
    close = max(4 * torch.finfo(dtype).eps, 1e-5)
    graphs = SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL, max_cudagraph_capture_size=8)
    layer.captured = captured_product(served.d, h, dtype, torch.device("cuda"), graphs)
    assert layer.captured is not None
    x, y = torch.zeros(8, served.d, device="cuda", dtype=dtype), torch.zeros(8, h, device="cuda", dtype=dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.run(x, y)
    assert layer.captured.sizes == {8}
    edits: dict[str, int | None] = {"g0": 3, "g1": None, "g2": 4, "g3": 3, "g4": 11}
    served.ask([*edits.values()], "g")
    for position, names in enumerate(["g0 g1 g2 g3 g4", "g0 g1 g2 g3 g4", "g4 g1", "g1", "g3 g2 g0"], TOKENS):
        ids = names.split()
        x.copy_(served.random(8, served.d))
        y.copy_(before := served.random(8, h))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer.expect(ids)
            assert layer.may_replay(8)
            layer.begin_step(step_of([Rows(name, i, i + 1, position) for i, name in enumerate(ids)]))
            graph.replay()
            layer.end_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for i in range(8):
            edit = edits[ids[i]] if i < len(ids) else None
            if edit is None:
                assert torch.equal(y[i], before[i])
            else:
                exact = served.wanted(edit, x[i : i + 1], before[i : i + 1])[0]
                assert (y[i].double() - exact).abs().max() / exact.abs().max() < close
    layer.captured = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pooled_questions_are_near_float64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(700, shape[0], device="cuda").to(dtype)
    ranges = [(0, 12), (12, 13), (20, 300), (300, 700), (5, 9)]
    totals, weights = pooled(x, token_weights(x, True), ranges)
    for (first, last), total, weight in zip(ranges, totals, weights, strict=True):
        rows = x[first:last].double()
        counts = rows.square().sum(1)
        mean = (rows * counts[:, None]).sum(0) / counts.sum()
        error = (total.double() / weight.double() - mean).abs().max() / mean.abs().max()
        assert error < 1e-6, float(error)


def test_pooling_does_not_depend_on_who_else_is_asked(shape: tuple[int, int, int]) -> None:
    x = torch.randn(300, shape[0], device="cuda").bfloat16()
    weights = token_weights(x, False)
    together, _ = pooled(x, weights, [(0, 100), (100, 117), (117, 300)])
    alone, _ = pooled(x, weights, [(100, 117)])
    assert torch.equal(together[1], alone[0])
