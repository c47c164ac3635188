"""What a GPU computes for all questions together is what the CPU computes for one after the other."""

from __future__ import annotations

import pytest
import torch

from memoir_vllm.worker.pooling import _one_by_one, _together

RANGES = [(0, 12), (12, 13), (20, 60), (61, 100), (5, 9)]


@pytest.mark.parametrize("weighted", [[True, False, True, True, False], [True] * 5, [False] * 5], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_together_is_one_by_one(dtype: torch.dtype, weighted: list[bool]) -> None:
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for there, here in zip(_together(x, RANGES, weighted, 1), _one_by_one(x, RANGES, weighted, 1), strict=True):
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5 * float(here.abs().max()))


def test_together_asks_other_ranks_once_and_only_for_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def two_equal_ranks(norms: torch.Tensor) -> torch.Tensor:
        asked.append(len(norms))
        return 2 * norms

    monkeypatch.setattr("vllm.distributed.tensor_model_parallel_all_reduce", two_equal_ranks)
    x = torch.randn(100, 64)
    for pool in (_together, _one_by_one):
        pool(x, RANGES, [False] * 5, 2)
        assert asked == []
        total, weight = pool(x, RANGES, [True] * 5, 2)
        alone = pool(x, RANGES, [True] * 5, 1)
        torch.testing.assert_close((total, weight), (2 * alone[0], 2 * alone[1]))
        assert asked == [sum(last - first for first, last in RANGES)]
        asked.clear()


def test_nothing_to_weigh_is_no_reason_for_nan() -> None:
    total, weight = _together(torch.zeros(4, 8), [(0, 2), (2, 4)], [True, False], 1)
    assert (total / weight[:, None]).tolist() == [[0.0] * 8] * 2
