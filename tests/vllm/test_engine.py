"""One mixed batch and the awkward requests, on a real engine (model runner V1, eager), against the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engines import EDITS, MAX_MODEL_LEN, NEW_TOKENS, PIRATE, PROMPTS, Engine, Expected, Reply, flags, user
from vllm.exceptions import VLLMValidationError

from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.question.prompts import prompt_ids

pytestmark = pytest.mark.engine

# Room for the mixed batch, but not for 60 more tokens of each of its requests.
SMALL_CACHE = {"block_size": 32, "num_gpu_blocks_override": 28, "disable_log_stats": False}
SAMPLED = {"temperature": 0.8, "seed": 7, "n": 2}


@pytest.fixture(scope="module")
def without_plugin(model_folder: Path, expected: dict[str, Expected]) -> dict[str, list]:
    """The same vLLM flags without a memoir section. Closed again: engines share the cores."""
    engine = Engine(**flags(model_folder, **SMALL_CACHE))
    prompts = [expected[name].ids for name in PROMPTS]
    try:
        return {"greedy": engine.ask(prompts), "sampled": engine.ask_raw(prompts, **SAMPLED)}
    finally:
        engine.close()


@pytest.fixture(scope="module")
def engine(without_plugin: object, start: Callable[..., Engine], model_folder: Path, store_folder: Path) -> Engine:
    return start(**flags(model_folder, store_folder, **SMALL_CACHE))


@pytest.fixture(scope="module")
def mixed(engine: Engine, expected: dict[str, Expected]) -> dict[str, Reply]:
    replies = engine.ask([expected[name].ids for name in PROMPTS])
    return dict(zip(PROMPTS, replies, strict=True))


def test_the_batch_holds_what_it_is_meant_to_hold(expected: dict[str, Expected]) -> None:
    for name, wanted in expected.items():
        assert (wanted.edit is not None) == ("edit" in name), name
        assert (wanted.tokens != wanted.base) == ("edit" in name), name


@pytest.mark.parametrize("name", PROMPTS)
def test_answers_are_the_references(name: str, mixed: dict[str, Reply], expected: dict[str, Expected]) -> None:
    assert mixed[name].tokens == expected[name].tokens


@pytest.mark.parametrize("name", PROMPTS)
def test_responses_say_which_edit_acted(name: str, mixed: dict[str, Reply], expected: dict[str, Expected]) -> None:
    wanted = expected[name]
    assert mixed[name].memoir == {
        "edit": wanted.edit,
        "overlap": pytest.approx(wanted.overlap, abs=0.01),
        "result": "unmatched" if wanted.edit is None else "matched",
        "generation": 3,
    }


def test_unmatched_batchmates_keep_their_bits(mixed: dict[str, Reply], without_plugin: dict[str, list]) -> None:
    for (name, ours), theirs in zip(mixed.items(), without_plugin["greedy"], strict=True):
        if ours.memoir["edit"] is None:
            assert (ours.tokens, ours.logprobs) == (theirs.tokens, theirs.logprobs), name
        else:
            assert ours.logprobs != theirs.logprobs, name


def test_opted_out_requests_keep_their_bits(
    engine: Engine, expected: dict[str, Expected], without_plugin: dict[str, list]
) -> None:
    replies = engine.ask([expected[name].ids for name in PROMPTS], [{"memoir": "off"}] * len(PROMPTS))
    for name, ours, theirs in zip(PROMPTS, replies, without_plugin["greedy"], strict=True):
        assert (ours.tokens, ours.logprobs) == (theirs.tokens, theirs.logprobs), name
        assert ours.memoir == {"edit": None, "overlap": 0.0, "result": "off", "generation": 3}


def test_opted_out_twin_in_the_same_batch(engine: Engine, expected: dict[str, Expected]) -> None:
    wanted = expected["chat edit"]
    edited, plain = engine.ask([wanted.ids] * 2, [None, {"memoir": "off"}])
    assert (edited.tokens, plain.tokens) == (wanted.tokens, wanted.base)


def test_a_span_from_the_client_replaces_the_found_one(engine: Engine, expected: dict[str, Expected]) -> None:
    """Behind a raw preamble the question has no marker: the whole prompt is pooled, unless the client knows better."""
    question, preamble = expected["edit 0"].ids, expected["unrelated 0"].ids * 6
    ids, start = preamble + question, len(preamble)
    fused, given, other = engine.ask(
        [ids] * 3, [None, {"memoir_span": f"{start}:{len(ids)}"}, {"memoir_span": f"0:{start}"}]
    )
    assert fused.memoir["result"] == other.memoir["result"] == "unmatched"
    assert given.memoir["edit"] == 0
    assert given.memoir["overlap"] > fused.memoir["overlap"] + 0.1


def test_seeded_samples_of_unmatched_prompts_are_unchanged(
    engine: Engine, expected: dict[str, Expected], without_plugin: dict[str, list]
) -> None:
    outputs = engine.ask_raw([expected[name].ids for name in PROMPTS], **SAMPLED)
    for name, ours, theirs in zip(PROMPTS, outputs, without_plugin["sampled"], strict=True):
        same = [list(a.token_ids) == list(b.token_ids) for a, b in zip(ours.outputs, theirs.outputs, strict=True)]
        assert same == [expected[name].edit is None] * 2, name


def test_preempted_requests_keep_their_edit(engine: Engine, expected: dict[str, Expected]) -> None:
    def preemptions() -> float:
        return sum(m.value for m in engine.llm.get_metrics() if m.name == "vllm:num_preemptions")

    prompts = [expected[name].ids for name in PROMPTS]
    how = {"max_tokens": 60, "ignore_eos": True}
    roomy = [reply for at in range(0, len(prompts), 4) for reply in engine.ask(prompts[at : at + 4], **how)]
    before = preemptions()
    pressed = engine.ask(prompts, **how)
    assert preemptions() > before
    assert [reply.tokens for reply in pressed] == [reply.tokens for reply in roomy]
    assert [reply.memoir for reply in pressed] == [reply.memoir for reply in roomy]


def test_one_new_token(engine: Engine, expected: dict[str, Expected]) -> None:
    """A request that finishes in the very step that decides it."""
    replies = engine.ask([expected[name].ids for name in PROMPTS], max_tokens=1)
    assert [reply.tokens for reply in replies] == [wanted.tokens[:1] for wanted in expected.values()]
    assert [reply.memoir["edit"] for reply in replies] == [wanted.edit for wanted in expected.values()]


def test_longest_prompt(engine: Engine, expected: dict[str, Expected], store_folder: Path, model_folder: Path) -> None:
    reference = EditedModel.open(store_folder, str(model_folder))
    question = reference.prompt_ids([PIRATE, user(EDITS[1])])
    filler = expected["unrelated 0"].ids * MAX_MODEL_LEN
    ids = filler[: MAX_MODEL_LEN - 1 - len(question)] + question
    wanted = reference.generate([ids], max_new_tokens=1)[0]
    (reply,) = engine.ask([ids], max_tokens=5)
    assert reply.tokens == list(wanted.tokens)
    assert reply.memoir["edit"] == wanted.edit == 1


def test_a_chat_without_a_question_is_served_by_the_base_model(engine: Engine, base: BaseModel) -> None:
    empty = prompt_ids(base.tokenizer, [PIRATE, user("")], chat=True)
    edited, plain = engine.ask([empty] * 2, [None, {"memoir": "off"}])
    assert edited.memoir == {"edit": None, "overlap": 0.0, "result": "unroutable", "generation": 3}
    assert edited.logprobs == plain.logprobs


@pytest.mark.parametrize(
    "bad",
    [
        {"memoir": "on"},
        {"memoir": 1},
        {"memoir_span": "5"},
        {"memoir_span": "3:3"},
        {"memoir_span": "0:999"},
        {"memoire": 0},
    ],
    ids=str,
)
def test_unknown_options_are_refused(bad: dict, engine: Engine, expected: dict[str, Expected]) -> None:
    with pytest.raises(VLLMValidationError, match="vllm_xargs"):
        engine.llm.generate({"prompt_token_ids": expected["edit 0"].ids}, _sampling(extra_args=bad), use_tqdm=False)


def test_beam_search_is_refused(engine: Engine, expected: dict[str, Expected]) -> None:
    from vllm.sampling_params import BeamSearchParams

    with pytest.raises(VLLMValidationError, match="beam search"):
        engine.llm.beam_search(
            [{"prompt_token_ids": expected["edit 0"].ids}], BeamSearchParams(beam_width=2, max_tokens=4)
        )


@pytest.mark.parametrize(
    ("call", "args"),
    [
        ("reload_weights", ()),
        ("start_weight_update", ()),
        ("reset_weights", ()),
        ("sleep", (2,)),
        ("discard", (("weights",),)),
    ],
)
def test_other_weights_are_refused(call: str, args: tuple, engine: Engine, expected: dict[str, Expected]) -> None:
    with pytest.raises(Exception, match="only hold on the weights that they were made on"):
        engine.llm.collective_rpc(call, args=args)
    (reply,) = engine.ask([expected["edit 0"].ids])
    assert reply.tokens == expected["edit 0"].tokens


def test_weights_are_not_slept_away(engine: Engine, expected: dict[str, Expected]) -> None:
    with pytest.raises(Exception, match="refuses sleep level 2"):
        engine.llm.sleep(level=2)
    (reply,) = engine.ask([expected["edit 0"].ids])
    assert reply.tokens == expected["edit 0"].tokens


def test_nothing_is_kept_of_finished_and_aborted_requests(engine: Engine, expected: dict[str, Expected]) -> None:
    core = engine.llm.llm_engine
    for i in range(4):
        core.add_request(f"abort {i}", {"prompt_token_ids": expected[f"edit {i}"].ids}, _sampling(max_tokens=100))
    for _ in range(3):
        core.step()
    assert engine.stats()["live"] == 4
    core.abort_request([f"abort {i}" for i in range(4)])
    (reply,) = engine.ask([expected["edit 0"].ids])
    assert reply.tokens == expected["edit 0"].tokens
    stats = engine.settled()
    assert stats["live"] == 0
    assert (stats["edits"], stats["generation"]) == (len(EDITS), 3)
    assert stats["routed"] >= stats["matched"] > 0
    assert stats["rows"] > stats["steps"] > NEW_TOKENS


def _sampling(**how: object) -> object:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, ignore_eos=True, **how)
