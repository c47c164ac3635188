"""The contract with vLLM's internals. A new version of vLLM fails here first, naming the function to read again."""

from __future__ import annotations

import json

import pytest
from seams import RECORDED, SEAMS, installed

from memoir_vllm.config import TESTED

CONTRACT = json.loads(RECORDED.read_text())
VERSION, FOUND = installed()


def test_the_recorded_version_is_a_tested_one() -> None:
    assert tuple(map(int, CONTRACT["vllm"].split(".")[:2])) in TESTED
    assert sum(map(len, SEAMS.values())) == len(CONTRACT["seams"])


@pytest.mark.parametrize("seam", FOUND)
def test_what_we_build_on_is_what_we_have_read(seam: str) -> None:
    assert FOUND[seam], f"vLLM {VERSION} has no {seam}"
    assert FOUND[seam] == CONTRACT["seams"][seam], f"read {seam} of vLLM {VERSION} again, then seams.py --write"
