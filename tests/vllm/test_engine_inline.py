"""Mode inline on a real engine with small steps and small blocks: chunked prefill and prefix caching stay exact.

Contamination keeps the greedy tokens more often than not, so log-probabilities and hit lengths are compared too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engines import EDITS, PROMPTS, SYSTEM, UNRELATED, Engine, Reply, flags, make_store, user

from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.question.prompts import Prompt
from memoir_retrieval.question.span import find_span

pytestmark = pytest.mark.engine

BLOCK, TOKENS = 32, 12
# A step takes 64 tokens, fewer than a long question has.
STEPS = {"block_size": BLOCK, "max_num_batched_tokens": 64, "max_num_seqs": 8, "max_model_len": 320}
CLOSE = 2e-4  # of natural logarithms; a wrong row of the KV cache costs 1e-2 and more
LONG = (
    "A traveller left the harbour at dawn with two mules, a box of letters and a map that nobody else could read. She "
    "crossed the salt plain in nine days, slept in the ruins of a mill, sold one of the mules to a miller's widow, and "
    "reached the white city on the evening of the feast. Who opened the gate for her, and what did he ask in return?"
)


@pytest.fixture(scope="module")
def long_store(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(base, tmp_path_factory.mktemp("long") / "edits", edits=(*EDITS, LONG))


@pytest.fixture(scope="module")
def reference(long_store: Path, model_folder: Path) -> EditedModel:
    return EditedModel.open(long_store, str(model_folder))


@pytest.fixture(scope="module")
def engine(start: Callable[..., Engine], model_folder: Path, long_store: Path) -> Engine:
    return start(**flags(model_folder, long_store, **STEPS))


ASKED: dict[str, Prompt] = {
    **PROMPTS,
    "library edit": [SYSTEM, user(EDITS[1])],
    "library other edit": [SYSTEM, user(EDITS[3])],
    "library unrelated": [SYSTEM, user(UNRELATED[2])],
    "long edit": LONG,
    "library long edit": [SYSTEM, user(LONG)],
    "long unrelated": LONG.replace("harbour", "1 2 3 4 5 6 7 8 9").replace("mules", "import os\n" * 30),
}


@pytest.fixture(scope="module")
def ids(reference: EditedModel) -> dict[str, list[int]]:
    return {name: reference.prompt_ids(prompt) for name, prompt in ASKED.items()}


def wrong(reference: EditedModel, ids: list[int], reply: Reply, edited: bool = True) -> float:
    """By how much the reply's log-probabilities differ from the reference's for the same tokens."""
    (answer,) = reference.predict([ids], [reply.tokens], edited=edited)
    assert reply.memoir is not None and reply.memoir["edit"] == answer.edit
    return max(abs(a - b) for a, b in zip(reply.logprobs, answer.logprobs, strict=True))


def test_the_prompts_are_what_they_are_meant_to_be(ids: dict[str, list[int]]) -> None:
    assert len(ids["library edit"]) - len(ids["chat edit after system"]) + 30 > 2 * BLOCK
    assert all(64 < len(ids[name]) < 300 for name in ("long edit", "library long edit", "long unrelated"))


@pytest.fixture(scope="module")
def answers(reference: EditedModel, ids: dict[str, list[int]]) -> dict[str, list[int]]:
    """The tokens of each prompt."""
    return {name: list(reference.generate([row], max_new_tokens=TOKENS)[0].tokens) for name, row in ids.items()}


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_answers_are_the_references(
    warm: bool, engine: Engine, reference: EditedModel, ids: dict[str, list[int]], answers: dict[str, list[int]]
) -> None:
    """All in one batch of small steps; a second time from the cache and from memory."""
    replies = engine.ask(list(ids.values()), warm=warm, max_tokens=TOKENS)
    for name, reply in zip(ids, replies, strict=True):
        assert reply.tokens == answers[name], name
        assert wrong(reference, ids[name], reply) < CLOSE, name
        assert (reply.memoir["edit"] is not None) == ("edit" in name), name


def test_opted_out_answers_are_the_base_models(
    engine: Engine, reference: EditedModel, ids: dict[str, list[int]]
) -> None:
    replies = engine.ask(list(ids.values()), [{"memoir": "off"}] * len(ids), warm=True, max_tokens=TOKENS)
    for name, reply in zip(ids, replies, strict=True):
        assert wrong(reference, ids[name], reply, edited=False) < CLOSE, name


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("library edit", "edited"),
        pytest.param("library long edit", "off", marks=pytest.mark.slow),
        pytest.param("library edit", "off", marks=pytest.mark.slow),
        pytest.param("library long edit", "edited", marks=pytest.mark.slow),
    ],
)
def test_edited_and_opted_out_do_not_meet_in_the_cache(
    name: str, first: str, engine: Engine, reference: EditedModel, ids: dict[str, list[int]]
) -> None:
    """One at a time: cold, then from what the ones before have published; generated blocks too. The client began the
    answer, so that the prompt has blocks of its own behind the token from which the edit acts."""
    begun = reference.base.tokenizer(" It is well known in the town that the answer to this is" * 4).input_ids
    prompt, hits = [*ids[name], *begun], []
    order = [None, {"memoir": "off"}] * 3 if first == "edited" else [{"memoir": "off"}, None] * 3
    engine.llm.reset_prefix_cache()
    for option in order:
        (reply,) = engine.ask([prompt], [option], warm=True, max_tokens=40, ignore_eos=True)
        assert wrong(reference, prompt, reply, edited=option is None) < CLOSE
        hits.append(reply.hit)
    full = (len(prompt) - 1) // BLOCK * BLOCK
    span = find_span(prompt, reference.retriever.store.manifest.span)
    # One that is not decided yet computes what it is decided by itself, which may begin a block earlier.
    shared = (span.acts_from if first == "edited" else span.decided_from) // BLOCK * BLOCK
    assert hits == [0, shared, full, full, full, full]
    assert 0 < shared < full


@pytest.mark.parametrize("shorter", [(3, 0), (0, 2)], ids=["later start", "earlier end"])
def test_a_span_that_one_client_names_changes_no_answer_of_another(
    shorter: tuple[int, int], engine: Engine, reference: EditedModel, ids: dict[str, list[int]]
) -> None:
    """One prompt and one edit, of whose question a client names a part."""
    prompt = ids["library long edit"]
    start, end = find_span(prompt, reference.retriever.store.manifest.span)[:2]
    part = {"memoir_span": f"{start + shorter[0]}:{end - shorter[1]}"}
    engine.llm.reset_prefix_cache()
    named, plain = (engine.ask([prompt], [option], warm=True, max_tokens=TOKENS)[0] for option in (part, None))
    assert named.memoir["edit"] == plain.memoir["edit"] is not None
    assert wrong(reference, prompt, plain) < CLOSE


def test_a_preamble_is_shared_by_edits_and_unmatched(engine: Engine, ids: dict[str, list[int]]) -> None:
    engine.llm.reset_prefix_cache()
    names = ("library edit", "library other edit", "library unrelated")
    hits = [engine.ask([ids[name]], warm=True)[0].hit for name in names]
    assert hits == [0, BLOCK, BLOCK]


@pytest.mark.parametrize("name", ["library long edit", "long edit", "long unrelated"])
def test_an_undecided_question_is_taken_from_the_cache(
    name: str, engine: Engine, reference: EditedModel, ids: dict[str, list[int]]
) -> None:
    """An opted-out request has computed it, so the other's fingerprint is made of sums and of its last tokens."""
    prompt = ids[name]
    engine.llm.reset_prefix_cache()
    before = engine.stats()["routed"]
    off, answered = (
        engine.ask([prompt], [option], warm=True, max_tokens=TOKENS)[0] for option in ({"memoir": "off"}, None)
    )
    span = find_span(prompt, reference.retriever.store.manifest.span)
    assert answered.hit == span.decided_from // BLOCK * BLOCK > span.start
    assert engine.stats()["routed"] == before + 1
    assert wrong(reference, prompt, off, edited=False) < CLOSE
    assert wrong(reference, prompt, answered) < CLOSE
    (answer,) = reference.predict([prompt], [answered.tokens])
    assert answered.memoir["overlap"] == pytest.approx(answer.overlap, abs=0.005)


