"""Three tensor-parallel ranks on CPU (the model has nine heads), each with a third of the edited layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import NEW_TOKENS, PROMPTS, Engine, Expected, flags, next_generation

from memoir_retrieval.reference import EditedModel

pytestmark = pytest.mark.engine


def test_three_ranks_answer_as_one(
    start: Callable[..., Engine],
    model_folder: Path,
    store_folder: Path,
    expected: dict[str, Expected],
    tmp_path: Path,
) -> None:
    """Small steps: questions are split from what stands before them, long ones are computed twice."""
    folder = shutil.copytree(store_folder, tmp_path / "edits")
    small = {"max_num_seqs": 16, "max_num_batched_tokens": 26, "block_size": 32}
    engine = start(**flags(model_folder, folder, tensor_parallel_size=3, **small))
    prompts = [wanted.ids for wanted in expected.values()]
    for warm in (False, True):
        for name, reply in zip(PROMPTS, engine.ask(prompts, warm=warm), strict=True):
            assert reply.tokens == expected[name].tokens, name
            assert reply.memoir["edit"] == expected[name].edit, name
    first, second, third = engine.llm.collective_rpc("memoir_stats")
    for key in ("routed", "matched", "recalled", "replayed", "rows", "live"):
        assert first[key] == second[key] == third[key], key
    assert first["replayed"] > 0 and first["recalled"] > 0

    generation = next_generation(folder, without=(1,))
    assert engine.llm.collective_rpc("memoir_reload") == [generation] * 3
    model = EditedModel.open(folder, str(model_folder))
    for ids in prompts[:3]:
        (wanted,) = model.generate([ids], max_new_tokens=NEW_TOKENS)
        (reply,) = engine.ask([ids])
        assert (reply.tokens, reply.memoir["edit"]) == (list(wanted.tokens), wanted.edit)
        assert reply.memoir["generation"] == generation
