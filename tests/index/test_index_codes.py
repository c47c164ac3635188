"""Packing, counting and checking of codes, and the rule that turns tau into whole bits."""

from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from index_oracle import random_codes, random_masks

from memoir_index import (
    CodeError,
    MemoirError,
    check_codes,
    hamming_radius,
    overlap_from_hamming,
    pack,
    popcount,
    unpack,
)
from memoir_index.codes import _popcount_table


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@given(st.integers(0, 5), st.integers(1, 20), st.integers(0, 2**32))
def test_unpack_undoes_pack(n, width, seed):
    masks = np.random.default_rng(seed).random((n, 8 * width)) < 0.3
    codes = pack(masks)
    assert codes.shape == (n, width) and codes.dtype == np.uint8
    back = unpack(codes, 8 * width)
    assert back.dtype == np.bool_
    np.testing.assert_array_equal(back, masks)


def test_bits_are_packed_in_little_order():
    mask = np.zeros((1, 16), dtype=bool)
    mask[0, [0, 3, 9]] = True
    np.testing.assert_array_equal(pack(mask), [[0b1001, 0b10]])


@pytest.mark.parametrize("width", [1, 7, 8, 192])
def test_popcount_counts_ones(rng, width):
    masks = rng.random((20, 8 * width)) < 0.4
    for counts in (popcount(pack(masks)), _popcount_table(pack(masks))):
        assert counts.dtype == np.int64
        np.testing.assert_array_equal(counts, masks.sum(axis=1))


def test_popcount_of_no_rows_and_of_a_strided_view(rng):
    assert popcount(np.empty((0, 8), np.uint8)).shape == (0,)
    codes = random_codes(rng, 6, 128, 40)
    np.testing.assert_array_equal(popcount(codes[::2]), [40] * 3)


def test_overlap_from_hamming():
    overlaps = overlap_from_hamming(np.array([0, 2, 438, 876], dtype=np.int32), 438)
    assert overlaps.dtype == np.float64
    np.testing.assert_array_equal(overlaps, [1, 437 / 438, 0.5, 0])


@pytest.mark.parametrize(
    ("tau", "k", "needed"),
    [(0.5, 438, 219), (0.07, 100, 7), (0.55, 100, 55), (0.1, 30, 3), (1.0, 4096, 4096), (1e-12, 100, 1)],
)
def test_radius_of_known_thresholds(tau, k, needed):
    assert hamming_radius(tau, k) == 2 * (k - needed)


@given(st.integers(1, 1000), st.integers(1, 8192))
def test_radius_follows_the_decimal_that_was_written(thousandths, k):
    needed = ceil(Fraction(thousandths, 1000) * k)
    assert hamming_radius(thousandths / 1000, k) == 2 * (k - needed)


@given(st.integers(1, 8192), st.data())
def test_an_overlap_used_as_threshold_is_reached(k, data):
    bits = data.draw(st.integers(1, k))
    assert hamming_radius(bits / k, k) == 2 * (k - bits)


@pytest.mark.parametrize("tau", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_tau_outside_its_range_is_refused(tau):
    with pytest.raises(CodeError, match=rf"^tau={tau} is outside \(0, 1\]: .*0\.5"):
        hamming_radius(tau, 10)


def test_check_codes_returns_contiguous_codes_and_copies_only_if_needed(rng):
    codes = random_codes(rng, 6, 64, 20)
    assert check_codes(codes, 64, 20) is codes
    strided = check_codes(codes[::2], 64, 20)
    assert strided.flags.c_contiguous
    np.testing.assert_array_equal(strided, codes[::2])
    assert check_codes(np.asfortranarray(codes), 64, 20).flags.c_contiguous


def test_check_codes_names_the_first_bad_row(rng):
    masks = random_masks(rng, 5, 64, 20)
    masks[2] = masks[4] = False
    masks[2, :3] = True
    with pytest.raises(CodeError, match=r"^code at row 2 has 3 ones, not k=20: .*d=64$"):
        check_codes(pack(masks), 64, 20)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((2, 8), np.int64), r"dtype int64, not uint8: .*pack\(masks\)"),
        (np.zeros((2, 64), np.bool_), r"dtype bool, not uint8: .*pack\(masks\)"),
        (np.zeros(8, np.uint8), r"shape \(8,\), not \[N, D/8\]: .*`code\[None\]`"),
        (np.zeros((2, 7), np.uint8), r"7 bytes wide, not 8: .*d=64"),
        (np.zeros((0, 7), np.uint8), r"7 bytes wide, not 8: .*d=64"),
    ],
)
def test_codes_of_the_wrong_form_are_refused(codes, message):
    with pytest.raises(CodeError, match=message):
        check_codes(codes, 64, 20)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.zeros((2, 16)), r"dtype float64, not bool: pass `masks != 0`"),
        (np.zeros(16, bool), r"shape \(16,\), not \[N, D\]: .*`mask\[None\]`"),
        (np.zeros((2, 12), bool), r"d=12 bits do not fill whole bytes: .*multiple of 8"),
        (np.zeros((2, 0), bool), r"d=0 bits do not fill whole bytes"),
    ],
)
def test_masks_of_the_wrong_form_are_refused(masks, message):
    with pytest.raises(CodeError, match=message):
        pack(masks)


def test_unpack_and_popcount_refuse_what_is_not_codes():
    with pytest.raises(CodeError, match=r"2 bytes wide, not 3: .*d=24"):
        unpack(np.zeros((1, 2), np.uint8), 24)
    with pytest.raises(CodeError, match="dtype float64, not uint8"):
        popcount(np.zeros((1, 2)))


def test_errors_can_be_caught_as_value_errors():
    assert issubclass(CodeError, MemoirError) and issubclass(CodeError, ValueError)
