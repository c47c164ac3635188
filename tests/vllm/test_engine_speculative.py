"""Speculative decoding: drafts change how many tokens a step gives, never which, with edits and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import PROMPTS, Engine, Expected, Reply, flags
from mixes import any_mix, prompts_of

from memoir_retrieval.lookup.reference import EditedModel

pytestmark = pytest.mark.engine

STEPS = {"block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 8, "disable_log_stats": False}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}


@pytest.fixture(scope="module")
def served(store_folder: Path, model_folder: Path) -> EditedModel:
    return EditedModel.open(store_folder, str(model_folder))


@pytest.fixture(scope="module", params=["ngram", pytest.param("draft_model", marks=pytest.mark.slow)])
def speculation(request: pytest.FixtureRequest, model_folder: Path) -> dict[str, Any]:
    """The drafter is the served model itself, without edits."""
    draft = {"method": "draft_model", "model": str(model_folder), "num_speculative_tokens": 3}
    return {"speculative_config": NGRAM if request.param == "ngram" else draft, **STEPS}


@pytest.fixture(scope="module")
def without_plugin(model_folder: Path, speculation: dict[str, Any], expected: dict[str, Expected]) -> list[Reply]:
    """Of the same vLLM flags without a memoir section. Each is asked alone: what is drafted for one request decides
    which rows another has in the same step."""
    engine = Engine(**flags(model_folder, **speculation))
    try:
        return [engine.ask([expected[name].ids])[0] for name in PROMPTS]
    finally:
        engine.close()


@pytest.fixture(scope="module")
def engine(
    start: Callable[..., Engine],
    served: EditedModel,
    model_folder: Path,
    speculation: dict[str, Any],
) -> Engine:
    return start(**flags(model_folder, served.retriever.store.path, **speculation))


def accepted(engine: Engine) -> tuple[int, int]:
    """How many draft tokens were made, and how many of them were taken, since the engine was started."""
    metrics = {metric.name: metric for metric in engine.llm.get_metrics()}
    drafts, taken = (metrics[f"vllm:spec_decode_num_{what}_tokens"].value for what in ("draft", "accepted"))
    return drafts, taken


def test_answers_are_the_references(engine: Engine, expected: dict[str, Expected]) -> None:
    replies = engine.ask([expected[name].ids for name in PROMPTS])
    for (name, wanted), reply in zip(expected.items(), replies, strict=True):
        assert reply.tokens == wanted.tokens, name
        assert reply.memoir is not None and reply.memoir["edit"] == wanted.edit, name
    drafts, taken = accepted(engine)
    assert 0 < taken < drafts, "some drafts are right and some are not"


@pytest.mark.slow
def test_unedited_requests_keep_their_bits(
    engine: Engine, expected: dict[str, Expected], without_plugin: list[Reply]
) -> None:
    for (name, wanted), plain in zip(expected.items(), without_plugin, strict=True):
        for option in ({"memoir": "off"}, None):
            if option or wanted.edit is None:
                (reply,) = engine.ask([wanted.ids], [option])
                assert (reply.tokens, reply.logprobs) == (plain.tokens, plain.logprobs), name


@pytest.mark.parametrize(
    "greedy", [pytest.param(1.0, id="greedy"), pytest.param(0.0, id="sampled", marks=pytest.mark.slow)]
)
def test_any_mix_of_requests(greedy: float, engine: Engine, served: EditedModel) -> None:
    """Apart: beside sampled requests vLLM draws the tokens of greedy ones (findings)."""
    how = {"requests": 30, "lengths": (1, 4, 12), "greedy": greedy}
    assert any_mix(3, engine, served, prompts_of(served), **how) > 3, "the mix holds edits"
