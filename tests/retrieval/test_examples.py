"""The example files: they run as they are, and a strict type checker accepts them (`make lint`).

`ask_server.py` is run in `tests/vllm/test_server.py`.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from memoir_retrieval.embedded import get_model

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_from_a_file_of_edits_to_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    get_model("smollm2-135m")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "edit_and_ask.py"))
    rephrased, unrelated = capsys.readouterr().out.splitlines()[:2]
    assert rephrased == "0 Jane Doe"
    assert unrelated.startswith("None ") and "Paris" in unrelated
    runpy.run_path(str(EXAMPLES / "look_up_and_measure.py"))
    held, found, measured = capsys.readouterr().out.splitlines()
    assert held == "3 edits of smollm2-135m, generation 1"
    assert found.startswith("edit 2, overlap 0.") and found.endswith("Port 4711")
    assert measured == "reliability 1.00, exact answers 1.00"


def test_the_first_example_is_ten_lines() -> None:
    code = (EXAMPLES / "edit_and_ask.py").read_text().partition('"""\n\n')[2]
    assert len([line for line in code.splitlines() if line]) <= 10
