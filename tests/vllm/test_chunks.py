"""Prompts of every length over steps of every size, under both schedulers driven by hand."""

from __future__ import annotations

import pytest
from engines import MAX_MODEL_LEN
from simulation import ALL, VOCABULARY, Simulate, World, chat, other, right
from vllm.v1.request import RequestStatus

OFF = {"memoir": "off"}
STEPS = (16, 64, MAX_MODEL_LEN)
LONGEST = MAX_MODEL_LEN - 1


@pytest.mark.parametrize("budget", STEPS)
@pytest.mark.parametrize("edit", [None, 0, 1, 2])
def test_chunks(edit: int | None, budget: int, simulate: Simulate, here: World) -> None:
    """The question begins the prompt, ends it, or stands in it, and the last chunk is one token or more."""
    sim = simulate(budget=budget, seqs=4)
    question = other(9) if edit is None else here.questions[edit]
    length = len(question) + 2  # with its two markers
    shapes = {
        "whole": chat(question, 1, 1),
        "longest, at the end": chat(question, LONGEST - length + 1, 1),
        "longest, at the beginning": chat(question, 1, LONGEST - length + 1),
        "longest, in the middle": chat(question, 120, LONGEST - length + 1 - 119),
        "one token more than a step": chat(question, 3, max(1, budget + 1 - length - 2)),
        "ends with a step": chat(question, 3, max(1, budget - length - 2)),
    }
    for name, prompt in shapes.items():
        prompt = prompt[:LONGEST]
        sim.add(name, prompt)
        sim.add(f"{name}, off", prompt, OFF)
        sim.run()
        room = MAX_MODEL_LEN - len(prompt)
        assert sim.answers[name] == right(here, prompt, edit)[:room], name
        assert sim.answers[f"{name}, off"] == right(here, prompt, None)[:room], name
        assert max(count for _, count in sim.chunks[name]) <= budget


@pytest.mark.parametrize("after", [1, 2])
def test_a_last_chunk_of_one_token(after: int, simulate: Simulate, here: World) -> None:
    """The step ends with the question, or one token before the prompt does; then that token is a step of its own."""
    sim = simulate(budget=17, seqs=4)
    question = here.questions[1]
    prompt = chat(question, before=17 - len(question) - (after == 2), after=after)
    assert len(prompt) == 18
    sim.add("a", prompt)
    sim.run()
    assert sim.chunks["a"][:2] == [(0, 17), (17, 1)]
    assert sim.answers["a"] == right(here, prompt, 1)


@pytest.mark.parametrize("budget", STEPS)
@pytest.mark.parametrize("token", [5, VOCABULARY])
def test_prompts_of_one_token(token: int, budget: int, simulate: Simulate, here: World) -> None:
    """A raw token is its own question; a marker alone holds none."""
    sim = simulate(budget=budget, seqs=4)
    for n in range(3):
        sim.add(f"{n}", [token], max_tokens=20)
    sim.run()
    assert set(map(tuple, sim.answers.values())) == {tuple(right(here, [token], None, 20))}
    assert {said["result"] for said in sim.said.values()} == {"unroutable" if token == VOCABULARY else "unmatched"}


@pytest.mark.parametrize("budget", STEPS)
def test_long_prompts_of_the_rule_all(budget: int, simulate: Simulate, here: World) -> None:
    """The whole prompt is the question, so of the three steps only the largest takes it at once."""
    sim = simulate(budget=budget, seqs=4, rule=ALL)
    for n, prompt in enumerate((other(LONGEST), here.questions[2], here.questions[0])):
        edit = None if n == 0 else 2 if n == 1 else 0
        for kind, options in (("asked", None), ("off", OFF), ("again", None)):
            sim.add(f"{n} {kind}", prompt, options)
            sim.run()
            room = min(3, MAX_MODEL_LEN - len(prompt))
            wanted = right(here, prompt, None if options else edit, room, ALL)
            assert sim.answers[f"{n} {kind}"] == wanted, (n, kind)


# ---- in every phase of a request -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(12))
@pytest.mark.parametrize("how", ["abort", "preempt"])
def test_every_moment_of_a_request(how: str, steps: int, simulate: Simulate, here: World) -> None:
    """Before the decision, in its step, in the middle of a long question, and in decoding: whoever goes on answers as
    if alone, and nothing is left of the others."""
    sim = simulate(budget=32, seqs=8)
    prompts = {"short": (chat(here.questions[1], before=40), 1), "long": (chat(here.questions[2], before=40), 2)}
    prompts["other"] = (chat(other(9), before=40), None)
    for name, (prompt, _) in prompts.items():
        sim.add(name, prompt, max_tokens=6)
        sim.add(f"{name}, stays", prompt, max_tokens=6)
    for _ in range(steps):
        sim.step()
    if how == "abort":
        sim.scheduler.finish_requests(list(prompts), RequestStatus.FINISHED_ABORTED)
    else:
        sim.scheduler.reset_prefix_cache(reset_running_requests=True)
    sim.run()
    for name, (prompt, edit) in prompts.items():
        whole = right(here, prompt, edit, 6)
        assert sim.answers[f"{name}, stays"] == whole, name
        assert sim.answers[name] == (whole[: len(sim.answers[name])] if how == "abort" else whole), name
    assert sim.layer.stats()["live"] == 0
    assert not sim.scheduler._states


# ---- what was decided once is not looked up again ------------------------------------------------------------------


@pytest.mark.parametrize("edit", [2, None])
def test_siblings_share_what_no_edit_changes(edit: int | None, simulate: Simulate, here: World) -> None:
    """As `n` of one request asks for: four of one prompt in one step, of which the first computes the question."""
    sim = simulate(budget=200, seqs=8)
    prompt = chat(other(30) if edit is None else here.questions[2], before=20)
    for n in range(4):
        sim.add(f"{n}", prompt, max_tokens=5)
    sim.run()
    assert [sim.answers[f"{n}"] for n in range(4)] == [right(here, prompt, edit, 5)] * 4
    assert [sim.hits[f"{n}"] for n in range(4)] == [0, 48, 48, 48]
    assert sim.layer.stats()["routed"] == 4, "all of one step are looked up"


def test_who_waits_takes_over_what_was_decided_meanwhile(simulate: Simulate, here: World) -> None:
    """More requests than may run: the later ones are decided when they begin, and find the blocks of the first."""
    sim = simulate(budget=200, seqs=2)
    prompt = chat(here.questions[1], before=40, after=21)
    for n in range(6):
        sim.add(f"{n}", prompt, max_tokens=5)
    sim.run()
    assert set(map(tuple, sim.answers.values())) == {tuple(right(here, prompt, 1, 5))}
    assert sim.layer.stats()["routed"] == 2
    assert [sim.hits[f"{n}"] for n in range(2, 6)] == [64] * 4
