"""KV blocks in the host's memory: vLLM's own connector under both schedulers driven by hand, both its halves real. A
stand-in copies what a GPU would copy. Every row is compared, so a block of another edit is seen."""

from __future__ import annotations

import random
from typing import Any

import pytest
from mixes import mix_size
from simulation import RULE, Simulate, Simulation, World, chat, other, right
from vllm.v1.request import RequestStatus

from memoir_retrieval.errors import StoreError
from memoir_retrieval.question.span import find_span
from memoir_vllm.core import rpc

OFF = {"memoir": "off"}
HOST = 400  # blocks


def loaded(sim: Simulation) -> int:
    assert sim.offload is not None
    return sim.offload.worker.loaded  # type: ignore[union-attr]


def settle(sim: Simulation) -> None:
    """Blocks go to the host in the steps after those that have computed them."""
    sim.run()
    for _ in range(4):
        sim.step()


def forget_the_gpu(sim: Simulation) -> None:
    """Only what the host holds is found again."""
    assert sim.scheduler.kv_cache_manager.reset_prefix_cache()


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("first", ["edited", "off"])
def test_twins_load_their_own_blocks_from_the_host(first: str, block: int, simulate: Simulate, here: World) -> None:
    """An edited request and its opted-out twin share what lies before the token from which the edit acts. A request
    whose prompt is remembered loads the blocks of its edit too, one that is not stops before the question."""
    sim = simulate(model_len=512, block=block, host_blocks=HOST)
    prompt = chat(here.questions[1], before=150, after=140)
    undecided, full = 150 // block * block, (len(prompt) - 1) // block * block
    shared = find_span(prompt, RULE).acts_from // block * block if first == "edited" else undecided
    twins: list[dict[str, Any] | None] = [None, OFF] if first == "edited" else [OFF, None]
    hits = []
    for turn, options in enumerate([*twins, *twins]):
        sim.add(f"{turn}", prompt, options, max_tokens=20)
        settle(sim)
        forget_the_gpu(sim)
        assert sim.answers[f"{turn}"] == right(here, prompt, 1 if options is None else None, 20), turn
        hits.append(sim.hits[f"{turn}"])
    assert hits == [0, shared, full, full]
    sim.scheduler._remembered.clear()
    sim.add("not remembered", prompt, max_tokens=20)
    settle(sim)
    assert sim.answers["not remembered"] == right(here, prompt, 1, 20)
    assert sim.hits["not remembered"] == undecided
    assert loaded(sim) > 0


def test_a_question_is_not_taken_from_the_host(simulate: Simulate, here: World) -> None:
    """Loaded blocks have no sums: the long question of another request that begins alike is computed again, and so is
    what a third one finds on the GPU of blocks that were loaded."""
    sim = simulate(model_len=512, host_blocks=HOST)
    first = chat(here.questions[2], before=40, after=30)
    second = first[:-30] + [first[-30]] + [3] * 60
    sim.add("first", first)
    settle(sim)
    forget_the_gpu(sim)
    sim.add("again", first)  # remembered: all is loaded
    settle(sim)
    sim.scheduler._remembered.clear()
    for name in ("second", "third"):
        sim.add(name, second)
        settle(sim)
        sim.scheduler._remembered.clear()
    assert sim.hits["again"] == (len(first) - 1) // 16 * 16
    assert sim.hits["second"] <= 40
    for name, prompt in (("again", first), ("second", second), ("third", second)):
        assert sim.answers[name] == right(here, prompt, 2), name


def loading(simulate: Simulate, here: World) -> tuple[Simulation, list[int]]:
    """A request, "loads", whose decision is remembered and whose blocks are being loaded; and its prompt."""
    sim = simulate(model_len=512, host_blocks=HOST)
    prompt = chat(here.questions[1], before=40, after=60)
    sim.add("first", prompt)
    settle(sim)
    forget_the_gpu(sim)
    sim.add("loads", prompt)
    sim.step()
    return sim, prompt


def test_a_reload_waits_for_requests_that_load_blocks_of_the_older_generation(simulate: Simulate, here: World) -> None:
    sim, prompt = loading(simulate, here)
    assert sim.scheduler.memoir_loads() and not sim.scheduler.memoir_loads("other")

    class Core:
        scheduler = sim.scheduler

    call = rpc._beside_the_scheduler(lambda *_: pytest.fail("the workers have heard of it"))
    with pytest.raises(StoreError, match="wait for offloaded blocks"):
        call(Core(), "memoir_reload")
    settle(sim)
    assert not sim.scheduler.memoir_loads()
    forget_the_gpu(sim)
    later = here.later(8, without=0)
    sim.adopt(later.store)
    sim.add("newer", prompt)
    settle(sim)
    assert sim.answers["loads"] == right(here, prompt, 1)
    assert sim.answers["newer"] == right(later, prompt, 1)


def test_a_reload_waits_for_requests_that_have_loaded_and_found_no_room(
    simulate: Simulate, here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM calls such a request waiting, as one that holds no block."""
    sim, prompt = loading(simulate, here)
    with monkeypatch.context() as full:
        full.setattr(sim.scheduler.kv_cache_manager, "allocate_slots", lambda *args, **kwargs: None)
        for _ in range(3):
            sim.step()
        assert sim.requests["loads"].status == RequestStatus.WAITING and sim.requests["loads"].num_computed_tokens
        assert sim.scheduler.memoir_loads()
    settle(sim)
    assert not sim.scheduler.memoir_loads() and sim.answers["loads"] == right(here, prompt, 1)


@pytest.mark.parametrize("seed", range(6))
def test_any_mix_of_requests_over_few_blocks(seed: int, simulate: Simulate, here: World) -> None:
    """Blocks leave the GPU all the time, requests are preempted, and generations change."""
    dice = random.Random(seed)
    sim = simulate(model_len=512, kv_blocks=34, seqs=6, host_blocks=dice.choice((60, HOST)))
    worlds, latest = {7: here}, 7
    asked: dict[str, tuple[list[int], int | None, int]] = {}
    for n in range(mix_size(60)):
        edit = dice.choice((None, 0, 1, 2))
        question = other(9, dice.choice((1, 2))) if edit is None else here.questions[edit]
        prompt, tokens = chat(question, dice.choice((8, 40, 90)), dice.choice((2, 30))), dice.choice((1, 3, 20))
        off = dice.random() < 0.3
        name = f"{n}"
        sim.add(name, prompt, OFF if off else None, max_tokens=tokens)
        asked[name] = (prompt, None if off else edit, tokens)
        for _ in range(dice.choice((0, 1, 4, 9))):
            sim.step()
        if dice.random() < 0.1 and not sim.scheduler.memoir_loads():
            latest += 1
            worlds[latest] = here.later(latest, without=latest % 4)
            sim.adopt(worlds[latest].store)
    settle(sim)
    for name, (prompt, edit, tokens) in asked.items():
        assert sim.answers[name] == right(worlds[sim.said[name]["generation"]], prompt, edit, tokens), name
    assert loaded(sim) > 0 and len(worlds) > 1
