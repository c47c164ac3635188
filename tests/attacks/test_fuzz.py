"""A few of the fuzzer's inputs on every run, and a hundred thousand among the slow tests."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from fuzz import RequestFuzz, fuzz


@pytest.mark.parametrize("inputs", [400, pytest.param(100_000, marks=pytest.mark.slow)])
def test_nothing_unexpected_comes_of_random_damage(tmp_path: Path, inputs: int) -> None:
    became = fuzz(inputs, 0, tmp_path)
    assert became.total() >= inputs
    assert {"memory: refused", "codes: refused", "edits: refused", "manifest: refused", "addition: refused"} <= {
        *became
    }
    assert became["edit file: read"] and became["edit file: refused"]
    assert became["/edits: 202"] and became["/edits: 422"] and became["/lookup: 503"] and became["/lookup: 422"]
    assert became["repository, nothing: pulled"] and became["repository, bytes: refused"]
    assert sum(count for what, count in became.items() if "opened" in what) > inputs / 100


def test_a_key_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    body = b'{"prompt": "a", "target": "b", "\\ud800": 1}'
    reply = asyncio.run(RequestFuzz(tmp_path / "store").post("/edits", body))
    assert reply.status_code == 400 and reply.json()["detail"]


def test_a_cloze_that_is_posted_is_about_the_question_that_it_stands_for(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    requests = RequestFuzz(tmp_path / "store")
    body = b'{"prompt": "{}0", "target": "%s", "subject": "p"}'
    assert asyncio.run(requests.post("/edits", body % b"t")).json()["id"] == 0  # as it is stored already
    reply = asyncio.run(requests.post("/edits", body % b"other"))
    assert reply.status_code == 409 and "stored with target 't' (edit 0)" in reply.json()["detail"]
