"""The contract with vLLM's internals. A new version of vLLM fails here first, naming the function to read again."""

from __future__ import annotations

from pathlib import Path

import pytest
from seams import SEAMS, changed, installed, read, seams_of, table, version_of

from memoir_vllm import requests
from memoir_vllm.core import blocks, rpc
from memoir_vllm.front import decisions, engine, responses
from memoir_vllm.patches import patched, wrap_once
from memoir_vllm.refusals import TESTED
from memoir_vllm.worker import lora

CONTRACT = read()
VERSION, FOUND = version_of(installed()), seams_of(installed())


def test_the_recorded_versions_are_those_of_the_start_up_check() -> None:
    served = [version for version, entry in CONTRACT.items() if entry["served"]]
    assert tuple(tuple(map(int, version.split(".")[:2])) for version in served) == TESTED


@pytest.mark.parametrize("version", CONTRACT)
def test_every_seam_is_recorded_and_every_change_was_read(version: str) -> None:
    entry = CONTRACT[version]
    assert sum(map(len, SEAMS.values())) == len(entry["seams"])
    assert sorted(entry["read"]) == sorted(changed(entry["seams"], CONTRACT))
    assert all(entry["read"].values())


@pytest.mark.parametrize("seam", FOUND)
def test_what_we_build_on_is_what_we_have_read(seam: str) -> None:
    assert VERSION in CONTRACT, f"vLLM {VERSION} is not recorded: read what seams.py prints, then seams.py --write"
    recorded = CONTRACT[VERSION]["seams"][seam]
    assert FOUND[seam] == recorded, f"read {seam} of vLLM {VERSION} again, then seams.py --write"


def test_what_is_wrapped_is_recorded() -> None:
    for module in (engine, requests, decisions, responses, rpc, blocks, lora):
        module.install()
    assert len(patched()) >= 12
    assert set(patched()) <= set(CONTRACT[VERSION]["seams"])


def test_a_function_is_wrapped_once() -> None:
    class Owner:
        def name(self) -> int:
            return 1

    before = patched()
    for _ in range(2):
        wrap_once(Owner, "name", lambda original: lambda self: original(self) + 1)
    assert Owner().name() == 2
    assert len(patched()) == len(before) + 1


def test_the_table_in_the_documentation_is_the_scripts() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "compatibility.md"
    assert page.read_text() == table(), "python tests/vllm/seams.py --table > docs/reference/compatibility.md"
