"""Both schedulers, driven by hand: what is split, what is hit, what is published, and that every row is right."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from simulation import ALL, RULE, Simulate, Simulation, World, chat, oracle, other, right, world
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import RequestStatus

from memoir_retrieval.model.forward import span_mean
from memoir_retrieval.question.candidates import Pieces
from memoir_retrieval.question.span import find_span
from memoir_retrieval.question.tasks import Pooled
from memoir_vllm.core import blocks


def test_raw_text_has_no_question_where_edits_were_made_in_chats(simulate: Simulate, here: World) -> None:
    """The base model answers and the decision says why; a client that names the question is believed."""
    manifest = SimpleNamespace(**vars(here.store.manifest) | {"chat": True})
    chats = here._replace(store=dataclasses.replace(here.store, manifest=manifest))  # type: ignore[arg-type]
    sim = simulate(served=chats)
    question = here.questions[1]
    sim.add("raw", question)
    sim.add("raw, named", question, {"memoir_span": f"0:{len(question)}"})
    sim.add("chat", chat(question, 20))
    sim.run()
    assert {name: decision["result"] for name, decision in sim.said.items()} == {
        "raw": "unroutable",
        "raw, named": "matched",
        "chat": "matched",
    }
    assert "/v1/chat/completions" in sim.said["raw"]["reason"] and "reason" not in sim.said["chat"]
    assert sim.answers["raw"] == oracle(here.embedding, question, 0, None, 3)


def test_a_question_is_found_where_requests_come_in(
    simulate: Simulate, here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the engine core's thread for its sockets, and not in the one that also runs the steps."""
    sim = simulate()
    prompt = chat(here.questions[1], 20)
    sim.add("directly", prompt)
    request = EngineCoreRequest(
        request_id="a",
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=3, ignore_eos=True),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    core: Any = SimpleNamespace(scheduler=sim.scheduler, mm_receiver_cache=None)
    core.request_block_hasher = sim.requests["directly"]._block_hasher
    arrived, wave = EngineCore.preprocess_add_request(core, request)
    core.scheduler = None
    assert wave == 0 and not hasattr(EngineCore.preprocess_add_request(core, request)[0], "_memoir_query")
    monkeypatch.setattr(type(sim.scheduler), "_query_of", lambda *_: pytest.fail("the question is found again"))
    sim.answers["a"], sim.chunks["a"] = [], []
    sim.scheduler.add_request(arrived)
    sim.run()
    assert sim.said["a"] == sim.said["directly"] and sim.answers["a"] == right(here, prompt, 1)


def test_a_decision_comes_with_the_first_output(simulate: Simulate, here: World) -> None:
    """Whatever ends a request later. Looked up, remembered, long, opted out and unroutable ones."""
    sim = simulate()
    prompts = {"edited": here.questions[0], "long": here.questions[2], "other": other(9), "empty": []}
    for turn in ("first", "again"):
        for name, question in prompts.items():
            sim.add(f"{name} {turn}", chat(question, 20), max_tokens=6)
        sim.add(f"off {turn}", chat(here.questions[0], 20), {"memoir": "off"}, max_tokens=6)
        while sim.step():
            assert {name for name, answer in sim.answers.items() if answer} == set(sim.said)
    results = {name: decision["result"] for name, decision in sim.said.items()}
    for turn in ("first", "again"):
        assert [results[f"{name} {turn}"] for name in ("edited", "long", "other", "empty", "off")] == [
            "matched",
            "matched",
            "unmatched",
            "unroutable",
            "off",
        ]


@pytest.mark.parametrize("before", [40, 58, 64, 90])
def test_a_question_is_split_anywhere(before: int, simulate: Simulate, here: World) -> None:
    """Before it, in it, after it: chunks are those of vLLM alone. It is decided when its last token passes."""
    sim = simulate()
    prompt = chat(here.questions[1], before=before, after=9)
    sim.add("a", prompt)
    sim.run()
    first = min(64, len(prompt))
    assert sim.chunks["a"][:2] == [(0, first), (first, max(1, len(prompt) - first))]
    assert sim.answers["a"] == right(here, prompt, 1)
    assert sim.said["a"] == {"edit": 1, "overlap": 1.0, "result": "matched", "generation": 7}


