"""Several workers on CPU: tensor-parallel ranks, each with its share of the edited layer, and stages of a pipeline, one
of which holds it; and several engines behind one client. They spin while they wait for each other, so more of them than
cores take minutes."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import EDITS, NEW_TOKENS, PROMPTS, Engine, Expected, flags, next_generation, small_store
from mixes import any_mix, prompts_of

from memoir_retrieval.lookup.reference import EditedModel

pytestmark = pytest.mark.engine

# Questions pass in several steps.
SMALL_STEPS = {"max_num_seqs": 16, "max_num_batched_tokens": 26, "block_size": 32}


def test_two_ranks_answer_as_one(start: Callable[..., Engine], small: Path, tmp_path: Path) -> None:
    folder = small_store(small, tmp_path / "edits")
    model = EditedModel.open(folder, str(small))
    engine = start(**flags(small, folder, tensor_parallel_size=2, **SMALL_STEPS))
    prompts = [model.prompt_ids(prompt) for prompt in PROMPTS.values()]
    wanted = [model.generate([ids], max_new_tokens=NEW_TOKENS)[0] for ids in prompts]
    assert len(EDITS) < sum(answer.edit is not None for answer in wanted) < len(PROMPTS)
    for warm in (False, True):
        for name, answer, reply in zip(PROMPTS, wanted, engine.ask(prompts, warm=warm), strict=True):
            assert (reply.tokens, reply.memoir["edit"]) == (list(answer.tokens), answer.edit), name
    _agree(engine)
    how = {"requests": 30, "lengths": (1, 3, 9), "ends_heard": False}
    assert any_mix(4, engine, model, prompts_of(model), **how) > 3, "the mix holds edits"
    engine.ask([[5, 6, 7]])
    _agree(engine)
    generation = next_generation(folder, without=(1,))
    assert engine.llm.collective_rpc("memoir_reload") == [generation] * 2


@pytest.mark.slow  # test_reload.py has two ranks with a stand-in for their exchange
def test_a_reload_that_fails_on_one_rank_fails_on_all_and_the_engine_serves_on(
    start: Callable[..., Engine], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that is none of ours, raised in one rank's load; every call after it gets its own answers."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send the fault to the workers
    folder = small_store(small, tmp_path / "edits")
    engine = start(**flags(small, folder, tensor_parallel_size=2, **SMALL_STEPS))
    before = EditedModel.open(folder, str(small))
    prompts = [before.prompt_ids(prompt) for prompt in PROMPTS.values()]
    generation = next_generation(folder, without=(1,))

    def served_by(model: EditedModel, generation: int) -> None:
        for ids, reply in zip(prompts, engine.ask(prompts), strict=True):
            (wanted,) = model.generate([ids], max_new_tokens=NEW_TOKENS)
            assert (reply.tokens, reply.memoir["edit"]) == (list(wanted.tokens), wanted.edit)
            assert reply.memoir["generation"] == generation

    for call in ("reload_weights", "start_weight_update"):
        with pytest.raises(Exception, match="only hold on the weights"):
            engine.llm.collective_rpc(call, timeout=60)
    with pytest.raises(Exception, match="only hold on the weights"):
        engine.llm.sleep(level=2)
    served_by(before, 3)
    for staged in (False, True):
        engine.llm.collective_rpc(_out_of_memory, timeout=60, args=(1,))
        if staged:
            engine.llm.collective_rpc("memoir_stage", timeout=60)
        with pytest.raises(Exception, match="RuntimeError: no memory on rank 1"):
            engine.llm.collective_rpc("memoir_reload", timeout=60)
        assert [rank["generation"] for rank in engine.llm.collective_rpc("memoir_stats", timeout=60)] == [3, 3]
        served_by(before, 3)
    assert engine.llm.collective_rpc("memoir_reload", timeout=60) == [generation] * 2
    served_by(EditedModel.open(folder, str(small)), generation)


def _out_of_memory(worker: Any, rank: int) -> None:
    """The next load of one rank fails, as torch does."""
    layer = worker._memoir
    load = layer.load

    def fail(*args: Any) -> Any:
        layer.load = load
        raise RuntimeError(f"no memory on rank {rank}")

    if worker.rank == rank:
        layer.load = fail


def _agree(engine: Engine) -> None:
    """That every rank has decided, applied and repeated the same."""
    ranks = engine.llm.collective_rpc("memoir_stats")
    for key in ("routed", "matched", "recalled", "rows", "live"):
        assert len({rank[key] for rank in ranks}) == 1, key
    assert ranks[0]["matched"] > 0 and ranks[0]["recalled"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("layer", [1, 2], ids=["first stage", "last stage"])
@pytest.mark.parametrize("mode", ["single", "inline"])
def test_two_stages_answer_as_one(
    mode: str, layer: int, start: Callable[..., Engine], small: Path, tmp_path: Path
) -> None:
    """Each stage has two of the four layers. Few blocks, so that requests are preempted and computed again. Inline,
    questions pass in several steps, two of which are in flight, and lie in the prefix cache."""
    folder = small_store(small, tmp_path / "edits", layer)
    model = EditedModel.open(folder, str(small))
    few = {"max_num_seqs": 16, "block_size": 32, "num_gpu_blocks_override": 28, "disable_log_stats": False}
    steps = SMALL_STEPS if mode == "inline" else {}
    engine = start(**flags(small, folder, {"mode": mode}, pipeline_parallel_size=2, **few | steps))
    prompts = [model.prompt_ids(prompt) for prompt in PROMPTS.values()]
    for generation in (3, next_generation(folder, without=(1,))):
        if generation > 3:
            model = EditedModel.open(folder, str(small))
            assert engine.llm.collective_rpc("memoir_reload") == [generation], "the stage that holds the layer"
        wanted = [model.generate([ids], max_new_tokens=60)[0] for ids in prompts]
        assert 2 < sum(answer.edit is not None for answer in wanted) < len(PROMPTS)
        for warm in (False, True):
            replies = engine.ask(prompts, warm=warm, max_tokens=60)
            for name, answer, reply in zip(PROMPTS, wanted, replies, strict=True):
                assert (reply.tokens, reply.memoir["edit"]) == (list(answer.tokens), answer.edit), name
                assert reply.memoir["generation"] == generation
        off = engine.ask(prompts, [{"memoir": "off"}] * len(prompts))
        plain = [model.generate([ids], max_new_tokens=NEW_TOKENS, edited=False)[0] for ids in prompts]
        assert [reply.tokens for reply in off] == [list(answer.tokens) for answer in plain]
    preempted = sum(m.value for m in engine.llm.get_metrics() if m.name == "vllm:num_preemptions")
    if mode == "inline":
        how = {"requests": 100, "lengths": (1, 3, 9, 30), "ends_heard": False}
        assert any_mix(layer, engine, model, prompts_of(model), **how) > 3, "the mix holds edits"
    engine.ask([[5, 6, 7]])
    assert preempted > 0 and engine.settled()["live"] == 0


@pytest.mark.slow
def test_two_engines_of_one_client_answer_alike(small: Path, tmp_path: Path) -> None:
    """Data parallelism. Each engine is asked everything, and a new generation reaches both."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from memoir_vllm.admin.engines import Engines

    folder = small_store(small, tmp_path / "edits")
    model = EditedModel.open(folder, str(small))
    prompts = [model.prompt_ids(prompt) for prompt in PROMPTS.values()]

    async def ask_both() -> None:
        client = AsyncLLM.from_engine_args(AsyncEngineArgs(**flags(small, folder, data_parallel_size=2, **SMALL_STEPS)))
        try:
            engines = Engines(client)
            await all_as_the_reference(client, 3)
            generation = next_generation(folder, without=(1,))
            assert await engines.reload() == generation == 4
            await all_as_the_reference(client, 4)
            first, second = await engines.stats()
            assert first == second | {key: first[key] for key in ("steps", "routing_s", "residual_s")}
            assert (first["generation"], first["live"], first["routed"]) == (4, 0, 2 * len(PROMPTS))
        finally:
            client.shutdown()

    async def all_as_the_reference(client: AsyncLLM, generation: int) -> None:
        served = EditedModel.open(folder, str(small))
        wanted = served.generate(prompts, max_new_tokens=NEW_TOKENS, batch_size=1)
        assert 2 < sum(answer.edit is not None for answer in wanted) < len(PROMPTS)
        for engine in (0, 1):
            answers = [answer_of(client, ids, engine) for ids in prompts]
            for name, answer, output in zip(PROMPTS, wanted, await asyncio.gather(*answers), strict=True):
                said = output.kv_transfer_params["memoir"]
                assert list(output.outputs[0].token_ids) == list(answer.tokens), (name, engine)
                assert (said["edit"], said["generation"]) == (answer.edit, generation), (name, engine)

    asyncio.run(ask_both())


