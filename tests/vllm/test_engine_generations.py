"""A new generation of the store in a running engine: every answer is the reference's for the generation it reports."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import EDITS, NEW_TOKENS, Engine, Expected, flags, make_store, next_generation

from memoir_retrieval.edits.judge import shipped_judge
from memoir_retrieval.edits.record import Requires
from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.question.prompts import prompt_ids
from memoir_retrieval.store.read import EditStore

pytestmark = pytest.mark.engine

FIRST, SECOND = 3, 4
ASKED = ("edit 0", "edit 1", "unrelated 0", "chat edit", "chat unrelated after system")


@pytest.fixture(scope="module")
def folder(small_edits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(small_edits, tmp_path_factory.mktemp("generations") / "edits")


@pytest.fixture(scope="module")
def engine(start: Callable[..., Engine], small: Path, folder: Path) -> Engine:
    return start(here=True, **flags(small, folder, block_size=32))


@pytest.fixture(scope="module")
def expected(small_expected: dict[str, Expected]) -> dict[str, Expected]:
    return small_expected


@pytest.fixture(scope="module")
def answers(
    engine: Engine, folder: Path, small: Path, expected: dict[str, Expected]
) -> dict[int, dict[str, tuple[list[int], int | None]]]:
    """By generation: the reference's tokens and edit. The second lacks edit 1 and answers the others differently."""
    answers = {FIRST: {name: (expected[name].tokens, expected[name].edit) for name in ASKED}}
    assert next_generation(folder, without=(1,)) == SECOND
    model = EditedModel.open(folder, str(small))
    prompts = [expected[name].ids for name in ASKED]
    second = model.generate(prompts, max_new_tokens=NEW_TOKENS, batch_size=1)
    answers[SECOND] = {name: (list(a.tokens), a.edit) for name, a in zip(ASKED, second, strict=True)}
    assert answers[FIRST]["edit 0"][0] != answers[SECOND]["edit 0"][0]
    assert answers[SECOND]["edit 1"] == (expected["edit 1"].base, None)
    return answers


def test_requests_in_flight_finish_on_their_generation(engine: Engine, answers: dict, expected: dict) -> None:
    """Before, in the middle of and after a reload; twice, so that decisions are remembered and blocks cached."""
    from vllm import SamplingParams

    core = engine.llm.llm_engine
    done: dict[str, tuple[list[int], dict]] = {}

    def add(when: str) -> None:
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
        for name in ASKED:
            core.add_request(f"{when}: {name}", {"prompt_token_ids": expected[name].ids}, params)

    def step(limit: int = 1000) -> None:
        for _ in range(limit):
            if not core.has_unfinished_requests():
                return
            for output in core.step():
                if output.finished:
                    done[output.request_id] = (list(output.outputs[0].token_ids), output.kv_transfer_params["memoir"])

    add("first")
    step()
    add("in flight")
    step(4)
    assert engine.llm.collective_rpc("memoir_reload") == [SECOND]
    assert engine.stats()["older_generations"] == 1
    add("after")
    step()
    add("once more")
    step()
    wanted = {"first": FIRST, "in flight": FIRST, "after": SECOND, "once more": SECOND}
    assert len(done) == len(wanted) * len(ASKED)
    for key, (tokens, said) in done.items():
        when, name = key.split(": ")
        assert said["generation"] == wanted[when], key
        assert (tokens, said["edit"]) == answers[said["generation"]][name], key
    stats = engine.settled()
    assert (stats["generation"], stats["edits"], stats["older_generations"], stats["live"]) == (SECOND, 3, 0, 0)
    assert stats["remembered"] == len(ASKED)


def test_a_staged_generation_is_adopted_as_it_was_read(engine: Engine, answers: dict, folder: Path) -> None:
    third = next_generation(folder)
    engine.llm.collective_rpc("memoir_stage")
    while not all(engine.llm.collective_rpc("memoir_staged")):
        pass
    next_generation(folder)
    assert engine.llm.collective_rpc("memoir_reload") == [third]
    assert engine.llm.collective_rpc("memoir_reload") == [third + 1]
    assert engine.llm.collective_rpc("memoir_reload") == [third + 1]


def test_a_bad_generation_changes_nothing(engine: Engine, answers: dict, folder: Path, expected: dict) -> None:
    ids = expected["edit 0"].ids
    (before,) = engine.ask([ids])
    generation = next_generation(folder)
    memory = folder / EditStore.open(folder).manifest.memory.name
    sound = memory.read_bytes()
    memory.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(Exception, match="is damaged"):
        engine.llm.collective_rpc("memoir_reload")
    (after,) = engine.ask([ids])
    assert (after.tokens, after.memoir) == (before.tokens, before.memoir)
    memory.write_bytes(sound)
    assert engine.llm.collective_rpc("memoir_reload") == [generation]


@pytest.mark.slow
def test_an_edit_acts_where_what_it_requires_stands(model_folder: Path, base: BaseModel, tmp_path: Path) -> None:
    """Another name: matched while masks alone decide, and the base model's bits once it is required, or judged."""
    prompts = [EDITS[0], EDITS[0].replace("Zubrovia", "Zubrowka"), EDITS[0].replace("The", "the").replace("Z", "z")]
    rows = [prompt_ids(base.tokenizer, prompt, chat=False) for prompt in prompts]
    required: Requires = ("president", ("Zembla", "ZUBROVIA"))
    folder = make_store(base, tmp_path / "edits")
    engine = Engine(**flags(model_folder, folder, block_size=32))
    try:
        for judge, requires, edits in (
            ("", {}, [0, 0, 0]),
            ("", {0: required}, [0, None, 0]),
            (shipped_judge().name, {0: ()}, [0, None, 0]),
        ):
            generation = next_generation(folder, requires=requires, judge=judge)
            assert engine.llm.collective_rpc("memoir_reload") == [generation]
            model = EditedModel.open(folder, str(model_folder))
            wanted = model.generate(rows, max_new_tokens=NEW_TOKENS, batch_size=1)
            assert [answer.edit for answer in wanted] == edits
            for batch in (rows, rows, [rows[1]]):  # decided, remembered, alone
                for reply, answer in zip(engine.ask(batch), wanted if len(batch) == 3 else wanted[1:2], strict=True):
                    assert (list(reply.tokens), reply.memoir["edit"]) == (list(answer.tokens), answer.edit)
        (matched_not,) = engine.ask([rows[1]])
        (opted_out,) = engine.ask([rows[1]], [{"memoir": "off"}])
    finally:
        engine.close()
    assert matched_not.tokens == opted_out.tokens and matched_not.memoir["result"] == "unmatched"


def test_a_store_that_went_back_is_refused(
    engine: Engine, answers: dict, small_edits: Path, folder: Path, tmp_path: Path
) -> None:
    restored = shutil.copytree(small_edits, tmp_path / "edits")
    for path in folder.iterdir():
        path.unlink()
    for path in restored.iterdir():
        path.rename(folder / path.name)
    with pytest.raises(Exception, match="restore from a backup: start the engine again"):
        engine.llm.collective_rpc("memoir_reload")