def test_a_step_is_filled_with_parts_of_questions(simulate: Simulate, here: World) -> None:
    sim = simulate()
    first, second = chat(other(9), before=50), chat(here.questions[1], before=1)
    sim.add("first", first)
    sim.add("second", second)
    sim.run()
    assert sim.chunks["first"][0] == (0, 62)
    assert sim.chunks["second"][:2] == [(0, 2), (2, 11)]
    assert sim.answers == {"first": right(here, first, None), "second": right(here, second, 1)}


def test_blocks_are_shared_up_to_the_acting_token_and_owned_by_their_edit_from_it_on(
    simulate: Simulate, here: World
) -> None:
    """The question is 40 to 49, so the edit acts from the first token of the fourth block on; a prompt has 70."""
    sim = simulate()
    matched = chat(here.questions[1], before=40, after=21)
    for name, options in (("cold", None), ("off", {"memoir": "off"}), ("warm", None), ("off again", {"memoir": "off"})):
        sim.add(name, matched, options)
        sim.run()
    assert sim.hits == {"cold": 0, "off": 48, "warm": 64, "off again": 64}
    edited, plain = right(here, matched, 1), right(here, matched, None)
    assert edited != plain
    assert sim.answers == {"cold": edited, "off": plain, "warm": edited, "off again": plain}
    assert sim.layer.stats()["routed"] == 1


def test_an_unmatched_request_leaves_its_blocks_to_all(simulate: Simulate, here: World) -> None:
    sim = simulate()
    prompt = chat(other(9), before=40, after=21)
    for name, options in (("cold", None), ("off", {"memoir": "off"}), ("warm", None)):
        sim.add(name, prompt, options)
        sim.run()
    assert sim.hits == {"cold": 0, "off": 64, "warm": 64}
    assert set(map(tuple, sim.answers.values())) == {tuple(right(here, prompt, None))}


def test_two_edits_behind_one_preamble_share_it_and_nothing_else(simulate: Simulate, here: World) -> None:
    sim = simulate()
    prompts = {n: chat(here.questions[n], before=48, after=40) for n in (0, 1)}
    for name, n in (("a", 0), ("b", 1), ("a again", 0), ("b again", 1)):
        sim.add(name, prompts[n])
        sim.run()
        assert sim.answers[name] == right(here, prompts[n], n)
    assert sim.hits == {"a": 0, "b": 48, "a again": 80, "b again": 96}


def test_nothing_that_an_edit_may_change_is_published_before_its_decision(simulate: Simulate, here: World) -> None:
    """Twins of one step and of the steps before the decision is back, in both orders."""
    sim = simulate(budget=200)
    prompt = chat(here.questions[1], before=40, after=21)
    for at in range(6):
        sim.add(f"edited {at}", prompt)
        sim.add(f"off {at}", prompt, {"memoir": "off"})
        sim.step()
    sim.run()
    for name, answer in sim.answers.items():
        assert answer == right(here, prompt, 1 if "edited" in name else None), name


def rows_of(sim: Simulation, name: str) -> int:
    """Rows that were computed of a request: what it took from the cache is not among them."""
    return sum(count for _, count in sim.chunks[name])


@pytest.mark.parametrize("edit", [2, None])
def test_a_question_longer_than_a_step_is_computed_once(edit: int | None, simulate: Simulate, here: World) -> None:
    """A question of 30 tokens and steps of 20, matched or not."""
    sim = simulate(budget=20, seqs=4)
    prompt = chat(other(30) if edit is None else here.questions[edit], before=40)
    sim.add("a", prompt)
    sim.run()
    assert rows_of(sim, "a") == len(prompt) + 2
    assert sim.answers["a"] == right(here, prompt, edit)
    sim.add("twin", prompt)
    sim.add("off", prompt, {"memoir": "off"})
    sim.run()
    assert sim.hits == {"a": 0, "twin": 64, "off": 64}
    assert (sim.answers["twin"], sim.answers["off"]) == (right(here, prompt, edit), right(here, prompt, None))


