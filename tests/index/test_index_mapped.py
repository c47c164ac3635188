"""An index over memory that is not its own: nothing is copied, and nothing damaged is returned."""

from __future__ import annotations

import numpy as np
import pytest
from index_oracle import oracle_search, random_codes, random_masks

from memoir_index import CodeError, HammingIndex, blocks, pack
from memoir_index.synthetic import MaskSource

D, K, N = 256, 64, 40_000  # three blocks


@pytest.fixture
def codes() -> np.ndarray:
    return random_codes(np.random.default_rng(31), N, D, K)


@pytest.fixture
def mapped(codes, tmp_path) -> np.memmap:
    path = tmp_path / "codes.bin"
    path.write_bytes(b"\0" * 13 + codes.tobytes())  # an odd offset, as behind a header
    return np.memmap(path, np.uint8, "r", offset=13, shape=codes.shape)


def test_a_mapped_file_is_searched_where_it_is(codes, mapped):
    index = HammingIndex.from_codes(D, K, np.arange(N), mapped, copy=False)
    assert np.shares_memory(index.code(N - 1), mapped)
    queries = codes[[0, 16383, 16384, N - 1]]
    assert index.search(queries, 1.0).rows.tolist() == [0, 16383, 16384, N - 1]
    queries = random_codes(np.random.default_rng(32), 9, D, K)
    expected = oracle_search(queries, np.arange(N), codes, D, K, 26)
    np.testing.assert_array_equal(index.search(queries, 26 / K).rows, expected.rows)


def test_writes_leave_the_file_alone(codes, mapped):
    index = HammingIndex.from_codes(D, K, np.arange(N), mapped, copy=False)
    new = random_codes(np.random.default_rng(33), 2, D, K)
    index.add([N, N + 1], new)
    assert index.remove(np.arange(0, 20_000)) == 20_000
    assert len(index) == N - 20_000 + 2
    assert index.search(np.concatenate([codes[[5, 20_000]], new]), 1.0).ids.tolist() == [-1, 20_000, N, N + 1]
    np.testing.assert_array_equal(mapped, codes)


def test_rows_of_a_file_stay_there_while_some_of_their_block_remain(mapped):
    """A block that is written again would be memory of this process."""
    index = HammingIndex.from_codes(D, K, np.arange(N), mapped, copy=False)
    assert index.remove(np.arange(16_000)) == 16_000
    for row, edit in ((0, 16_000), (383, 16_383), (384, 16_384)):
        assert index.ids[row] == edit and np.shares_memory(index.code(row), mapped)
    assert index.search(mapped[[3, 16_100]], 0.9, exact=True).ids.tolist() == [-1, 16_100]
    index.remove(np.arange(16_000, 16_384))
    assert [block.rows for block in index._now.blocks] == [16_384, N - 2 * 16_384]


def test_an_index_of_some_rows_looks_at_the_same_memory(codes, mapped):
    index = HammingIndex.from_codes(D, K, np.arange(N), mapped, copy=False)
    index.add([N], codes[:1])
    index.remove([7])
    rows = np.array([0, 7, 20_000, N - 1])  # edits 0, 8, 20001 and N
    some = index.only(rows)
    assert some.ids.tolist() == [0, 8, 20_001, N] and len(index) == N
    assert all(np.shares_memory(some.code(row), mapped) for row in range(3))
    assert some.search(codes[[0, 8, 7, 9]], 1.0).rows.tolist() == [0, 1, -1, -1]
    index.add([50_000], codes[7:8])
    some.add([60_000], codes[9:10])  # behind it, not in its place
    index.remove([0])
    assert some.ids.tolist() == [0, 8, 20_001, N, 60_000] and index.ids[-2:].tolist() == [N, 50_000]
    np.testing.assert_array_equal(index.codes[-1], codes[7])
    np.testing.assert_array_equal(some.codes[-1], codes[9])
    assert len(index.only([])) == 0 and index.only([]).search(codes[:1], 0.5).ids.tolist() == [-1]
    for wrong in ([1, 1], [2, 1]):
        with pytest.raises(CodeError, match="rows do not ascend: pass them in order, each once"):
            index.only(wrong)
    with pytest.raises(CodeError, match=rf"row {N + 1} is not stored"):
        index.only([N + 1])


def test_borrowed_memory_is_kept_alive(codes):
    index = HammingIndex.from_codes(D, K, np.arange(N), codes.copy(), copy=False)
    np.ones(codes.size, np.uint8)
    np.testing.assert_array_equal(index.codes, codes)


@pytest.mark.parametrize("copy", [True, False])
def test_a_damaged_row_is_named_when_it_is_opened(codes, copy):
    codes[20_001] = 0
    with pytest.raises(CodeError, match=r"code at row 20001 has 0 ones, not k=64"):
        HammingIndex.from_codes(D, K, np.arange(N), codes, copy=copy)


def test_a_damaged_row_of_unchecked_memory_is_named_when_it_would_be_returned():
    masks = random_masks(np.random.default_rng(34), 300, D, K)
    codes = pack(masks)
    codes[200] = codes[100]
    codes[200, :2] ^= 255  # another number of ones
    assert np.bitwise_count(codes[200]).sum() != K
    index = HammingIndex.from_codes(D, K, np.arange(300), codes, copy=False, checked=True)
    assert index.search(codes[[100]], 1.0).ids.tolist() == [100]
    index.remove([100])
    for ask in (lambda: index.search(pack(masks[[100]]), 0.5), lambda: index.nearest(pack(masks[[100]]), 1)):
        with pytest.raises(CodeError, match=r"code at row 199 has \d+ ones, not k=64"):
            ask()
    assert index.search(codes[[50]], 0.9).ids.tolist() == [50]


def test_memory_that_cannot_be_used_in_place_is_refused(codes):
    with pytest.raises(CodeError, match="not C-contiguous, so they cannot be used in place: pass copy=True"):
        HammingIndex.from_codes(D, K, np.arange(N // 2), codes[::2], copy=False)
    assert len(HammingIndex.from_codes(D, K, np.arange(N // 2), codes[::2])) == N // 2
    with pytest.raises(CodeError, match="32 bytes wide, not 16"):
        HammingIndex.from_codes(128, K, np.arange(N), codes, copy=False, checked=True)


def test_preparing_reads_the_rows_once_and_searches_only_then_need_no_more(monkeypatch):
    source = MaskSource(14336, 4096, seed=6)
    stored = source.masks(4200)
    index = HammingIndex.from_codes(14336, 4096, np.arange(4200), stored, copy=False, checked=True)
    index.prepare(0.4)  # a full scan, for which there is nothing to make
    calls = []
    monkeypatch.setattr(blocks, "usual_ones", lambda *given: calls.append(given) or (0, 2048))
    index.prepare(0.5)
    assert len(calls) == 1
    assert index.search(stored[:3], 0.5).ids.tolist() == [0, 1, 2] and len(calls) == 1
    index.add([7], source.masks(1))
    index.search(stored[:1], 0.5)
    assert len(calls) == 2
