"""A few of the fuzzer's inputs on every run, and a hundred thousand among the slow tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import fuzz


@pytest.mark.parametrize("inputs", [400, pytest.param(100_000, marks=pytest.mark.slow)])
def test_nothing_unexpected_comes_of_random_damage(tmp_path: Path, inputs: int) -> None:
    became = fuzz(inputs, 0, tmp_path)
    assert became.total() >= inputs
    assert {"memory: refused", "codes: refused", "edits: refused", "manifest: refused", "addition: refused"} <= {
        *became
    }
    assert became["edit file: read"] and became["edit file: refused"]
    assert sum(count for what, count in became.items() if "opened" in what) > inputs / 100