@pytest.mark.parametrize("before", [40, 48])
@pytest.mark.parametrize("edit", [2, None])
def test_an_undecided_question_is_taken_from_the_cache(
    before: int, edit: int | None, simulate: Simulate, here: World
) -> None:
    """What another request has computed of it, here one that opted out, is not computed again: there are sums of it."""
    sim = simulate()
    prompt = chat(other(30) if edit is None else here.questions[edit], before=before, after=30)
    for name, options in (("off", {"memoir": "off"}), ("asked", None)):
        sim.add(name, prompt, options)
        sim.run()
    assert sim.hits == {"off": 0, "asked": 64}
    assert sim.layer.stats()["routed"] == 1
    assert sim.said["asked"]["edit"] == edit
    assert sim.said["asked"]["overlap"] == 1.0 or edit is None
    assert sim.answers["asked"] == right(here, prompt, edit)


def test_sums_of_the_cache_are_exact(simulate: Simulate, here: World) -> None:
    """However much of a question is found, its overlap is that of the whole."""
    overlaps = set()
    for hit in (0, 48, 64, 80, 96):
        sim = simulate(model_len=512)
        prompt = chat(other(70, 3), before=40, after=30)
        if hit:
            sim.add("off", [*prompt[:hit], 5], {"memoir": "off"})
            sim.run()
        sim.add("asked", prompt)
        sim.run()
        assert sim.hits["asked"] == hit
        overlaps.add(sim.said["asked"]["overlap"])
    assert len(overlaps) == 1


def test_where_sums_count_other_tokens_the_hit_ends_before_the_question(simulate: Simulate, here: World) -> None:
    """The client's span begins elsewhere in the block in which the template's begins. Each is decided rightly."""
    sim = simulate()
    prompt = chat(here.questions[2], before=40, after=30)
    for name, options in (("plain", None), ("named", {"memoir_span": "44:70", "memoir_nearest": 1})):
        sim.add(name, prompt, options)
        sim.run()
    assert sim.hits == {"plain": 0, "named": 32}
    alone = simulate()
    alone.add("named", prompt, {"memoir_span": "44:70", "memoir_nearest": 1})
    alone.run()
    assert (sim.said["named"], sim.answers["named"]) == (alone.said["named"], alone.answers["named"])


def test_generated_tokens_are_not_counted(simulate: Simulate, here: World) -> None:
    """A raw prompt that goes on where an answer ended takes the prompt from the cache and computes the answer again."""
    sim = simulate()
    first = other(40)
    sim.add("first", first, max_tokens=30)
    sim.run()
    prompt = first + sim.answers["first"]
    sim.add("second", prompt)
    sim.run()
    assert sim.hits["second"] == 32
    assert sim.answers["second"] == right(here, prompt, None)


@pytest.mark.parametrize("budget", [80, 44])
def test_the_rule_all_looks_the_whole_prompt_up(budget: int, simulate: Simulate, here: World) -> None:
    """In one step or in two."""
    sim = simulate(rule=ALL, budget=budget)
    prompts = {"edit": here.questions[2], "other": other(40)}
    for name, options in (("cold", None), ("off", {"memoir": "off"}), ("warm", None)):
        for kind, prompt in prompts.items():
            sim.add(f"{kind} {name}", prompt, options)
        sim.run()
    assert {name: hit for name, hit in sim.hits.items() if hit} == {
        "edit off": 16,
        "other off": 32,
        "edit warm": 16,
        "other warm": 32,
    }
    for name, answer in sim.answers.items():
        edit = 2 if name in ("edit cold", "edit warm") else None
        assert answer == right(here, prompts[name.split()[0]], edit, rule=ALL), name


