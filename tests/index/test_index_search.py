"""Lookup against an exhaustive oracle: thresholds, ties, several rows per edit, runners-up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_oracle import (
    oracle_nearest,
    oracle_search,
    random_codes,
    random_masks,
    with_overlap,
)

from memoir_index import CodeError, HammingIndex, pack


def assert_same(hits, expected):
    assert hits.ids.dtype == hits.rows.dtype == np.int64 and hits.overlaps.dtype == np.float64
    np.testing.assert_array_equal(hits.ids, expected.ids)
    np.testing.assert_array_equal(hits.rows, expected.rows)
    np.testing.assert_array_equal(hits.overlaps, expected.overlaps)


@st.composite
def stored_and_queries(draw):
    """Few bits and repeated rows, so that ties and rows exactly at tau are common."""
    d = draw(st.sampled_from([8, 16, 24, 64, 72, 136]))
    k = draw(st.integers(1, min(d, 24)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n = draw(st.integers(0, 40))
    stored = random_codes(rng, n, d, k)
    if n and draw(st.booleans()):
        stored = stored[rng.integers(0, n, n)]
    ids = rng.integers(0, draw(st.integers(1, 30)), n)
    queries = random_codes(rng, draw(st.integers(0, 6)), d, k)
    if n and len(queries):
        queries[0] = stored[rng.integers(n)]
    return d, k, ids, stored, queries


@settings(max_examples=200, deadline=None)
@given(stored_and_queries(), st.data())
def test_search_equals_the_exhaustive_lookup(case, data):
    d, k, ids, stored, queries = case
    needed = data.draw(st.integers(1, k))
    index = HammingIndex.from_codes(d, k, ids, stored)
    assert_same(index.search(queries, needed / k), oracle_search(queries, ids, stored, d, k, needed))


@settings(max_examples=200, deadline=None)
@given(stored_and_queries(), st.data())
def test_lookup_after_removals_and_additions_equals_the_exhaustive_lookup(case, data):
    d, k, ids, stored, queries = case
    index = HammingIndex(d, k)
    half = len(ids) // 2
    index.add(ids[:half], stored[:half])
    gone = data.draw(st.lists(st.integers(0, 30), max_size=10))
    keep = ~np.isin(ids[:half], gone)
    assert index.remove(gone) == half - keep.sum()
    index.add(ids[half:], stored[half:])
    ids = np.concatenate([ids[:half][keep], ids[half:]])
    stored = np.concatenate([stored[:half][keep], stored[half:]])

    np.testing.assert_array_equal(index.ids, ids)
    np.testing.assert_array_equal(index.codes, stored)
    assert len(index) == len(ids) and index.edits == len(set(ids.tolist()))
    needed = data.draw(st.integers(1, k))
    assert_same(index.search(queries, needed / k), oracle_search(queries, ids, stored, d, k, needed))


@settings(max_examples=200, deadline=None)
@given(stored_and_queries(), st.integers(1, 12), st.data())
def test_several_edits_of_a_search_are_the_first_of_the_ranking_that_reach_tau(case, n, data):
    d, k, ids, stored, queries = case
    needed = data.draw(st.integers(1, k))
    index = HammingIndex.from_codes(d, k, ids, stored)
    keep = np.flatnonzero(np.isin(ids, data.draw(st.sampled_from([ids, ids % 2 * ids, ids[:3]]))))
    index, ids, stored = index.only(keep), ids[keep], stored[keep]
    hits, edits = index.search_edits(queries, needed / k, n)
    assert_same(hits, oracle_search(queries, ids, stored, d, k, needed))
    ranking = zip(*oracle_nearest(queries, ids, stored, d, k, n), strict=True)
    assert edits == [
        [edit for edit, overlap in zip(*line, strict=True) if edit >= 0 and round(overlap * k) >= needed]
        for line in ranking
    ]


@settings(max_examples=200, deadline=None)
@given(stored_and_queries(), st.integers(1, 12))
def test_nearest_equals_the_exhaustive_ranking(case, n):
    d, k, ids, stored, queries = case
    got_ids, got = HammingIndex.from_codes(d, k, ids, stored).nearest(queries, n)
    want_ids, want = oracle_nearest(queries, ids, stored, d, k, n)
    np.testing.assert_array_equal(got_ids, want_ids)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("tau", [0.5, 0.55, 0.07, 1.0])
def test_a_row_exactly_at_tau_matches_and_one_bit_less_does_not(tau):
    d, k = 1024, 100
    mask = random_masks(np.random.default_rng(1), 1, d, k)[0]
    needed = round(tau * k)
    at, below = pack(with_overlap(mask, needed)[None]), pack(with_overlap(mask, needed - 1)[None])
    query = pack(mask[None])

    hit = HammingIndex.from_codes(d, k, [5], at).search(query, tau)
    assert (hit.ids[0], hit.rows[0], hit.overlaps[0]) == (5, 0, needed / k)

    miss = HammingIndex.from_codes(d, k, [5], below).search(query, tau)
    assert (miss.ids[0], miss.rows[0], miss.overlaps[0]) == (-1, -1, (needed - 1) / k)


@pytest.mark.parametrize("queries", [1, 4, 5, 40])
def test_among_equals_the_earliest_row_wins_in_batches_of_any_size(queries):
    rng = np.random.default_rng(2)
    distinct = random_codes(rng, 3, 64, 20)
    stored = np.tile(distinct, (200, 1))[rng.permutation(600)]
    ids = np.arange(600)[::-1]
    index = HammingIndex.from_codes(64, 20, ids, stored)
    batch = distinct[rng.integers(0, 3, queries)]
    assert_same(index.search(batch, 1.0), oracle_search(batch, ids, stored, 64, 20, 20))


def test_the_earliest_of_equals_wins_across_faiss_blocks_of_rows():
    stored = np.repeat(random_codes(np.random.default_rng(3), 2, 8, 4), [70_000, 70_000], axis=0)
    index = HammingIndex.from_codes(8, 4, np.arange(140_000), stored)
    assert index.search(stored[[-1, 0]], 1.0).rows.tolist() == [70_000, 0]


def test_an_edit_of_many_rows_does_not_hide_the_runner_up():
    rng = np.random.default_rng(4)
    mask = random_masks(rng, 1, 256, 64)[0]
    codes = pack(np.stack([mask] * 50 + [with_overlap(mask, 40), with_overlap(mask, 30)]))
    index = HammingIndex.from_codes(256, 64, [9] * 50 + [4, 7], codes)
    ids, overlaps = index.nearest(pack(mask[None]), 4)
    assert ids.tolist() == [[9, 4, 7, -1]]
    assert overlaps.tolist() == [[1.0, 40 / 64, 30 / 64, 0.0]]
    assert len(index) == 52 and index.edits == 3


def test_an_empty_index_answers_without_a_match():
    index = HammingIndex(64, 20)
    queries = random_codes(np.random.default_rng(5), 3, 64, 20)
    hits = index.search(queries, 0.5)
    assert hits.ids.tolist() == hits.rows.tolist() == [-1] * 3 and hits.overlaps.tolist() == [0.0] * 3
    ids, overlaps = index.nearest(queries, 2)
    assert ids.tolist() == [[-1, -1]] * 3 and overlaps.tolist() == [[0.0, 0.0]] * 3
    assert len(index) == index.edits == 0
    assert index.codes.shape == (0, 8) and index.ids.shape == (0,)


def test_no_queries_give_no_hits():
    index = HammingIndex.from_codes(64, 20, [1], random_codes(np.random.default_rng(6), 1, 64, 20))
    none = np.empty((0, 8), np.uint8)
    assert [field.shape for field in index.search(none, 0.5)] == [(0,)] * 3
    assert [field.shape for field in index.nearest(none, 2)] == [(0, 2)] * 2


def test_masks_of_a_language_model_width():
    d, k = 14336, 4096
    rng = np.random.default_rng(8)
    masks = random_masks(rng, 50, d, k)
    index = HammingIndex.from_codes(d, k, np.arange(50) * 10, pack(masks))
    queries = pack(np.stack([with_overlap(masks[17], 2048), with_overlap(masks[3], 2047), masks[49]]))
    hits = index.search(queries, 0.5)
    assert hits.ids.tolist() == [170, -1, 490]
    assert hits.overlaps.tolist() == [0.5, 2047 / 4096, 1.0]
    assert index.nearest(queries, 1)[0].ravel().tolist() == [170, 30, 490]


@pytest.mark.parametrize("tau", [0.0, 1.5, -1.0, float("nan")])
def test_search_refuses_tau_outside_its_range_even_when_empty(tau):
    with pytest.raises(CodeError, match=rf"tau={tau} is outside \(0, 1\]"):
        HammingIndex(64, 20).search(np.empty((0, 8), np.uint8), tau)


@pytest.mark.parametrize("ask", [lambda ix, q: ix.search(q, 0.5), lambda ix, q: ix.nearest(q, 1)])
@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (np.zeros((1, 8), np.float32), "dtype float32, not uint8"),
        (np.zeros((1, 9), np.uint8), "9 bytes wide, not 8"),
        (np.zeros(8, np.uint8), r"shape \(8,\), not \[N, D/8\]"),
        (np.full((1, 8), 255, np.uint8), "code at row 0 has 64 ones, not k=20"),
    ],
)
def test_bad_queries_are_refused(ask, queries, message):
    with pytest.raises(CodeError, match=message):
        ask(HammingIndex(64, 20), queries)


@pytest.mark.parametrize("ask", [lambda ix, q, n: ix.nearest(q, n), lambda ix, q, n: ix.search_edits(q, 0.5, n)])
@pytest.mark.parametrize("n", [0, -1])
def test_no_edits_cannot_be_looked_for(ask, n):
    with pytest.raises(CodeError, match=f"n={n} asks for no edits: n must be 1 or more"):
        ask(HammingIndex(64, 20), np.empty((0, 8), np.uint8), n)


def test_an_edit_of_many_rows_among_few_is_no_reason_to_look_for_more_rows():
    """No write has to count the rows of each edit again."""
    codes = random_codes(np.random.default_rng(9), 60, 64, 20)
    index = HammingIndex.from_codes(64, 20, [3] * 50 + list(range(10, 20)), codes)
    index.nearest(codes[:2], 3)
    index.search_edits(codes[:2], 0.5, 3)
    assert "ids" not in vars(index._now)
