"""Adding, removing and reading back rows; refused writes leave the index as it was."""

import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_oracle import random_codes, random_masks

from memoir_index import CodeError, HammingIndex, blocks, pack

D, K = 128, 40


@pytest.fixture
def codes() -> np.ndarray:
    return random_codes(np.random.default_rng(11), 10, D, K)


@pytest.mark.parametrize(
    ("d", "k", "message"),
    [
        (12, 4, "d=12 bits do not fill whole bytes: d must be a positive multiple of 8"),
        (0, 1, "d=0 bits do not fill whole bytes"),
        (-8, 1, "d=-8 bits do not fill whole bytes"),
        (16, 0, r"k=0 ones do not fit a mask of d=16 bits: k must lie in 1\.\.16"),
        (16, 17, "k=17 ones do not fit a mask of d=16 bits"),
    ],
)
def test_an_impossible_mask_size_is_refused(d, k, message):
    with pytest.raises(CodeError, match=message):
        HammingIndex(d, k)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([3, -1], r"edit id -1 at position 1 is refused: ids lie in 0\.\.2\*\*63-1"),
        (np.array([1, 2**63], np.uint64), "edit id 9223372036854775808 at position 1 is refused"),
        ([0.0, 1.0], "ids have dtype float64, not int64"),
        ([True, False], "ids have dtype bool, not int64"),
        (["a", "b"], "ids have dtype <U1, not int64"),
        (7, r"ids have shape \(\), not \[N\]"),
        ([[1, 2]], r"ids have shape \(1, 2\), not \[N\]"),
        ([1, 2, 3], "3 ids for 2 codes: pass one edit id per code"),
        ([], "0 ids for 2 codes"),
    ],
)
def test_bad_ids_are_refused_and_nothing_is_added(codes, ids, message):
    index = HammingIndex.from_codes(D, K, [7], codes[:1])
    with pytest.raises(CodeError, match=message):
        index.add(ids, codes[:2])
    assert index.ids.tolist() == [7]


def test_a_bad_code_is_refused_by_row_and_nothing_is_added(codes):
    index = HammingIndex.from_codes(D, K, [7], codes[:1])
    masks = random_masks(np.random.default_rng(12), 3, D, K)
    masks[1, np.flatnonzero(masks[1])[0]] = False
    with pytest.raises(CodeError, match="code at row 1 has 39 ones, not k=40"):
        index.add([1, 2, 3], pack(masks))
    with pytest.raises(CodeError, match="15 bytes wide, not 16"):
        index.add([1], codes[:1, :15])
    with pytest.raises(CodeError, match="dtype int16, not uint8"):
        index.add([1], codes[:1].astype(np.int16))
    assert len(index) == 1


def test_rows_come_back_in_the_order_of_storing(codes):
    index = HammingIndex(D, K)
    index.add([5, 5, 2], codes[:3])
    index.add(np.array([5], np.int32), codes[3:4])
    index.add([], codes[:0])
    assert index.ids.tolist() == [5, 5, 2, 5] and index.ids.dtype == np.int64
    assert len(index) == 4 and index.edits == 2
    np.testing.assert_array_equal(index.codes, codes[:4])
    for row in range(4):
        np.testing.assert_array_equal(index.code(row), codes[row])


def test_the_index_does_not_share_memory_with_what_was_added(codes):
    given_ids, given_codes = np.arange(10), codes.copy()
    index = HammingIndex.from_codes(D, K, given_ids, given_codes)
    given_ids[:], given_codes[:] = 99, 0
    assert index.ids.tolist() == list(range(10))
    np.testing.assert_array_equal(index.codes, codes)


def test_removal_takes_every_row_of_an_edit_and_ignores_unknown_ids(codes):
    index = HammingIndex.from_codes(D, K, [1, 2, 1, 3, 2], codes[:5])
    before = index.codes
    assert index.remove([8, 9]) == 0 and index.remove([]) == 0
    assert np.shares_memory(index.codes, before)
    assert index.remove([1, 3, 8, 1]) == 3
    assert index.ids.tolist() == [2, 2]
    np.testing.assert_array_equal(index.codes, codes[[1, 4]])
    assert index.search(codes[:1], 1.0).ids.tolist() == [-1]
    assert index.remove([2]) == 2 and len(index) == 0
    index.add([6], codes[:1])
    assert index.search(codes[:1], 1.0).ids.tolist() == [6]


@pytest.mark.parametrize(("ids", "message"), [([-4], "edit id -4 at position 0"), ([1.5], "dtype float64")])
def test_removal_refuses_bad_ids(codes, ids, message):
    index = HammingIndex.from_codes(D, K, [1], codes[:1])
    with pytest.raises(CodeError, match=message):
        index.remove(ids)
    assert len(index) == 1


@pytest.mark.parametrize("row", [-1, 10])
def test_a_row_that_is_not_stored_is_refused(codes, row):
    index = HammingIndex.from_codes(D, K, np.arange(10), codes)
    with pytest.raises(CodeError, match=rf"row {row} is not stored: the index has rows 0\.\.9"):
        index.code(row)