def test_the_rule_all_finds_unmatched_prompts_in_the_cache(simulate: Simulate, here: World) -> None:
    """What was computed before is not computed again, though the decision needs its activations."""
    sim = simulate(rule=ALL)
    first = other(50)
    second, third = first[:40] + other(20, 1), first[:33]
    for name, prompt in (("first", first), ("second", second), ("third", third)):
        sim.add(name, prompt)
        sim.run()
        assert sim.answers[name] == right(here, prompt, None, rule=ALL)
    assert sim.hits == {"first": 0, "second": 32, "third": 32}
    stats = sim.layer.stats()
    assert (stats["routed"], stats["recalled"]) == (3, 0)


@pytest.mark.parametrize("together", [False, True])
def test_the_rule_all_decides_from_the_cache(together: bool, simulate: Simulate, here: World) -> None:
    """Its first 16 tokens are another's, computed before or in the same step."""
    sim = simulate(rule=ALL, budget=200)
    question = here.questions[2]
    sim.add("off", question, {"memoir": "off"}, max_tokens=9)
    if not together:
        sim.run()
    sim.add("edited", question, max_tokens=9)
    sim.run()
    assert (sim.hits["off"], sim.hits["edited"]) == (0, 16)
    assert sim.said["edited"] == {"edit": 2, "overlap": 1.0, "result": "matched", "generation": 7}
    assert sim.answers["edited"] == right(here, question, 2, 9, ALL)
    assert sim.answers["off"] == right(here, question, None, 9, ALL)
    assert rows_of(sim, "edited") == len(question) - 16 + 8


@pytest.mark.parametrize("seed", range(4))
def test_any_mix_under_the_rule_all(seed: int, simulate: Simulate) -> None:
    dice = random.Random(seed)
    served = world((20, 40, 70))
    budget, seqs, blocks = dice.choice((17, 40, 64, 256)), dice.choice((3, 8)), dice.choice((14, 20, 200))
    sim = simulate(kv_blocks=blocks, budget=budget, seqs=seqs, rule=ALL, served=served)
    router = sim.layer.now.router
    wanted: dict[str, list[int]] = {}
    aborted: set[str] = set()
    for n in range(40):
        whole = dice.choice([*served.questions, other(50, dice.randrange(2))])
        prompt = whole[: dice.choice((len(whole), len(whole), 16, 33))] + other(dice.choice((0, 0, 5, 30)), 9)
        off, tokens, name = dice.random() < 0.3, dice.choice((1, 3, 20)), f"{n}"
        mean = span_mean(served.embedding[prompt], find_span(prompt, ALL))[None]
        route = router.route(Pooled(mean, torch.ones(1)), [prompt])[0].routed
        wanted[name] = right(served, prompt, None if off or route.row < 0 else route.row, tokens, ALL)
        sim.add(name, prompt, {"memoir": "off"} if off else None, max_tokens=tokens)
        for _ in range(dice.choice((0, 0, 1, 3))):
            sim.step()
        if dice.random() < 0.1:
            gone = dice.choice(list(wanted)[-10:])
            aborted.update(r.request_id for r in sim.scheduler.finish_requests([gone], RequestStatus.FINISHED_ABORTED))
        if dice.random() < 0.1:
            sim.scheduler.reset_prefix_cache(reset_running_requests=True)
    sim.run(limit=4000)
    check_answers(sim, wanted, aborted)


@pytest.mark.parametrize("first", ["found", "named"])
def test_a_span_that_a_client_names_is_decided_by_itself(first: str, simulate: Simulate, here: World) -> None:
    """The same tokens are the whole message, whose parts are looked up, or what a client names, without parts."""
    rule = msgspec.structs.replace(RULE, candidates=True)
    sim = simulate(rule=rule)
    sim.scheduler._pieces = Pieces(lambda ids: "".join("\n" if token == 0 else f"w{token} " for token in ids))
    prompt = chat([*(token or 1 for token in other(9)), 0, *here.questions[1]], before=20, after=9)
    span = find_span(prompt, rule)
    options = {"found": None, "named": {"memoir_span": f"{span.start}:{span.end}"}}
    for name in (first, *(options.keys() - {first})):
        sim.add(name, prompt, options[name])
        sim.run()
    assert {name: decision["result"] for name, decision in sim.said.items()} == {
        "found": "matched",
        "named": "unmatched",
    }
    assert sim.answers == {"found": right(here, prompt, 1), "named": right(here, prompt, None)}


