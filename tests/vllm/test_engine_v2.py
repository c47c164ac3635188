"""Model Runner V2, the default on a GPU, on its Triton kernels run by an interpreter (see gpu_stand_in)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import Expected, flags

pytestmark = [pytest.mark.engine, pytest.mark.slow]

HERE = Path(__file__).parent
NAMES = ("edit 0", "unrelated 0", "chat edit", "chat unrelated as third turn", "edit 3", "one token")
TOKENS = 6


def test_v2_answers_are_the_references(small: Path, small_edits: Path, small_expected: dict[str, Expected]) -> None:
    pytest.importorskip("triton")
    wanted = [small_expected[name] for name in NAMES]
    paths = [str(HERE / "gpu_stand_in"), str(HERE), *sys.path]
    order = {
        # Steps of 40 tokens, so that questions are split.
        "flags": flags(small, small_edits, max_num_seqs=32, max_num_batched_tokens=40, block_size=32),
        "prompts": [e.ids for e in wanted] + [wanted[0].ids],
        "options": [None] * len(wanted) + [{"memoir": "off"}],
        "how": {"max_tokens": TOKENS},
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "ask_engine.py")],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        timeout=500,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
            "VLLM_USE_V2_MODEL_RUNNER": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
        },
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "model runner V2" in done.stdout + done.stderr
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    *replies, opted_out = answer["replies"]
    for name, reply, e in zip(NAMES, replies, wanted, strict=True):
        assert reply["tokens"] == e.tokens[:TOKENS], name
        assert reply["memoir"]["edit"] == e.edit, name
    assert opted_out["tokens"] == wanted[0].base[:TOKENS]
    assert opted_out["memoir"]["result"] == "off"
    assert answer["stats"]["live"] == 0
    assert answer["stats"]["routed"] == len(NAMES)