def test_views_are_read_only(codes):
    index = HammingIndex.from_codes(D, K, np.arange(10), codes)
    for view in (index.codes, index.ids, index.code(0)):
        with pytest.raises(ValueError, match="read-only"):
            view[:1] = 0


def test_codes_are_a_view_that_outlives_the_index(codes):
    index = HammingIndex.from_codes(D, K, np.arange(10), codes)
    view, row = index.codes, index.code(4)
    assert np.shares_memory(view, index.codes)
    index.remove(np.arange(10))
    del index
    gc.collect()
    np.ones(view.size * 50, np.uint8)  # gives freed memory a chance to be reused
    np.testing.assert_array_equal(view, codes)
    np.testing.assert_array_equal(row, codes[4])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "remove"]), st.integers(0, 2**32)), max_size=25))
def test_any_sequence_of_writes_leaves_the_rows_a_list_would_hold(writes):
    """In blocks of 16 rows, so that blocks fill up, are renewed, merge and vanish."""
    ids: list[int] = []
    rows: list[bytes] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", 16)
        index = HammingIndex(D, K)
        for what, seed in writes:
            rng = np.random.default_rng(seed)
            some = rng.integers(0, 40, rng.integers(0, 30))
            new = random_codes(rng, len(some), D, K)
            before = index.ids, index.codes
            was = [array.copy() for array in before]
            if what == "remove":
                keep = [i for i, edit in enumerate(ids) if edit not in some]
                assert index.remove(some) == len(ids) - len(keep)
                ids, rows = [ids[i] for i in keep], [rows[i] for i in keep]
            else:
                index.add(some, new)
                ids, rows = ids + some.tolist(), rows + [code.tobytes() for code in new]
            for array, copy in zip(before, was, strict=True):
                np.testing.assert_array_equal(array, copy)  # what a reader holds stays as it is
            assert index.ids.tolist() == ids and len(index) == len(ids)
            assert [code.tobytes() for code in index.codes] == rows
            if ids:
                at = int(rng.integers(len(ids)))
                assert index.code(at).tobytes() == rows[at]
                query = np.frombuffer(rows[at], np.uint8)[None]
                assert index.search(query, 1.0).rows.tolist() == [rows.index(rows[at])]
                got, _ = index.nearest(query, 2)
                assert got[0, 0] == ids[rows.index(rows[at])]
                assert got[0, 1] in (set(ids) - {got[0, 0]} or {-1})


def test_a_write_moves_no_row_that_was_there():
    codes = random_codes(np.random.default_rng(13), 42, D, K)
    index = HammingIndex.from_codes(D, K, np.arange(40), codes[:40])
    first = index.code(0)
    index.add([40], codes[40:41])
    index.remove([9])
    index.remove([8])
    index.add([8], codes[41:])
    assert len(index) == 40 and index.ids[-2:].tolist() == [40, 8]
    assert np.shares_memory(first, index.code(0))


def test_many_rows_are_taken_at_once(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4)
    rng = np.random.default_rng(5)
    codes = random_codes(rng, 23, D, K)
    index = HammingIndex.from_codes(D, K, np.arange(23), codes)
    assert index.remove([2, 9]) == 2  # one row of a block is marked, and one block is written anew
    left = np.delete(codes, [2, 9], axis=0)
    rows = rng.integers(21, size=50)
    np.testing.assert_array_equal(index.take(rows), left[rows])
    assert index.take([]).shape == (0, D // 8)
    for wrong in (-1, 21):
        with pytest.raises(CodeError, match=rf"row {wrong} is not stored: the index has rows 0\.\.20"):
            index.take([0, wrong])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0.9, 1.9], "rows have dtype float64, not int64: pass whole numbers"),
        ([True, False], "rows have dtype bool, not int64: pass whole numbers"),
        ([[0, 1]], r"rows have shape \(1, 2\), not \[N\]: pass a list of row numbers"),
        (1, r"rows have shape \(\), not \[N\]"),
        (np.array([2**63], np.uint64), r"row 9223372036854775808 is not stored: the index has rows 0\.\.9"),
    ],
)
def test_what_are_no_rows_are_not_taken(codes, rows, message):
    index = HammingIndex.from_codes(D, K, np.arange(10), codes)
    with pytest.raises(CodeError, match=message):
        index.take(rows)


def test_an_empty_index_says_that_it_has_no_rows():
    for ask in (lambda: HammingIndex(D, K).take([0]), lambda: HammingIndex(D, K).code(0)):
        with pytest.raises(CodeError, match="row 0 is not stored: the index is empty"):
            ask()


def test_a_damaged_row_is_not_taken(codes):
    damaged = codes.copy()
    damaged[6] = 0
    index = HammingIndex.from_codes(D, K, np.arange(10), damaged, copy=False, checked=True)
    np.testing.assert_array_equal(index.take([5, 7]), codes[[5, 7]])
    with pytest.raises(CodeError, match="code at row 6 has 0 ones"):
        index.take([5, 6])