def test_salts_are_kept_apart(simulate: Simulate, here: World) -> None:
    sim = simulate()
    prompt = chat(here.questions[1], before=40, after=21)
    for name, salt in (("x", "x"), ("y", "y"), ("x again", "x")):
        sim.add(name, prompt, salt=salt)
        sim.run()
    assert sim.hits == {"x": 0, "y": 0, "x again": 64}
    assert set(map(tuple, sim.answers.values())) == {tuple(right(here, prompt, 1))}


def test_a_reset_forgets_decisions_and_blocks(simulate: Simulate, here: World) -> None:
    sim = simulate()
    prompt = chat(here.questions[1], before=40, after=21)
    sim.add("a", prompt)
    sim.run()
    assert sim.scheduler.reset_prefix_cache()
    sim.add("b", prompt)
    sim.run()
    assert (sim.hits["b"], sim.layer.stats()["routed"]) == (0, 2)
    assert sim.answers["a"] == sim.answers["b"]


def test_a_reset_in_the_middle_starts_running_requests_again(simulate: Simulate, here: World) -> None:
    sim = simulate()
    prompt = chat(here.questions[1], before=40, after=21)
    for steps in (1, 2, 3):
        name = f"after {steps}"
        sim.add(name, prompt, max_tokens=5)
        for _ in range(steps):
            sim.step()
        sim.scheduler.reset_prefix_cache(reset_running_requests=True)
        sim.run()
        assert sim.answers[name] == right(here, prompt, 1, 5), name


def test_an_abort_leaves_nothing(simulate: Simulate, here: World) -> None:
    for steps in range(6):
        sim = simulate(budget=60)
        sim.add("a", chat(here.questions[1], before=58), max_tokens=9)
        sim.add("b", chat(here.questions[2], before=58), max_tokens=9)
        for _ in range(steps):
            sim.step()
        sim.scheduler.finish_requests(["a", "b"], RequestStatus.FINISHED_ABORTED)
        sim.run()
        sim.add("c", chat(other(5), before=3))
        sim.run()
        assert not sim.scheduler._states
        assert sim.layer.stats()["live"] == 0


