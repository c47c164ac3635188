"""Edits behind attention on a real engine: mixtures of experts, and a dense model where that place is chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import transformers as hf
from engines import PROMPTS, Engine, Expected, answers, flags, make_store
from mixes import any_mix, prompts_of
from towers import LAYOUTS, TEXT, save

from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.model.base import load_model

pytestmark = pytest.mark.engine

CONFIGS = {name: LAYOUTS[name].config for name in ("qwen3-moe", "mixtral")} | {"dense": hf.Qwen3Config(**TEXT)}


class Served(NamedTuple):
    """model, store: folders. wanted: what the reference says."""

    model: Path
    store: Path
    wanted: dict[str, Expected]


@pytest.fixture(
    scope="module",
    params=["qwen3-moe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "dense"))],
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp(request.param)
    save(CONFIGS[request.param], folder / "model")
    base = load_model(str(folder / "model"), layer=1, place="attention")
    store = make_store(base, folder / "store", k=36, tau=0.9)
    return Served(folder / "model", store, answers(EditedModel.open(store, str(folder / "model"))))


def test_answers_behind_attention_are_the_references_and_no_other_bit_changes(
    served: Served, start: Callable[..., Engine]
) -> None:
    """The requests that no edit answers are compared apart: experts multiply what a step sends each of them at once."""
    model, store, wanted = served
    engine = start(here=True, **flags(model, store))
    prompts = {name: wanted[name].ids for name in PROMPTS}
    for name, reply in zip(prompts, engine.ask(list(prompts.values())), strict=True):
        assert reply.memoir["edit"] == wanted[name].edit, name
        assert reply.tokens == wanted[name].tokens, name
    for name, reply in zip(
        prompts, engine.ask(list(prompts.values()), [{"memoir": "off"}] * len(prompts)), strict=True
    ):
        assert reply.tokens == wanted[name].base, name
    matched = [name for name in prompts if wanted[name].edit is not None]
    assert 2 < len(matched) < len(prompts)
    assert all(wanted[name].tokens != wanted[name].base for name in matched)
    unmatched = [prompts[name] for name in prompts if name not in matched]
    edited = engine.ask(unmatched)
    engine.close()
    plain = start(here=True, **flags(model)).ask(unmatched)
    assert [(r.tokens, r.logprobs) for r in edited] == [(r.tokens, r.logprobs) for r in plain]


@pytest.mark.slow
def test_any_mix_of_requests(served: Served, start: Callable[..., Engine]) -> None:
    steps = {"block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 16, "num_gpu_blocks_override": 48}
    reference = EditedModel.open(served.store, str(served.model))
    engine = start(here=True, **flags(served.model, served.store, **steps))
    how = {"requests": 60, "lengths": (1, 3, 9), "ends_heard": False}
    assert any_mix(1, engine, reference, prompts_of(reference), **how) > 5, "the mix holds edits"
