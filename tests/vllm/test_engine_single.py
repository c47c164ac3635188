"""Mode single on a real engine: no prompt is split, nothing is cached, the same answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from engines import PROMPTS, Engine, Expected, answers, flags, make_store

from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.question.span import derive_span_rule

pytestmark = pytest.mark.engine


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["question", "all"])
def test_stores_that_act_from_the_first_token_answer_as_they_were_made(
    rule: Literal["question", "all"], start: Callable[..., Engine], model_folder: Path, base: BaseModel, tmp_path: Path
) -> None:
    """No mode is named: such a store asks for this one."""
    span = msgspec.structs.replace(derive_span_rule(base.tokenizer, rule), acts="first", behind=0)
    folder = make_store(base, tmp_path / "edits", rule=span)
    wanted = answers(EditedModel.open(folder, str(model_folder)))
    assert sum(answer.edit is not None for answer in wanted.values()) >= 4
    engine = start(**flags(model_folder, folder))
    for name, reply in zip(PROMPTS, engine.ask([answer.ids for answer in wanted.values()]), strict=True):
        assert reply.tokens == wanted[name].tokens, name
        assert (reply.memoir["edit"], reply.hit) == (wanted[name].edit, 0), name


def test_answers_are_the_references(
    start: Callable[..., Engine], small: Path, small_edits: Path, small_expected: dict[str, Expected]
) -> None:
    engine = start(here=True, **flags(small, small_edits, memoir={"mode": "single"}))
    for _ in range(2):
        replies = engine.ask([wanted.ids for wanted in small_expected.values()], warm=True)
        for (name, wanted), reply in zip(small_expected.items(), replies, strict=True):
            assert reply.tokens == wanted.tokens, name
            assert (reply.memoir["edit"], reply.hit) == (wanted.edit, 0), name
    assert engine.stats()["recalled"] == 0


def test_the_transformers_backend_gives_the_references_answers(
    start: Callable[..., Engine], small: Path, small_edits: Path, small_expected: dict[str, Expected]
) -> None:
    """Its layers get rows [1, tokens, D]. Not in this process: vLLM puts classes of its own into transformers there."""
    engine = start(**flags(small, small_edits, model_impl="transformers"))
    replies = engine.ask([wanted.ids for wanted in small_expected.values()], warm=True)
    for (name, wanted), reply in zip(small_expected.items(), replies, strict=True):
        assert reply.tokens == wanted.tokens, name
        assert reply.memoir["edit"] == wanted.edit, name
