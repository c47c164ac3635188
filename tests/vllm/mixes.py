"""A random mix of requests, asked of a real engine step by step, each compared with the reference.

Log-probabilities are compared, of greedy and of sampled tokens: a contaminated cache keeps the greedy tokens more often
than not. MEMOIR_MIX_REQUESTS says how many requests a mix has, instead of what its test says.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from engines import EDITS, PIRATE, UNRELATED, Engine, user
from vllm import SamplingParams

from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.question.prompts import Prompt

CLOSE = 2e-4  # of natural logarithms
LONG = "Tell me, in as few words as you can, what the following list has in common: " + "a red bird, " * 20


class Other(NamedTuple):
    """reference: what answers. adapter: its LoRARequest. edited: whether it has edits. store: that is asked for.
    seen: its only request, greedy, with an image."""

    reference: Any
    adapter: Any = None
    edited: bool = True
    store: str = ""
    seen: dict[str, Any] | None = None


def mix_size(requests: int) -> int:
    """How many requests a mix has of which its test wants this many."""
    return int(os.environ.get("MEMOIR_MIX_REQUESTS", requests))


def prompts_of(model: EditedModel) -> list[list[int]]:
    """Edits raw, in a chat, behind a system message, inside a message, what resembles them, and what begins alike."""
    mix: list[Prompt] = [*EDITS, *UNRELATED, LONG, LONG + "and why", "Hello", [user(LONG)]]
    mix += [[user(text)] for text in EDITS] + [[PIRATE, user(text)] for text in (EDITS[1], UNRELATED[2])]
    mix += [[user(f"[2026-03-04 10:15] anna: {EDITS[0]}")], [user(f"Translate into French: {EDITS[2]}")]]
    mix += [[PIRATE, user(f"{LONG}I have been away for a week. {text} Thank you for your help!")] for text in EDITS[:2]]
    ids = [model.prompt_ids(prompt) for prompt in mix]
    return [*ids, [ids[0][0]], ids[8][:70], ids[8][:40] + ids[0]]


def any_mix(
    seed: int,
    engine: Engine,
    served: EditedModel,
    prompts: list[list[int]],
    *,
    requests: int,
    lengths: tuple[int, ...] = (1, 3, 9),
    greedy: float = 0.6,
    others: Sequence[Other] = (),
    ends_heard: bool = True,
) -> int:
    """Greedy and seeded requests, with edits and opted out, some aborted, at random moments.

    lengths: new tokens of a request, one of these. greedy: share of the requests that are. others: who else may
    answer; two of five requests ask for one.
    ends_heard: whether workers hear of the last requests' end. Returns how many answers an edit has acted on.
    """
    requests = mix_size(requests)
    dice, core = random.Random(seed), engine.llm.llm_engine
    sent: dict[str, tuple[list[int], Any, bool, SamplingParams]] = {}
    done: dict[str, Any] = {}
    aborted: set[str] = set()
    while len(sent) < requests or core.has_unfinished_requests():
        for _ in range(dice.choice((0, 1, 3))):
            if len(sent) == requests:
                break
            name, off = f"{seed}-{len(sent)}", dice.random() < 0.25
            other = dice.choice(others) if others and dice.random() < 0.4 else Other(served)
            how = (
                {"temperature": 0.0}
                if other.seen or dice.random() < greedy
                else {"temperature": 0.9, "seed": 5, "n": dice.choice((1, 2))}
            )
            extra = ({"memoir": "off"} if off else {}) | ({"memoir_store": other.store} if other.store else {})
            params = SamplingParams(max_tokens=dice.choice(lengths), logprobs=1, extra_args=extra or None, **how)
            request = other.seen or {"prompt_token_ids": dice.choice(prompts)}
            sent[name] = (request["prompt_token_ids"], other.reference, not off and other.edited, params)
            core.add_request(name, request, params, lora_request=other.adapter)
        if sent and dice.random() < 0.1:
            gone = dice.choice(list(sent))
            if gone not in done and sent[gone][3].n == 1:
                aborted.add(gone)
                core.abort_request([gone])
        if core.has_unfinished_requests():  # with none, a step would wait for ever
            done.update((output.request_id, output) for output in core.step() if output.finished)
    assert sent.keys() - aborted <= done.keys()
    edited = 0
    known: dict[tuple[Any, ...], Any] = {}  # many answers are the same, and the reference takes longest
    for name, output in done.items():
        ids, reference, edits_on, params = sent[name]
        for answer in output.outputs:
            tokens = list(answer.token_ids)
            if not tokens:
                assert name in aborted
                continue
            same = (id(reference), edits_on, *ids, None, *tokens)
            if same not in known:
                (known[same],) = reference.predict([ids], [tokens], edited=edits_on)
            wanted = known[same]
            logprobs = [step[token].logprob for step, token in zip(answer.logprobs, tokens, strict=True)]
            assert max(abs(a - b) for a, b in zip(logprobs, wanted.logprobs, strict=True)) < CLOSE, name
            assert params.temperature or tokens == list(wanted.tokens), name
            edited += wanted.edit is not None
    assert not ends_heard or engine.settled()["live"] == 0
    return edited
