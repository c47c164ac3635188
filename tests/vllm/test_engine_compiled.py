"""The same answers through torch.compile (Inductor), where the op is an opaque node of the graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engines import PROMPTS, Engine, Expected, flags

pytestmark = pytest.mark.engine


def test_compiled_answers_are_the_references(
    start: Callable[..., Engine],
    small: Path,
    small_edits: Path,
    small_expected: dict[str, Expected],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("compiled")))
    engine = start(**flags(small, small_edits, enforce_eager=False))
    replies = engine.ask([wanted.ids for wanted in small_expected.values()])
    for name, reply in zip(PROMPTS, replies, strict=True):
        assert reply.tokens == small_expected[name].tokens, name
        assert reply.memoir["edit"] == small_expected[name].edit, name
    assert any(wanted.edit is None for wanted in small_expected.values())


@pytest.mark.slow
def test_one_compile_cache_serves_engines_with_and_without_edits(
    model_folder: Path,
    store_folder: Path,
    expected: dict[str, Expected],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without, with, without again, with again: a graph of one kind must never be taken for the other."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("shared")))
    prompts = [wanted.ids for wanted in expected.values()]
    for store in (None, store_folder, None, store_folder):
        engine = Engine(**flags(model_folder, store, enforce_eager=False))
        try:
            replies = engine.ask(prompts)
        finally:
            engine.close()
        for name, reply in zip(PROMPTS, replies, strict=True):
            assert reply.tokens == (expected[name].base if store is None else expected[name].tokens), name
            assert (reply.memoir is None) == (store is None), name
