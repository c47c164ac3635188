"""Sketch, then verify: always the answer of an exhaustive search, and the arithmetic that makes it so."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import comb

import faiss
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from index_oracle import oracle_nearest, oracle_search, random_codes, random_masks, shared_bits, with_overlap

from memoir_index import CodeError, HammingIndex, Plan, blocks, choose_plan, hamming, pack, scan, sketch, sketch_bits
from memoir_index.plan import MISS, limit, limits, limits_for
from memoir_index.synthetic import MaskSource


def sketching(monkeypatch: pytest.MonkeyPatch, bits: int, block: int = 64, cache: int = 1 << 12) -> None:
    """Use the sketch in indexes of any size, in blocks of a few rows, of which a few are in the cache."""
    monkeypatch.setattr(hamming, "choose_plan", lambda *_: Plan("sketch", bits, "as the test wants"))
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(sketch, "CORE_BYTES", cache)


@pytest.fixture(params=[1, 3])
def omp_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(request.param)
    yield
    faiss.omp_set_num_threads(before)


def exact_limit(d: int, differing: int, bits: int, miss: Fraction) -> int:
    """By whole numbers: the least t with P(more than t) <= miss."""
    ways = [comb(differing, x) * comb(d - differing, bits - x) for x in range(bits + 1)]
    return next(t for t in range(bits + 1) if Fraction(sum(ways[t + 1 :]), comb(d, bits)) <= miss)


@pytest.mark.parametrize(("d", "bits"), [(64, 16), (128, 40), (256, 128), (1024, 256)])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("miss", [0.1, 1e-4, MISS])
def test_the_limit_is_the_quantile_of_the_hypergeometric_distribution(d, bits, share, miss):
    assert limit(d, int(share * d), bits, miss) == exact_limit(d, int(share * d), bits, Fraction(miss))


def test_limits_grow_with_the_distance_and_are_never_below_the_limit_itself():
    d, radius, bits = 2048, 700, 512
    table = limits(d, radius, bits)
    assert (np.diff(table) >= 0).all() and table[-1] == limit(d, radius, bits, MISS)
    distances = np.array([0, 1, 63, 64, 65, 699, 700, 5000])
    own = [limit(d, min(distance, radius), bits, MISS) for distance in distances.tolist()]
    assert (limits_for(d, radius, bits, distances) >= own).all()


@pytest.mark.parametrize(
    ("n", "d", "tau", "kind", "why"),
    [
        (100_000, 14336, 0.5, "sketch", "2048 of 14336 bits"),
        (100_000, 14336, 0.9, "sketch", "2048 of 14336 bits"),
        (100_000, 14336, 0.49, "scan", "below tau=0.5"),
        (1000, 14336, 0.5, "scan", "below 4096 masks"),
        (100_000, 1536, 0.9, "scan", "1536 bits are too short"),
        (100_000, 4864, 0.5, "scan", "of unrelated masks pass a sketch of 512 bits"),
        (100_000, 4864, 0.8, "sketch", "512 of 4864 bits"),
        (100_000, 28672, 0.5, "sketch", "2048 of 28672 bits"),
    ],
)
def test_the_plan_follows_size_and_threshold(n, d, tau, kind, why):
    plan = choose_plan(n, d, d * 2 // 7, tau)
    assert plan.kind == kind and why in plan.why
    assert plan.bits == (sketch_bits(d) if kind == "sketch" else 0)
    assert 8 * (8 + plan.bits // 8) <= 0.2 * d + 64


def test_an_index_tells_its_plan_and_takes_another_sketch():
    rng = np.random.default_rng(1)
    index = HammingIndex.from_codes(512, 64, np.arange(5000), random_codes(rng, 5000, 512, 64), sketch=192)
    assert index.plan(0.9).kind == "sketch" and index.plan(0.9).bits == 192
    assert HammingIndex(512, 64).plan(0.9).kind == "scan"
    for bits in (512, 12, -8):
        with pytest.raises(CodeError, match=f"a sketch of {bits} bits of a mask of 512 is refused"):
            HammingIndex(512, 64, sketch=bits)


@pytest.mark.usefixtures("omp_threads")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.sampled_from([1, 1 << 12, 1 << 20]), st.data())
def test_a_sketch_finds_what_an_exhaustive_search_finds(seed, cache, data):
    """Stored rows repeat and queries lie within a bit of tau, so that ties and near misses are common."""
    rng = np.random.default_rng(seed)
    d, k = data.draw(st.sampled_from([(512, 128), (768, 60)]))
    bits = data.draw(st.sampled_from([64, 72, 128, 256]))
    needed = data.draw(st.integers(k // 3, k))
    distinct = random_masks(rng, 40, d, k)
    stored = pack(distinct)[rng.integers(0, 40, data.draw(st.sampled_from([5, 64, 300])))]
    ids = rng.integers(0, 100, len(stored))
    shared = np.clip(needed + rng.integers(-1, 2, 12), 0, k)
    near = [with_overlap(distinct[rng.integers(40)], common) for common in shared]
    queries = np.concatenate([pack(np.stack(near)), random_codes(rng, 3, d, k), stored[:2]])
    # with_overlap takes the first ones of a mask: the index presumes positions in random order
    order = rng.permutation(d)
    stored, queries = (pack(np.unpackbits(c, axis=1, bitorder="little")[:, order] != 0) for c in (stored, queries))
    gone = rng.integers(0, 100, data.draw(st.sampled_from([0, 5, 60, 400])))

    with pytest.MonkeyPatch.context() as patch:
        sketching(patch, bits, cache=cache)
        patch.setattr(sketch, "MOST_NEAR", data.draw(st.sampled_from([0.0, 1 / 16, 1.0])))
        patch.setattr(sketch, "GROUP", data.draw(st.sampled_from([1, 5, 64])))
        patch.setattr(hamming, "ROWS_PER_EDIT", data.draw(st.sampled_from([1, 4])))
        patch.setattr(scan, "SPARE", data.draw(st.sampled_from([0, 8])))
        patch.setattr(scan, "PASS_BYTES", data.draw(st.sampled_from([1, 1 << 22])))
        index = HammingIndex.from_codes(d, k, ids, stored.copy(order="C"), sketch=bits, copy=data.draw(st.booleans()))
        index.remove(gone)
        keep = ~np.isin(ids, gone)
        expected = oracle_search(queries, ids[keep], stored[keep], d, k, needed)
        hits = index.search(queries, needed / k)
        exact = index.search(queries, needed / k, exact=True)
        several = [index.search_edits(queries, needed / k, 4, exact=way) for way in (False, True)]
    ranking = oracle_nearest(queries, ids[keep], stored[keep], d, k, 4)
    for (same, edits), alone in zip(several, (hits, exact), strict=True):
        for field in range(3):
            np.testing.assert_array_equal(same[field], alone[field])
        assert edits == [
            [edit for edit, overlap in zip(*line, strict=True) if edit >= 0 and overlap * k >= needed - 0.5]
            for line in zip(*(part.tolist() for part in ranking), strict=True)
        ]
    for result in (hits, exact):
        np.testing.assert_array_equal(result.ids, expected.ids)
        np.testing.assert_array_equal(result.rows, expected.rows)
    np.testing.assert_array_equal(exact.overlaps, expected.overlaps)
    matched = expected.rows >= 0
    np.testing.assert_array_equal(hits.overlaps[matched], expected.overlaps[matched])
    if keep.any():
        # without a match: the overlap of some stored row, so at most that of the nearest
        every = shared_bits(queries, stored[keep], d) / k
        assert all(hits.overlaps[q] in every[q] for q in range(len(queries)))


def crowd(rng: np.random.Generator, n: int, queries: int, d: int = 512, k: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Rows and queries that all overlap by more than half, like those of questions of one form."""
    mask = random_masks(rng, 1, d, k)[0]
    masks = np.zeros((n + queries, d), bool)
    for row in masks:
        row[rng.permutation(np.flatnonzero(mask))[: k * 7 // 8]] = True
        row[rng.permutation(np.flatnonzero(~mask))[: k - k * 7 // 8]] = True
    return pack(masks[:n]), pack(masks[n:])


def test_a_block_of_which_most_rows_look_near_is_scanned(monkeypatch):
    """To fetch them one by one takes many times as long as the scan, and memory for each."""
    sketching(monkeypatch, 128, block=256)
    stored, queries = crowd(np.random.default_rng(10), 500, 100)
    index = HammingIndex.from_codes(512, 128, np.arange(500), stored, sketch=128)
    pairs, kept = [], []
    between, pairs_near = sketch.between, sketch._Near.offer

    def offer(self: sketch._Near, *pairs: np.ndarray) -> None:
        pairs_near(self, *pairs)
        kept.append(len(self.pairs.query))

    monkeypatch.setattr(sketch, "between", lambda *given: pairs.append(len(given[1])) or between(*given))
    monkeypatch.setattr(sketch._Near, "offer", offer)
    several = index.search_edits(queries, 0.55, 3)
    assert sum(pairs) <= 2 * 100 * 500 / 16 + 200  # in two steps, and the closest row of each block
    assert max(kept) <= 64 * 4 * 3
    exact = index.search_edits(queries, 0.55, 3, exact=True)
    assert several[1] == exact[1] and all(len(edits) == 3 for edits in exact[1])
    for field in range(3):
        np.testing.assert_array_equal(several[0][field], exact[0][field])
    kept.clear()
    index.search(queries, 0.55)
    assert not kept  # one row is wanted of each query


def test_only_queries_that_lack_edits_look_for_more_rows(monkeypatch):
    rng = np.random.default_rng(11)
    stored, queries = crowd(rng, 200, 1)
    others = random_codes(rng, 100, 512, 128)
    ids = np.r_[np.zeros(199, np.int64), np.arange(1, 102)]  # the 200th of the crowd is edit 1
    index = HammingIndex.from_codes(512, 128, ids, np.concatenate([stored, others]))
    rounds = []
    search, nearest = hamming.search_blocks, hamming.Snapshot.nearest
    monkeypatch.setattr(
        hamming, "search_blocks", lambda *given: rounds.append((len(given[1]), given[-1])) or search(*given)
    )
    monkeypatch.setattr(
        hamming.Snapshot,
        "nearest",
        lambda self, *given: rounds.append((len(given[0]), given[1])) or nearest(self, *given),
    )
    queries = np.concatenate([others[:20], queries])
    _, edits = index.search_edits(queries, 0.55, 2)
    assert edits[:20] == [[edit] for edit in range(2, 22)] and sorted(edits[20]) == [0, 1]
    assert rounds[0] == (21, 8) and {n for n, _ in rounds[1:]} == {1}
    assert [rows for _, rows in rounds[1:]] == [8 << i for i in range(1, len(rounds))]
    rounds.clear()
    ids, _ = index.nearest(queries, 2)
    assert rounds[0] == (21, 8) and len(rounds) > 1 and max(n for n, _ in rounds[1:]) < 21
    np.testing.assert_array_equal(ids, oracle_nearest(queries, index.ids, index.codes, 512, 128, 2)[0])


def test_only_queries_whose_nearest_rows_are_gone_are_searched_again(monkeypatch):
    rng = np.random.default_rng(12)
    stored = random_codes(rng, 200, 512, 128)
    stored[:20] = stored[0]
    index = HammingIndex.from_codes(512, 128, np.arange(200), stored)
    index.remove(np.arange(20))
    searched = []
    again = scan.knn_of
    monkeypatch.setattr(scan, "knn_of", lambda *given: searched.append(len(given[0])) or again(*given))
    queries = np.concatenate([stored[:1], stored[100:115]])
    hits = index.search(queries, 0.9, exact=True)
    assert hits.ids.tolist() == [-1, *range(100, 115)] and searched == [1]
    assert hits.overlaps[0] == shared_bits(queries[:1], stored[20:], 512).max() / 128


def test_of_a_block_of_which_little_is_left_only_that_is_read(monkeypatch):
    sketching(monkeypatch, 128, block=64)
    rng = np.random.default_rng(13)
    stored = random_codes(rng, 300, 512, 128)
    rows = np.sort(rng.permutation(300)[:40])
    index = HammingIndex.from_codes(512, 128, np.arange(300), stored, sketch=128).only(rows)
    compared = []
    distances = sketch.distances
    monkeypatch.setattr(sketch, "distances", lambda *given: compared.append(len(given[1])) or distances(*given))
    queries = stored[[*rows, 0, 1, 2]]
    hits = index.search(queries, 0.9)
    expected = oracle_search(queries, rows, stored[rows], 512, 128, 116)
    np.testing.assert_array_equal(hits.rows, expected.rows)
    np.testing.assert_array_equal(hits.ids, expected.ids)
    assert sum(compared) == 40


def test_an_edit_that_is_gone_hides_no_other(monkeypatch):
    """The nearest rows of a block by their sketch are all gone, but not enough to write it anew."""
    rng = np.random.default_rng(9)
    sketching(monkeypatch, 128, block=128)
    stored = random_codes(rng, 100, 512, 128)
    stored[10:20] = stored[10]
    ids = np.arange(100)
    ids[10:20] = 10
    index = HammingIndex.from_codes(512, 128, ids, stored, sketch=128)
    assert index.remove([10]) == 10 and len(index) == 90
    hits, exact = index.search(stored[10:11], 0.9), index.search(stored[10:11], 0.9, exact=True)
    assert hits.ids[0] == exact.ids[0] == -1
    assert 0 < hits.overlaps[0] <= exact.overlaps[0] < 0.9


@pytest.mark.parametrize("tau", [0.5, 0.55, 0.8])
def test_a_large_index_of_wide_masks_equals_the_full_scan(tau):
    source = MaskSource(14336, 4096, seed=3)
    stored = source.masks(4300)
    stored[4200:] = stored[:100]
    index = HammingIndex.from_codes(14336, 4096, np.arange(4300), stored)
    assert index.plan(tau).kind == "sketch"
    shared = np.concatenate([source.rng.integers(1800, 4097, 30), np.arange(-2, 3) + round(tau * 4096)])
    queries = np.concatenate([source.variants(stored[source.rng.integers(0, 4300, 35)], shared), source.masks(10)])
    hits, exact = index.search(queries, tau), index.search(queries, tau, exact=True)
    np.testing.assert_array_equal(hits.ids, exact.ids)
    np.testing.assert_array_equal(hits.rows, exact.rows)
    matched = exact.rows >= 0
    assert 0 < matched.sum() < len(queries)
    np.testing.assert_array_equal(hits.overlaps[matched], exact.overlaps[matched])
    assert (hits.overlaps > 0.2).all() and (hits.overlaps <= exact.overlaps).all()


def test_the_answer_to_a_query_does_not_depend_on_its_batch():
    source = MaskSource(14336, 4096, seed=4)
    stored = source.masks(4200)
    index = HammingIndex.from_codes(14336, 4096, np.arange(4200), stored)
    queries = np.concatenate([source.variants(stored[:6], np.full(6, 2100)), source.masks(6)])
    for tau in (0.5, 0.6):
        together = index.search(queries, tau)
        alone = [index.search(queries[i : i + 1], tau) for i in range(len(queries))]
        for field in range(3):
            np.testing.assert_array_equal(together[field], np.concatenate([hits[field] for hits in alone]))


def test_masks_whose_positions_were_never_permuted_are_scanned_in_full():
    """Masks that differ in the first bits alone look unrelated in a sketch of these, however much they overlap."""
    d, k, n = 12800, 3600, 4200
    rng = np.random.default_rng(5)
    masks = np.zeros((n, d), bool)
    masks[:, 2048 : 2048 + 2576] = True  # all have these in common
    masks[:, :2048] = random_masks(rng, n, 2048, 1024)
    index = HammingIndex.from_codes(d, k, np.arange(n), pack(masks))
    query = masks[7].copy()
    query[:2048] = ~query[:2048]
    assert index.plan(0.7).kind == "sketch"
    hits = index.search(pack(query[None]), 0.7)
    exact = index.search(pack(query[None]), 0.7, exact=True)
    assert hits.ids[0] == exact.ids[0] >= 0 and hits.overlaps[0] == exact.overlaps[0]
