"""TopHash: exactly k ones, ties to the lowest position, the same mask whatever the device would do with ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memoir_index import popcount, unpack
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.question.fingerprint import Fingerprint, _top_of_tensor, permutation, top_mask


def oracle(values: np.ndarray, k: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])


def by_stable_sort(values: torch.Tensor, k: int) -> np.ndarray:
    """The definition: a stable sort puts the lowest position first among equals, on every device."""
    chosen = torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros(values.shape, dtype=torch.bool).scatter_(1, chosen, True).numpy()


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=8, max_size=64), st.data())
def test_heavy_ties_go_to_the_lowest_position(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    row = torch.tensor(values, dtype=torch.bfloat16).float()
    for mask in (top_mask(row[None], k), _top_of_tensor(row[None], k)):
        assert set(np.flatnonzero(np.asarray(mask)[0]).tolist()) == oracle(row.numpy(), k)


def _rows(kind: str, d: int) -> torch.Tensor:
    values = torch.randn(9, d, generator=torch.Generator().manual_seed(d))
    match kind:
        case "bfloat16":
            return values.bfloat16().abs()
        case "relu":  # the k-th largest is a zero
            return (values - 1).relu()
        case "signed zeros":
            return torch.where(values > 0.8, values, torch.where(values > 0, 0.0, -0.0))
        case "coarse":
            return (values * 2).round()
        case "sorted":  # no sample of every n-th entry sees the largest
            values = values.abs() * 0.01
            values[:, 1::4] += 5
            return values
        case "infinite":
            values[:, ::3] = torch.inf
            values[:, 1::3] = -torch.inf
            return values
        case "constant":
            return torch.full((2, d), 0.25)
    return values


@pytest.mark.parametrize(
    "kind", ["plain", "bfloat16", "relu", "signed zeros", "coarse", "sorted", "infinite", "constant"]
)
@pytest.mark.parametrize(("d", "k"), [(14336, 4096), (1536, 438), (16, 5), (8, 8), (4096, 1)])
def test_the_fast_ways_choose_what_a_stable_sort_chooses(kind: str, d: int, k: int) -> None:
    values = _rows(kind, d)
    expected = by_stable_sort(values.float(), k)
    np.testing.assert_array_equal(top_mask(values, k), expected)
    np.testing.assert_array_equal(_top_of_tensor(values, k).numpy(), expected)  # what a GPU runs


def test_rows_of_every_kind_beside_each_other() -> None:
    """Rows are done several at a time: what one takes, such as the whole of it, is nothing to the next."""
    d, k = 4096, 1170
    kinds = ["plain", "relu", "bfloat16", "constant", "infinite", "sorted", "coarse", "signed zeros"]
    values = torch.stack([_rows(kind, d)[turn % 2].float() for turn in range(3) for kind in kinds])
    values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    np.testing.assert_array_equal(top_mask(values, k), by_stable_sort(values, k))


def test_no_rows_and_strided_rows() -> None:
    assert top_mask(torch.empty(0, 32), 5).shape == (0, 32)
    values = torch.randn(64, 50).T
    np.testing.assert_array_equal(top_mask(values, 7), by_stable_sort(values, 7))


def test_codes_are_the_permuted_top_k_of_the_distance_from_the_background() -> None:
    d, k = 64, 10
    rng = np.random.default_rng(1)
    background, perm = rng.standard_normal(d).astype("f4"), permutation(d, 3)
    means = torch.from_numpy(rng.standard_normal((19, d)).astype("f4"))
    fingerprint = Fingerprint(background, perm, k)
    codes = fingerprint.codes(means)
    np.testing.assert_array_equal(fingerprint._codes_there(means), codes)  # what a GPU runs
    assert codes.dtype == np.uint8 and codes.shape == (19, d // 8) and (popcount(codes) == k).all()
    for row, bits in zip(means.numpy(), unpack(codes, d), strict=True):
        assert set(np.flatnonzero(bits)) == {int(perm[i]) for i in oracle(np.abs(row - background), k)}


def test_a_row_without_any_signal_still_has_k_ones() -> None:
    codes = Fingerprint(np.zeros(16, "f4"), np.arange(16), 5).codes(torch.zeros(1, 16))
    assert np.flatnonzero(unpack(codes, 16)[0]).tolist() == [0, 1, 2, 3, 4]


def test_the_permutation_is_fixed_by_its_seed() -> None:
    assert permutation(8, 0).tolist() == permutation(8, 0).tolist() != permutation(8, 1).tolist()
    assert sorted(permutation(100, 7)) == list(range(100))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="k is 17, but the layer has D=16"):
        Fingerprint(np.zeros(16, "f4"), np.arange(16), 17)
    fingerprint = Fingerprint(np.zeros(16, "f4"), np.arange(16), 5)
    for codes in (fingerprint.codes, fingerprint._codes_there):
        means = torch.randn(3, 16)
        means[1, 4] = torch.nan
        with pytest.raises(ConfigError, match="NaN"):
            codes(means)
