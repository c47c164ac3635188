"""Mode single on a real engine: no prompt is split, nothing is cached, the same answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engines import PROMPTS, Engine, Expected, flags

pytestmark = pytest.mark.engine


def test_answers_are_the_references(
    start: Callable[..., Engine], model_folder: Path, store_folder: Path, expected: dict[str, Expected]
) -> None:
    engine = start(**flags(model_folder, store_folder, memoir={"mode": "single"}))
    prompts = [wanted.ids for wanted in expected.values()]
    for _ in range(2):
        for name, reply in zip(PROMPTS, engine.ask(prompts, warm=True), strict=True):
            assert reply.tokens == expected[name].tokens, name
            assert (reply.memoir["edit"], reply.hit) == (expected[name].edit, 0), name
    assert engine.stats()["recalled"] == 0
