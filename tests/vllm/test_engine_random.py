"""Random mixes of requests on a real engine with small steps and few blocks, each request against the reference.

Log-probabilities are compared, of greedy and of sampled tokens: a contaminated cache keeps the greedy tokens more often
than not.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import EDITS, PIRATE, SYSTEM, UNRELATED, Engine, flags, make_store, user
from vllm import SamplingParams

from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.question.prompts import Prompt
from memoir_retrieval.question.span import SpanRule

pytestmark = pytest.mark.engine

HERE = Path(__file__).parent
CLOSE = 2e-4  # of natural logarithms
STEPS = {"block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 8, "num_gpu_blocks_override": 16}
LONG = "Tell me, in as few words as you can, what the following list has in common: " + "a red bird, " * 20


@pytest.fixture(scope="module", params=["question", pytest.param("all", marks=pytest.mark.slow)])
def served(
    request: pytest.FixtureRequest, base: BaseModel, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> EditedModel:
    rule = SpanRule(rule="all", acts="last") if request.param == "all" else None
    folder = make_store(base, tmp_path_factory.mktemp(request.param) / "edits", edits=(*EDITS, LONG), rule=rule)
    return EditedModel.open(folder, str(model_folder))


@pytest.fixture(scope="module")
def engine(served: EditedModel, start: Callable[..., Engine], model_folder: Path) -> Engine:
    return start(**flags(model_folder, served.retriever.store.path, **STEPS))


def prompts_of(model: EditedModel) -> list[list[int]]:
    """Edits raw, in a chat and behind a system message, what resembles them, and what begins alike."""
    mix: list[Prompt] = [*EDITS, *UNRELATED, LONG, LONG + "and why", "Hello", [user(LONG)]]
    mix += [[user(text)] for text in EDITS] + [[PIRATE, user(text)] for text in (EDITS[1], UNRELATED[2])]
    ids = [model.prompt_ids(prompt) for prompt in mix]
    return [*ids, [ids[0][0]], ids[8][:70], ids[8][:40] + ids[0]]


@pytest.mark.parametrize("seed", range(3))
def test_any_mix_of_requests(seed: int, engine: Engine, served: EditedModel) -> None:
    dice, core = random.Random(seed), engine.llm.llm_engine
    prompts = prompts_of(served)
    requests: dict[str, tuple[list[int], bool, SamplingParams]] = {}
    done: dict[str, Any] = {}
    aborted: set[str] = set()
    while len(requests) < 18 or core.has_unfinished_requests():
        for _ in range(dice.choice((0, 1, 3))):
            if len(requests) == 18:
                break
            name, off = f"{seed}-{len(requests)}", dice.random() < 0.25
            how = (
                {"temperature": 0.0}
                if dice.random() < 0.6
                else {"temperature": 0.9, "seed": 5, "n": dice.choice((1, 2))}
            )
            extra = {"memoir": "off"} if off else None
            params = SamplingParams(max_tokens=dice.choice((1, 3, 9)), logprobs=1, extra_args=extra, **how)
            requests[name] = (dice.choice(prompts), off, params)
            core.add_request(name, {"prompt_token_ids": requests[name][0]}, params)
        if requests and dice.random() < 0.1:
            gone = dice.choice(list(requests))
            if gone not in done and requests[gone][2].n == 1:
                aborted.add(gone)
                core.abort_request([gone])
        if core.has_unfinished_requests():  # with none, a step would wait for ever
            done.update((output.request_id, output) for output in core.step() if output.finished)
    assert requests.keys() - aborted <= done.keys()
    matches = 0
    for name, output in done.items():
        ids, off, params = requests[name]
        for completion in output.outputs:
            tokens = list(completion.token_ids)
            if not tokens:
                assert name in aborted
                continue
            (wanted,) = served.predict([ids], [tokens], edited=not off)
            given = [step[token].logprob for step, token in zip(completion.logprobs, tokens, strict=True)]
            assert max(abs(a - b) for a, b in zip(given, wanted.logprobs, strict=True)) < CLOSE, name
            assert params.temperature or tokens == list(wanted.tokens), name
            matches += wanted.edit is not None
    assert matches > 3, "the mix holds edits"
    engine.ask([[5, 6, 7]], warm=True)
    assert engine.stats()["live"] == 0


def test_raw_prompts_are_found_in_the_cache(engine: Engine, served: EditedModel) -> None:
    """A raw prompt is the question under either rule."""
    long = served.prompt_ids(LONG)
    engine.llm.reset_prefix_cache()
    hits = []
    requests = [(long, {"memoir": "off"}), ([*long, 11, 12], None), (long, None), (long, None)]
    for ids, option in requests:
        (reply,) = engine.ask([ids], [option], warm=True, max_tokens=4)
        (wanted,) = served.predict([ids], [reply.tokens], edited=option is None)
        assert max(abs(a - b) for a, b in zip(reply.logprobs, wanted.logprobs, strict=True)) < CLOSE
        assert reply.memoir["edit"] == wanted.edit
        hits.append(reply.hit)
    full = (len(long) - 1) // STEPS["block_size"] * STEPS["block_size"]
    assert full > 32 and hits[0] == 0 and hits[1:] == [full] * 3, "what opted out has computed serves all"


@pytest.mark.slow
@pytest.mark.parametrize("naive", [False, True])
def test_without_the_protocol_edits_reach_other_requests(
    naive: bool, base: BaseModel, model_folder: Path, store_folder: Path
) -> None:
    """The naive hook applies the edit where it is found and leaves vLLM's cache to itself: a request that opted out
    then reads rows of the edit. With the protocol it does not."""
    model = EditedModel.open(store_folder, str(model_folder))
    ids = model.prompt_ids([SYSTEM, user(EDITS[1])])
    off = {"memoir": "off"}
    order = {
        "flags": flags(model_folder, store_folder, block_size=32),
        "naive": naive,
        "turns": [{"prompts": [ids], "options": [option]} for option in (None, off)],
        "how": {"max_tokens": 8, "warm": True},
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "ask_engine.py")],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        timeout=500,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
    )
    assert done.returncode == 0, done.stderr[-4000:]
    edited, plain = json.loads(done.stdout.strip().splitlines()[-1])["replies"]
    assert edited["memoir"]["edit"] == 1 and plain["memoir"]["result"] == "off"
    (wanted,) = model.predict([ids], [plain["tokens"]], edited=False)
    wrong = max(abs(a - b) for a, b in zip(plain["logprobs"], wanted.logprobs, strict=True))
    assert (wrong > 50 * CLOSE) if naive else (wrong < CLOSE)