@pytest.mark.parametrize("seed", range(20))
def test_any_mix_of_requests(seed: int, simulate: Simulate, here: World) -> None:
    dice = random.Random(seed)
    budget, seqs = dice.choice((17, 24, 40, 64, 256)), dice.choice((3, 8))
    block = dice.choice((16, 16, 32, 128))
    sim = simulate(kv_blocks=dice.choice((14, 20, 200)) * 16 // block + 2, budget=budget, seqs=seqs, block=block)
    check_mix(sim, here, dice, requests=30)


@pytest.mark.parametrize("seed", range(8))
def test_any_mix_of_priorities(seed: int, simulate: Simulate, here: World) -> None:
    """With few blocks and prompts in chunks, so that a request of a step is often preempted by a later one of it."""
    dice = random.Random(seed)
    sim = simulate(kv_blocks=dice.choice((14, 20)), budget=64, seqs=8, policy="priority", chunk=dice.choice((16, 32)))
    check_mix(sim, here, dice, requests=30, priorities=3)


@pytest.mark.parametrize("edit", [None, 2])
def test_what_a_preempted_request_was_to_compute_in_its_step_is_not_in_the_cache(
    edit: int | None, simulate: Simulate, here: World
) -> None:
    """A more urgent request takes the last of its two new blocks, and the other one is full, so it was published."""
    question = other(30) if edit is None else here.questions[edit]
    prompt = chat(question, before=85, after=3)
    preemptions = 0
    for length in range(13, 18):
        sim = simulate(kv_blocks=10, budget=64, seqs=8, policy="priority", chunk=32)
        sim.add("patient", prompt, priority=1)
        sim.step()
        urgent = chat(other(length - 8), before=5)
        sim.add("urgent", urgent, max_tokens=10)
        sim.run()
        preemptions += sim.requests["patient"].num_preemptions
        assert sim.answers == {"patient": right(here, prompt, edit), "urgent": right(here, urgent, None, 10)}, length
    assert preemptions


@pytest.mark.parametrize("seed", range(12))
def test_every_answer_is_that_of_the_generation_it_reports(seed: int, simulate: Simulate, here: World) -> None:
    """New generations at any moment, over twins that wait, run, are preempted or are known on arrival."""
    dice = random.Random(seed)
    sim = simulate(kv_blocks=dice.choice((16, 22, 200)), budget=dice.choice((24, 40, 64)), seqs=dice.choice((3, 8)))
    worlds = {7: here}
    requests: dict[str, tuple[list[int], int | None, int]] = {}
    for n in range(40):
        edit = dice.choice((None, 0, 1, 2))
        question = other(9) if edit is None else here.questions[edit]
        prompt, tokens = chat(question, dice.choice((8, 40)), dice.choice((2, 30))), dice.choice((1, 3, 20))
        sim.add(f"{n}", prompt, max_tokens=tokens)
        requests[f"{n}"] = (prompt, edit, tokens)
        for _ in range(dice.choice((0, 0, 1, 3))):
            sim.step()
        if dice.random() < 0.25:
            latest = max(worlds) + 1
            worlds[latest] = here.later(latest, without=latest % 4)
            sim.adopt(worlds[latest].store)
    sim.run()
    assert len(worlds) > 3 and len({said["generation"] for said in sim.said.values()}) > 2
    for name, (prompt, edit, tokens) in requests.items():
        assert sim.answers[name] == right(worlds[sim.said[name]["generation"]], prompt, edit, tokens), name
    assert sim.layer.stats()["older_generations"] == 0


def test_a_decision_of_an_older_generation_is_made_again_for_a_request_that_waits(
    simulate: Simulate, here: World
) -> None:
    """The first twin runs on with its generation; the second, known on arrival, had not begun; the third is new."""
    sim = simulate(seqs=1)
    prompt = chat(here.questions[1], before=40, after=21)
    sim.add("remembered", prompt)
    sim.run()
    sim.add("runs", prompt, max_tokens=8)
    sim.step()
    sim.step()
    sim.add("waits", prompt)
    later = here.later(8, without=0)
    sim.adopt(later.store)
    sim.add("new", prompt)
    assert sim.layer.stats()["older_generations"] == 1
    sim.run()
    assert {name: said["generation"] for name, said in sim.said.items()} == {
        "remembered": 7,
        "runs": 7,
        "waits": 8,
        "new": 8,
    }
    assert sim.answers["runs"] == right(here, prompt, 1, 8)
    assert sim.answers["waits"] == sim.answers["new"] == right(later, prompt, 1) != right(here, prompt, 1)
    assert sim.hits["waits"] == 48, "what stands before the acting token is shared, its edited blocks are not"
    assert sim.layer.stats()["older_generations"] == 0


@pytest.mark.slow
def test_nothing_is_kept_of_ten_thousand_requests(simulate: Simulate, here: World) -> None:
    sim = simulate(kv_blocks=60, budget=32, seqs=8)
    check_mix(sim, here, random.Random(0), requests=10_000)
    stats = sim.layer.stats()
    assert stats["live"] == 0 and stats["routed"] > 1000 and stats["recalled"] > 100


def check_mix(sim: Simulation, here: World, dice: random.Random, requests: int, priorities: int = 1) -> None:
    """Twins, edits, long questions, opted out, raw, salted and aborted requests; few blocks; resets."""
    wanted: dict[str, list[int]] = {}
    aborted: set[str] = set()
    for n in range(requests):
        edit = dice.choice((None, None, 0, 1, 2))
        question = other(dice.choice((1, 5, 9, 40)), dice.randrange(3)) if edit is None else here.questions[edit]
        prompt = question if dice.random() < 0.2 else chat(question, dice.choice((1, 8, 40, 58)), dice.choice((2, 30)))
        off = dice.random() < 0.3
        options, tokens, name = {"memoir": "off"} if off else None, dice.choice((1, 3, 20)), f"{n}"
        salt, priority = dice.choice((None, None, "x")), n * n % priorities
        sim.add(name, prompt, options, max_tokens=tokens, salt=salt, priority=priority)
        wanted[name] = right(here, prompt, None if off else edit, tokens)
        for _ in range(dice.choice((0, 0, 1, 3))):
            sim.step()
        if dice.random() < 0.1:
            gone = dice.choice(list(wanted)[-10:])
            aborted.update(r.request_id for r in sim.scheduler.finish_requests([gone], RequestStatus.FINISHED_ABORTED))
        if dice.random() < 0.05:
            sim.scheduler.reset_prefix_cache(reset_running_requests=True)
    sim.run(limit=100 * requests)
    check_answers(sim, wanted, aborted)


def check_answers(sim: Simulation, wanted: dict[str, list[int]], aborted: set[str]) -> None:
    for name, answer in wanted.items():
        assert sim.answers[name] == (answer[: len(sim.answers[name])] if name in aborted else answer), name
    assert not sim.scheduler._states
    assert sim.layer.stats()["live"] == 0


def test_sums_of_a_block_that_did_not_pass_are_refused(simulate: Simulate) -> None:
    """A row that is missing, as one that another engine has computed would be."""
    sim = simulate(rule=ALL)
    first = other(50)
    sim.add("first", first)
    sim.run()
    sim.layer._sums._counts -= 1
    sim.add("second", first[:40])
    with pytest.raises(RuntimeError, match="never passed the layer"):
        sim.run()


# ---- what the protections are for: without them the wrong blocks are read --------------------------------------------


def wrong_rows(sim: Simulation, here: World) -> list[str]:
    """Names of requests whose answers are wrong, of edited and opted-out twins in all orders."""
    prompt = chat(here.questions[1], before=40, after=21)
    for at, options in enumerate((None, {"memoir": "off"}, None, {"memoir": "off"})):
        sim.add(f"{'off' if options else 'on'} {at}", prompt, options)
        sim.step()
        sim.step()
    sim.run()
    return [name for name, answer in sim.answers.items() if answer != right(here, prompt, 1 if "on" in name else None)]


def test_with_all_protections_no_row_is_wrong(simulate: Simulate, here: World) -> None:
    assert wrong_rows(simulate(), here) == []


def test_without_their_own_name_edited_blocks_reach_others(
    simulate: Simulate, here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "own", lambda *args: None)
    assert wrong_rows(simulate(), here)


def test_without_late_publication_edited_blocks_reach_others(
    simulate: Simulate, here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = blocks.guard

    def hits_only(manager: Any, *judges: Any) -> None:
        publish = manager.coordinator.cache_blocks
        guard(manager, *judges)
        manager.coordinator.cache_blocks = publish

    monkeypatch.setattr(blocks, "guard", hits_only)
    assert wrong_rows(simulate(), here)


def test_with_decisions_of_an_older_generation_the_worker_refuses(
    simulate: Simulate, here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sim = simulate()
    prompt = chat(here.questions[1], before=40, after=21)
    sim.add("remembered", prompt)
    sim.run()
    monkeypatch.setattr(sim.scheduler, "memoir_adopted", lambda *_: None)
    sim.adopt(here.later(8, without=0).store)
    sim.add("new", prompt)
    with pytest.raises(RuntimeError, match="decided by generation 7 of the store, this worker serves generation 8"):
        sim.run()


def test_without_capped_hits_the_worker_refuses(
    simulate: Simulate, here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "guard", lambda *args: None)
    sim = simulate()
    prompt = chat(other(9), before=40, after=21)
    sim.add("off", prompt, {"memoir": "off"})
    sim.run()
    sim.add("asked", prompt)
    with pytest.raises(RuntimeError, match="its question is 40 to 49: the tokens that decide must be computed"):
        sim.run()
