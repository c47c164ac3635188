"""The benchmark of a step runs with today's code; what it measures says nothing here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_cost.py"


def test_the_benchmark_of_a_step_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("step_cost", SCRIPT)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "step_cost", script)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "STEPS", 3)
    monkeypatch.setattr(sys, "argv", ["step_cost.py", "--edits", "4", "2"])
    script.main()
    timings = json.loads(capsys.readouterr().out)["2"]
    assert {kind: [*parts] for kind, parts in timings.items()} == {
        "nothing": ["routing", "rows"],
        "one edit": ["routing", "rows", "arithmetic"],
        "different edits": ["routing", "rows", "arithmetic"],
        "all": ["sums"],
    }