async def answer_of(client: Any, ids: list[int], engine: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    how = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, output_kind=RequestOutputKind.FINAL_ONLY)
    name = f"{engine} {id(ids)}"
    async for output in client.generate({"prompt_token_ids": ids}, how, name, data_parallel_rank=engine):
        last = output
    return last


@pytest.mark.slow
def test_three_ranks_answer_as_one(
    start: Callable[..., Engine],
    model_folder: Path,
    store_folder: Path,
    expected: dict[str, Expected],
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(store_folder, tmp_path / "edits")
    engine = start(**flags(model_folder, folder, tensor_parallel_size=3, **SMALL_STEPS))
    prompts = [wanted.ids for wanted in expected.values()]
    for warm in (False, True):
        for name, reply in zip(PROMPTS, engine.ask(prompts, warm=warm), strict=True):
            assert reply.tokens == expected[name].tokens, name
            assert reply.memoir["edit"] == expected[name].edit, name
    _agree(engine)

    generation = next_generation(folder, without=(1,))
    assert engine.llm.collective_rpc("memoir_reload") == [generation] * 3
    model = EditedModel.open(folder, str(model_folder))
    for ids in prompts[:3]:
        (wanted,) = model.generate([ids], max_new_tokens=NEW_TOKENS)
        (reply,) = engine.ask([ids])
        assert (reply.tokens, reply.memoir["edit"]) == (list(wanted.tokens), wanted.edit)
        assert reply.memoir["generation"] == generation
