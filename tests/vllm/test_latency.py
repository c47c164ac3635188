"""What a client waits for with edits, as ratios within one run: `pytest -m latency`, no part of `make test`.

The bounds are wide, so that a fault crosses them and a busy machine does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from memoir_index import popcount
from memoir_retrieval.background import background_prompts
from memoir_retrieval.evaluation.report.page import latency_page
from memoir_retrieval.lookup.retriever import Retriever
from memoir_retrieval.store.read import EditStore
from memoir_vllm.bench.latency import LatencySettings, inflate, lookups, measure

EDITS = (100, 100_000)


@pytest.mark.parametrize("edits", [3, 5000])
def test_a_store_is_made_larger_with_masks_of_its_own_size(edits: int, store: EditStore, tmp_path: Path) -> None:
    large = EditStore.open(inflate(store, tmp_path / "large", edits))
    kept = min(edits, len(store.edits))
    assert len(large.edits) == edits and len(set(large.ids.tolist())) == edits
    assert (popcount(large.codes) == store.manifest.k).all()
    np.testing.assert_array_equal(large.memories, store.memories)
    assert [edit.prompt for edit in list(large.edits)[:kept]] == [edit.prompt for edit in list(store.edits)[:kept]]
    own = np.isin(store.ids, [edit.id for edit in list(store.edits)[:kept]])
    np.testing.assert_array_equal(large.codes[: own.sum()], store.codes[own])


def test_the_questions_of_a_store_find_their_edits_among_made_up_ones(
    store_folder: Path, store: EditStore, model_folder: Path, tmp_path: Path
) -> None:
    folder = inflate(store, tmp_path / "large", 2000)
    prompt = next(iter(store.edits)).prompt
    small, large = (Retriever.open(path, str(model_folder)).lookup(prompt) for path in (store_folder, folder))
    assert small is not None and large is not None
    assert (small.edit.id, small.overlap) == (large.edit.id, large.overlap)


def test_the_page_shows_every_row() -> None:
    rows = [
        {"what": what, "kind": kind, "edits": n, "concurrent": c, "p50": n / 7, "p95": 2.0, "p99": 3.0, "samples": 9}
        for what in ("first_token", "between_tokens")
        for kind in ("no plugin", "unmatched", "matched", "cached")
        for n in (100, 1000)
        for c in (1, 8)
    ]
    page = latency_page(rows, "folder/model")
    assert page.count("<svg") == 4 and page.count("<tr>") == 1 + len(rows)
    assert "no plugin" in page and "14.28" in page and "http" not in page


@pytest.fixture(scope="module")
def measured(store: EditStore, store_folder: Path, model_folder: Path) -> dict[tuple[str, str, int, int], dict]:
    from transformers import AutoTokenizer

    from memoir_retrieval.question.prompts import prompt_ids

    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    def rows(prompts: list[str]) -> list[list[int]]:
        return [prompt_ids(tokenizer, prompt, chat=False) for prompt in prompts]

    result: dict[str, Any] = measure(
        LatencySettings(
            store=str(store_folder),
            model=str(model_folder),
            unmatched=rows(list(background_prompts()[:16])),
            matched=rows([edit.prompt for edit in store.edits]),
            edits=list(EDITS),
            concurrent=[1, 8],
            requests=8,
            tokens=8,
            rounds=2,
        )
    )
    return {(row["what"], row["kind"], row["edits"], row["concurrent"]): row for row in result["rows"]}


@pytest.mark.latency
@pytest.mark.slow
@pytest.mark.parametrize("concurrent", [1, 8])
@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize(
    ("what", "kind", "against", "most"),
    [
        ("first_token", "unmatched", "no plugin", 1.5),
        ("first_token", "matched", "unmatched", 1.5),
        ("first_token", "cached", "matched", 1.5),
        ("between_tokens", "unmatched", "no plugin", 1.5),
        ("between_tokens", "matched", "no plugin", 1.5),
    ],
)
def test_a_client_waits_no_longer(
    what: str, kind: str, against: str, most: float, edits: int, concurrent: int, measured: dict
) -> None:
    ours, theirs = (measured[what, k, edits, concurrent] for k in (kind, against))
    assert ours["samples"] >= 16
    assert ours["p50"] / theirs["p50"] < most


@pytest.mark.latency
@pytest.mark.slow
def test_a_thousand_times_the_edits_do_not_take_a_thousand_times_as_long(store: EditStore, tmp_path: Path) -> None:
    small, large = (lookups(EditStore.open(inflate(store, tmp_path / str(n), n)), [1])[0].p50 for n in EDITS)
    assert large / small < 300
