"""Random mixes of requests on a real engine with small steps and few blocks, each request against the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from engines import EDITS, SYSTEM, Engine, answer_of, ask_apart, flags, make_store, user
from mixes import CLOSE, LONG, any_mix, prompts_of

from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.question.span import SpanRule, derive_span_rule

pytestmark = pytest.mark.engine

STEPS = {"block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 8, "num_gpu_blocks_override": 16}


@pytest.fixture(scope="module", params=["question", pytest.param("all", marks=pytest.mark.slow)])
def served(
    request: pytest.FixtureRequest, base: BaseModel, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> EditedModel:
    rule = SpanRule(rule="all", acts="last")
    if request.param == "question":  # parts of messages too, some of which lie in the cache
        rule = msgspec.structs.replace(derive_span_rule(base.tokenizer), candidates=True)
    folder = make_store(base, tmp_path_factory.mktemp(request.param) / "edits", edits=(*EDITS, LONG), rule=rule)
    return EditedModel.open(folder, str(model_folder))


@pytest.fixture(scope="module")
def engine(served: EditedModel, start: Callable[..., Engine], model_folder: Path) -> Engine:
    return start(**flags(model_folder, served.retriever.store.path, **STEPS))


@pytest.mark.parametrize("seed", range(3))
def test_any_mix_of_requests(seed: int, engine: Engine, served: EditedModel) -> None:
    assert any_mix(seed, engine, served, prompts_of(served), requests=18) > 3, "the mix holds edits"


def test_an_edit_is_found_inside_a_message(engine: Engine, served: EditedModel) -> None:
    """Cold, beside a request that shares the beginning of its message, and from the cache once it is decided."""
    if not served.retriever.store.manifest.span.candidates:
        pytest.skip("the whole prompt is looked up")
    long = "The harbour was closed in winter. We waited for the ice to melt, week after week, and read old papers. "
    messages = [long + EDITS[0] + " Thank you!", long + EDITS[1] + " Thank you!", long + "What now? Thank you!"]
    rows = [served.prompt_ids([user(message)]) for message in messages]
    engine.llm.reset_prefix_cache()
    for ids in (*rows, *rows):
        (wanted,) = served.generate([ids], max_new_tokens=6)
        (reply,) = engine.ask([ids], warm=True, max_tokens=6)
        assert reply.memoir is not None and reply.memoir["edit"] == wanted.edit
        assert reply.tokens == list(wanted.tokens)
    assert [served.generate([ids], max_new_tokens=1)[0].edit for ids in rows] == [0, 1, None]


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
    size, (message, *parts) = STEPS["block_size"], served.retriever.spans(long)
    full = (len(long) - 1) // size * size
    # Where parts are looked up what stands before them serves all, and all of it once the prompt is decided.
    before = min((message.decided_from, *(part.start for part in parts))) // size * size
    assert full > 32 and hits == [0, before, before, full], "what opted out has computed serves all"
    assert before == (0 if parts else full)


@pytest.mark.slow
@pytest.mark.parametrize("naive", [False, True])
def test_without_the_protocol_edits_reach_other_requests(
    naive: bool, base: BaseModel, model_folder: Path, store_folder: Path
) -> None:
    """The naive hook applies the edit where it is found and leaves vLLM's cache to itself: a request that opted out
    then reads rows of the edit. With the protocol it does not."""
    model = EditedModel.open(store_folder, str(model_folder))
    # A block of rows behind the token from which the edit acts: what the cache can mix up.
    begun = model.base.tokenizer(
        " Those who keep the old books of the harbour, the mill and the two bridges have written it down for their"
        " children more than once, and what stands there in black ink is"
    ).input_ids
    ids = [*model.prompt_ids([SYSTEM, user(EDITS[1])]), *begun]
    off = {"memoir": "off"}
    order = {
        "flags": flags(model_folder, store_folder, block_size=32),
        "naive": naive,
        "turns": [{"prompts": [ids], "options": [option]} for option in (None, off)],
        "how": {"max_tokens": 8, "warm": True},
    }
    edited, plain = answer_of(ask_apart(order))["replies"]
    assert edited["memoir"]["edit"] == 1 and plain["memoir"]["result"] == "off"
    (wanted,) = model.predict([ids], [plain["tokens"]], edited=False)
    wrong = max(abs(a - b) for a, b in zip(plain["logprobs"], wanted.logprobs, strict=True))
    assert (wrong > 50 * CLOSE) if naive else (wrong < CLOSE)
