"""What a GPU computes for all questions together is what the CPU computes for one after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memoir_retrieval.model.forward import span_mean
from memoir_retrieval.question.span import Span
from memoir_vllm.worker import pooling
from memoir_vllm.worker.block_sums import BlockSums
from memoir_vllm.worker.pooling import _one_by_one, _together, token_weights

RANGES = [(0, 12), (12, 13), (20, 60), (61, 100), (5, 9)]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_together_is_one_by_one(dtype: torch.dtype, weighted: bool) -> None:
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = token_weights(x, weighted)
    for there, here in zip(_together(x, weights, RANGES), _one_by_one(x, weights, RANGES), strict=True):
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5 * float(here.abs().max()))


def test_together_brings_few_rows_to_float32_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one message overlap, so their rows are many more than those of the step."""
    monkeypatch.setattr(pooling, "SLICE", 32)
    summed, reduce = [], torch.segment_reduce

    def segment_reduce(data: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        summed.append(len(data))
        return reduce(data, *args, **options)

    monkeypatch.setattr(torch, "segment_reduce", segment_reduce)
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    weights, ranges = token_weights(x, True), [*RANGES, (0, 100), (7, 23), (7, 24)]
    totals, divisors = _together(x, weights, ranges)
    assert max(summed) == 32 < sum(summed)
    torch.testing.assert_close((totals, divisors), _one_by_one(x, weights, ranges), rtol=1e-5, atol=1e-3)
    for i, part in enumerate(ranges):
        total, divisor = _together(x, weights, [part])
        assert torch.equal(total[0], totals[i]) and torch.equal(divisor[0], divisors[i]), "whoever else is asked"


@pytest.mark.parametrize("weighted", [True, False])
def test_what_is_pooled_is_the_mean_of_the_editor(weighted: bool) -> None:
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    totals, divisors = _one_by_one(x, token_weights(x, weighted), RANGES)
    wanted = [span_mean(x, Span(first, last, weighted)) for first, last in RANGES]
    assert torch.equal(totals / divisors[:, None], torch.stack(wanted))


def test_other_ranks_are_asked_once_and_only_for_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def two_equal_ranks(norms: torch.Tensor) -> torch.Tensor:
        rows.append(len(norms))
        return 2 * norms

    monkeypatch.setattr("vllm.distributed.tensor_model_parallel_all_reduce", two_equal_ranks)
    x = torch.randn(3000, 8)
    token_weights(x, False, 2)
    assert rows == []
    torch.testing.assert_close(token_weights(x, True, 2), 2 * token_weights(x, True))
    assert rows == [3000]


def test_nothing_to_weigh_is_no_reason_for_nan() -> None:
    total, weight = _together(torch.zeros(4, 8), torch.tensor([0.0, 0, 1, 1]), [(0, 2), (2, 4)])
    assert (total / weight[:, None]).tolist() == [[0.0] * 8] * 2


@pytest.mark.parametrize("question", [0, 5, 8, 11])
def test_sums_of_blocks_are_those_of_their_tokens(question: int) -> None:
    """Rows that pass in two steps, in blocks 2, 1 and 4 of 8, and pass again after other rows lay there."""
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    weights = token_weights(x, True)
    positions = np.arange(24)
    slots = torch.tensor([2, 1, 4]).repeat_interleave(8) * 8 + torch.from_numpy(positions % 8)
    sums = BlockSums(5, 8, 64, "cpu")
    begins = (positions % 8 == 0) | (positions == question)
    counted = (positions >= question) | (positions < question // 8 * 8)
    for table in (x.flip(0), x):
        for step in (positions < 13, positions >= 13):
            rows = torch.from_numpy(np.flatnonzero(step & counted))
            sums.add(table[rows], token_weights(table, True)[rows], slots[rows], begins[rows])
    total, weight = sums.of([2, 1, 4][question // 8 :], 24 - question)
    wanted = _one_by_one(x, weights, [(question, 24)])
    torch.testing.assert_close((total[None], weight[None]), wanted, rtol=1e-5, atol=1e-5 * float(total.abs().max()))
    with pytest.raises(RuntimeError, match="never passed the layer"):
        sums.of([2, 1, 4], 23 - question)
