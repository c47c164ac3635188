"""Readers beside a writer: no crash, and every answer belongs to one state of the index."""

import threading
import time

import faiss
import numpy as np
import pytest
from index_oracle import random_codes

from memoir_index import HammingIndex, Plan, blocks, hamming

D, K = 512, 128


@pytest.mark.parametrize("seconds", [2, pytest.param(90, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bits", [0, 256])
def test_readers_always_see_one_whole_state(monkeypatch, bits, seconds):
    """The writer adds, replaces and removes a group of edits as one; a reader must see all of the group or none.

    In blocks of 128 rows, which fill up and are renewed all the time; a FAISS index that is extended and shrunk under
    its readers like this crashes the process.
    """
    monkeypatch.setattr(blocks, "BLOCK", 128)
    if bits:
        monkeypatch.setattr(hamming, "choose_plan", lambda *_: Plan("sketch", bits, "as the test wants"))
    rng = np.random.default_rng(21)
    fixed, group = random_codes(rng, 300, D, K), random_codes(rng, 60, D, K)
    group_ids = np.arange(1000, 1060)
    index = HammingIndex.from_codes(D, K, np.arange(300), fixed, sketch=bits)
    done = threading.Event()
    problems: list[str] = []
    states: set[int] = set()

    def read(seed: int) -> None:
        local = np.random.default_rng(seed)
        try:
            while not done.is_set() and not problems:
                some, members = local.integers(0, 300, 3), local.integers(0, 60, int(local.integers(1, 30)))
                hits = index.search(np.concatenate([fixed[some], group[members]]), 1.0)
                if hits.ids[:3].tolist() != some.tolist() or hits.overlaps[:3].tolist() != [1.0] * 3:
                    problems.append(f"a fixed edit was not found: {hits}")
                whole = hits.ids[3:] == group_ids[members]
                if whole.any() != whole.all() or (not whole.all() and (hits.ids[3:] != -1).any()):
                    problems.append(f"half a write was seen: {hits}")
                states.add(int(whole[0]))
                best, _ = index.nearest(fixed[some[:1]], 2)
                if best[0, 0] != some[0]:
                    problems.append(f"nearest lost an edit: {best}")
                ids, codes = index.ids, index.codes
                if ids[:300].tolist() != list(range(300)) or not np.array_equal(codes[:300], fixed):
                    problems.append("rows moved under a reader")
        except Exception as error:
            problems.append(repr(error))

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for reader in readers:
        reader.start()
    writes, start = 0, time.monotonic()

    def enough() -> bool:
        return states == {0, 1} and writes > 20

    try:
        # On a busy machine the readers may see little in that time; the last bound is for one that never will.
        while not problems and ((now := time.monotonic()) < start + seconds or (not enough() and now < start + 300)):
            index.add(group_ids, group)
            time.sleep(0.0005)
            assert index.remove(group_ids) == 60
            writes += 2
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert problems == [] and enough()


def test_writers_beside_each_other_lose_nothing():
    codes = random_codes(np.random.default_rng(22), 200, D, K)
    index = HammingIndex(D, K)

    def write(start: int) -> None:
        for edit in range(start, 200, 4):
            index.add([edit], codes[edit : edit + 1])

    writers = [threading.Thread(target=write, args=(start,)) for start in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(index.ids.tolist()) == list(range(200))
    assert index.search(codes, 1.0).ids.tolist() == list(range(200))


def test_a_search_leaves_the_number_of_openmp_threads_as_it_was():
    codes = random_codes(np.random.default_rng(23), 8, D, K)
    index = HammingIndex.from_codes(D, K, np.arange(8), codes)
    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(2)
        index.search(codes[:1], 0.5)
        index.search(codes, 0.5)
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(before)


def test_the_number_of_openmp_threads_belongs_to_the_calling_thread():
    """A small batch sets it for its own thread only: were it shared, searches would disturb each other."""
    before = faiss.omp_get_max_threads()
    other = threading.Thread(target=faiss.omp_set_num_threads, args=(before + 1,))
    other.start()
    other.join()
    assert faiss.omp_get_max_threads() == before