@pytest.mark.parametrize("name", ["library long edit", "long edit", "long unrelated"])
def test_no_row_of_a_prompt_is_computed_twice(name: str, engine: Engine, ids: dict[str, list[int]]) -> None:
    before = engine.stats()["steps"]
    engine.ask([ids[name]], max_tokens=1)
    assert engine.stats()["steps"] - before == -(-len(ids[name]) // STEPS["max_num_batched_tokens"])


def test_twins_of_one_step(engine: Engine, reference: EditedModel, ids: dict[str, list[int]]) -> None:
    prompt = ids["library edit"]
    options = [None, {"memoir": "off"}] * 4
    for replies in (engine.ask([prompt] * 8, options), engine.ask([prompt] * 8, options[::-1])[::-1]):
        for option, reply in zip(options, replies, strict=True):
            assert wrong(reference, prompt, reply, edited=option is None) < CLOSE


def test_tenants_share_nothing(engine: Engine, reference: EditedModel, ids: dict[str, list[int]]) -> None:
    prompt, hits = ids["library edit"], []
    engine.llm.reset_prefix_cache()
    for salt in ("one", "two", "one"):
        (reply,) = engine.ask([prompt], warm=True, salt=salt)
        assert wrong(reference, prompt, reply) < CLOSE
        hits.append(reply.hit)
    assert hits == [0, 0, (len(prompt) - 1) // BLOCK * BLOCK]


@pytest.mark.parametrize("name", ["library edit", "library long edit", "library unrelated"])
@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.9, "seed": 11},
        {"prompt_logprobs": 1},
        {"max_tokens": 1},
        {"stop": ["e"]},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4},
        {"min_tokens": 8, "stop": ["e"]},
        {"structured_outputs": "[a-z]{3} [0-9]{2}"},
    ],
    ids=lambda how: next(iter(how)),
)
def test_ways_to_sample(how: dict, name: str, engine: Engine, ids: dict[str, list[int]]) -> None:
    """Asked again, when the edit is known on arrival and the question comes from the cache, the answer is the same."""
    if "structured_outputs" in how:
        from vllm.sampling_params import StructuredOutputsParams

        how = {"structured_outputs": StructuredOutputsParams(regex=how["structured_outputs"])}
    how = {"max_tokens": 10, **how}
    (cold,), (warm,) = engine.ask_raw([ids[name]], **how), engine.ask_raw([ids[name]], warm=True, **how)
    assert cold.outputs[0].text == warm.outputs[0].text and cold.outputs[0].text
    assert cold.outputs[0].finish_reason == warm.outputs[0].finish_reason
    if "prompt_logprobs" in how:
        assert len(cold.prompt_logprobs) == len(ids[name]) == len(warm.prompt_logprobs)
        for a, b in zip(cold.prompt_logprobs[1:], warm.prompt_logprobs[1:], strict=True):
            token = next(iter(a))
            assert a[token].logprob == pytest.approx(b[token].logprob, abs=CLOSE)


def test_nothing_is_kept(engine: Engine) -> None:
    engine.ask([[5, 6, 7]])
    stats = engine.settled()
    assert stats["live"] == 0
    assert stats["recalled"] > 0
