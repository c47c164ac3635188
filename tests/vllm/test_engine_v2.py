"""Model Runner V2, the default on a GPU, on its Triton kernels run by an interpreter (see gpu_stand_in)."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import V2, V2_STAND_IN, Expected, answer_of, ask_apart, flags

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NAMES = ("edit 0", "unrelated 0", "chat edit", "chat unrelated as third turn", "edit 3", "one token")
TOKENS = 6


def test_v2_answers_are_the_references(small: Path, small_edits: Path, small_expected: dict[str, Expected]) -> None:
    pytest.importorskip("triton")
    wanted = [small_expected[name] for name in NAMES]
    order = {
        # Steps of 40 tokens, so that questions are split.
        "flags": flags(small, small_edits, max_num_seqs=32, max_num_batched_tokens=40, block_size=32),
        "prompts": [e.ids for e in wanted] + [wanted[0].ids],
        "options": [None] * len(wanted) + [{"memoir": "off"}],
        "how": {"max_tokens": TOKENS},
        "stats": True,
    }
    done = ask_apart(order, V2_STAND_IN, **V2, VLLM_LOGGING_LEVEL="INFO")
    answer = answer_of(done)
    assert "model runner V2" in done.stdout + done.stderr
    *replies, opted_out = answer["replies"]
    for name, reply, e in zip(NAMES, replies, wanted, strict=True):
        assert reply["tokens"] == e.tokens[:TOKENS], name
        assert reply["memoir"]["edit"] == e.edit, name
    assert opted_out["tokens"] == wanted[0].base[:TOKENS]
    assert opted_out["memoir"]["result"] == "off"
    assert answer["stats"]["live"] == 0
    assert answer["stats"]["routed"] == len(NAMES)
