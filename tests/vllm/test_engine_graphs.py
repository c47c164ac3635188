"""Engines whose decode steps replay full CUDA graphs. A stand-in (ask_engine.py): what it has of a graph is that its
replay does not run the op's Python. Everything else is real, and so is who decides which steps it replays."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import V2, V2_STAND_IN, Expected, answer_of, ask_apart, flags

pytestmark = pytest.mark.engine

STEPS = {"block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 8, "num_gpu_blocks_override": 16}


@pytest.mark.parametrize("graphs", ["product", pytest.param("plain", marks=pytest.mark.slow)])
def test_any_mix_of_requests(graphs: str, small: Path, small_edits: Path) -> None:
    order = {"flags": flags(small, small_edits, **STEPS), "full_graphs": graphs, "mixes": [0, 1], "requests": 60}
    said = answer_of(ask_apart(order))
    assert said["edited"] > 3, "the mix holds edits"
    assert 0 < said["full_graphs"] < said["decode_steps"]


@pytest.mark.slow
@pytest.mark.parametrize("graphs", ["product", "plain"])
@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_decode_steps_replay(
    runner: str, graphs: str, small: Path, small_edits: Path, small_expected: dict[str, Expected]
) -> None:
    """One request at a time: all decode steps replay, with an edit only where the graphs hold the product."""
    paths, there = ([V2_STAND_IN], V2) if runner == "V2" else ([], {})
    pytest.importorskip("triton")
    sizes = {"max_num_batched_tokens": 40, "block_size": 32}
    edits, others = ("edit 0", "chat edit"), ("unrelated 0", "chat unrelated as third turn")
    for names, share in ((edits, graphs == "product"), (others, True)):
        turns = [{"prompts": [small_expected[name].ids]} for name in names]
        order = {"flags": flags(small, small_edits, **sizes), "full_graphs": graphs, "turns": turns}
        said = answer_of(ask_apart({**order, "how": {"max_tokens": 6}}, *paths, **there))
        for name, reply in zip(names, said["replies"], strict=True):
            assert reply["tokens"] == small_expected[name].tokens[:6], name
            assert reply["memoir"]["edit"] == small_expected[name].edit, name
        assert said["decode_steps"] == 10
        assert said["full_graphs"] == share * said["decode_steps"]


@pytest.mark.slow
def test_a_vllm_that_asks_elsewhere_is_stopped(
    small: Path, small_edits: Path, small_expected: dict[str, Expected]
) -> None:
    """Without the guard an edited request would get the base model's tokens from its second one on. The self-test at
    the start finds it; what would stop a later step is tested in test_residual.py."""
    order = {"flags": flags(small, small_edits), "full_graphs": "unguarded", "prompts": [small_expected["edit 0"].ids]}
    done = ask_apart(order)
    assert done.returncode and "does not run the edited layer's op" in done.stderr + done.stdout
