"""Masks that the model makes: a sketch of them finds what an exhaustive search finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memoir_index import HammingIndex, Plan, blocks, hamming, unpack
from memoir_index.plan import usual_ones
from memoir_retrieval import read_edits
from memoir_retrieval.background import background_prompts, unrelated_prompts
from memoir_retrieval.model.base import load_model
from memoir_retrieval.model.forward import question_means
from memoir_retrieval.question.fingerprint import Fingerprint, permutation
from memoir_retrieval.question.span import Span

D, K, EDITS = 1536, 438, 60
EXAMPLES = Path(__file__).parents[2] / "examples" / "zsre-100.jsonl"


@pytest.fixture(scope="module")
def masks() -> tuple[np.ndarray, np.ndarray]:
    """Codes of edits, and of their rephrasings and unrelated prompts."""
    base = load_model("smollm2-135m")
    edits = read_edits(EXAMPLES)[:EDITS]
    groups = [
        background_prompts()[:40],
        [edit.prompt for edit in edits],
        [edit.rephrases[0] for edit in edits] + unrelated_prompts()[:60],
    ]
    rows = [base.tokenizer(text)["input_ids"] for group in groups for text in group]
    means = question_means(base, rows, [Span(0, len(row)) for row in rows])
    make = Fingerprint(means[:40].mean(0).numpy(), permutation(D, 0), K)
    return make.codes(means[40 : 40 + EDITS]), make.codes(means[40 + EDITS :])


def variants(rng: np.random.Generator, codes: np.ndarray, n: int) -> np.ndarray:
    """Some of the masks with a random part of their ones moved: questions about the same things."""
    out = unpack(codes[rng.integers(0, len(codes), n)], D).copy()
    for row in out:
        moved = int(rng.integers(0, K // 2))
        ones, zeros = rng.permutation(np.flatnonzero(row))[:moved], rng.permutation(np.flatnonzero(~row))[:moved]
        row[ones], row[zeros] = False, True
    return np.packbits(out, axis=1, bitorder="little")


@pytest.mark.parametrize("bits", [256, 512, 768])
def test_a_sketch_of_real_masks_finds_what_an_exhaustive_search_finds(monkeypatch, masks, bits) -> None:
    edits, rephrasings = masks
    rng = np.random.default_rng(bits)
    stored = np.concatenate([edits, variants(rng, edits, 400), edits[:20]])
    queries = np.concatenate([rephrasings, variants(rng, edits, 200)])
    shared = unpack(queries, D).astype(np.int32) @ unpack(stored, D).astype(np.int32).T
    monkeypatch.setattr(hamming, "choose_plan", lambda *_: Plan("sketch", bits, "as the test wants"))
    monkeypatch.setattr(blocks, "BLOCK", 100)
    index = HammingIndex.from_codes(D, K, np.arange(len(stored)), stored, sketch=bits)
    for needed in (200, 219, 241, 300, 400):
        hits = index.search(queries, needed / K)
        best = shared.max(axis=1)
        match = best >= needed
        assert match.any() and not match.all()
        np.testing.assert_array_equal(hits.rows, np.where(match, shared.argmax(axis=1), -1))
        np.testing.assert_array_equal(hits.overlaps[match], best[match] / K)
        assert (hits.overlaps <= best / K).all()


@pytest.mark.parametrize("bits", [256, 512])
def test_the_first_bits_of_real_masks_are_a_random_sample(masks, bits) -> None:
    """Neither a mask's ones nor two masks' differences crowd at the front, so no block is scanned for that reason."""
    edits, rephrasings = masks
    ones = unpack(np.concatenate(masks), D)[:, :bits].sum(axis=1)
    least, most = usual_ones(D, K, bits)
    assert least <= ones.min() and ones.max() <= most
    differ = np.bitwise_xor(edits[:, None], rephrasings[None])
    all_bits = np.bitwise_count(differ).sum(axis=2, dtype=np.int64)
    first = np.bitwise_count(differ[:, :, : bits // 8]).sum(axis=2, dtype=np.int64)
    expected = all_bits * bits / D
    deviation = np.sqrt(expected * (1 - all_bits / D) * (D - bits) / (D - 1))
    z = (first - expected) / np.maximum(deviation, 1e-9)
    assert abs(z).max() < 7 and abs(z.mean()) < 1.5
