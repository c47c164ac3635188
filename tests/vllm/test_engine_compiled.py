"""The same answers through torch.compile (Inductor), where the op is an opaque node of the graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engines import PROMPTS, Engine, Expected, flags

pytestmark = pytest.mark.engine


def test_compiled_answers_are_the_references(
    start: Callable[..., Engine],
    model_folder: Path,
    store_folder: Path,
    expected: dict[str, Expected],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("compiled")))
    engine = start(**flags(model_folder, store_folder, enforce_eager=False))
    replies = engine.ask([wanted.ids for wanted in expected.values()])
    for name, reply in zip(PROMPTS, replies, strict=True):
        assert reply.tokens == expected[name].tokens, name
        assert reply.memoir["edit"] == expected[name].edit, name
