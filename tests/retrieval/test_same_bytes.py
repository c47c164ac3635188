"""The same input gives the same bytes, whatever process writes them and whenever."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load
from test_cli import EDITS, run, write
from test_store import write as write_store

from memoir_retrieval import Edit, Editor, load_model
from memoir_retrieval.editing.trainer import Trainer
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.store.read import EditStore
from memoir_retrieval.store.tensors import tensor_chunks
from memoir_retrieval.store.write import write_again


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != ".lock"}


# Runs in two processes whose sets and dictionaries of objects differ in order. Arguments: a folder, and those that the
# commands share.
SCRIPT = """
import sys
from memoir_retrieval.cli import main

folder, *shared = sys.argv[1:]
for kind, command in (("masks", ["index", "build"]), ("edits", ["edit", "--keep-failed"])):
    try:
        main([*command, *shared, "--store", f"{folder}/{kind}"])
    except SystemExit as done:
        assert not done.code, done.code
"""


def test_two_processes_write_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "edits.jsonl", EDITS)
    folders = [tmp_path / seed for seed in ("1", "2")]
    for folder in folders:
        folder.mkdir()
        variables = os.environ | {"PYTHONHASHSEED": folder.name, "SOURCE_DATE_EPOCH": "1700000000"}
        command = [sys.executable, "-c", SCRIPT, str(folder), str(file), "--model", str(tiny)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for kind in ("masks", "edits"):
        first, second = (digests(folder / kind) for folder in folders)
        assert len(first) == 4 and first == second, kind
    created = {edit.created for edit in EditStore.open(folders[0] / "edits").edits}
    assert created == {"2023-11-14T22:13:20+00:00"}


@pytest.mark.parametrize("value", ["soon", "1e99", "9" * 40])
def test_a_time_that_is_none_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", value)
    file = write(tmp_path / "edits.jsonl", EDITS[:1])
    code, _, err = run(capsys, "edit", file, "--model", tiny, "--store", tmp_path / "s", "--keep-failed")
    assert code == 2 and err == f"memoir: SOURCE_DATE_EPOCH is '{value}'; give seconds since 1970, or unset it\n"
    assert not (tmp_path / "s").exists(), "before the model is loaded"


def test_a_time_that_is_none_is_refused_before_anything_is_trained(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learn(*arguments: object) -> None:
        raise AssertionError("it was trained")

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "abc")
    monkeypatch.setattr(Trainer, "learn", learn)
    wrong = "SOURCE_DATE_EPOCH is 'abc'; give seconds since 1970, or unset it"
    with Editor(load_model(str(tiny)), tmp_path / "s") as editor, pytest.raises(ConfigError, match=wrong):
        editor.add([Edit(prompt="Who founded Aarhus?", target="King Harald")])
    assert not list((tmp_path / "s").glob("*.json*"))


def test_a_store_that_is_written_again_has_the_same_bytes(tmp_path: Path) -> None:
    write_store(tmp_path / "a")
    store = EditStore.open(tmp_path / "a")
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
        write_again(tmp_path / name, store, generation=1)
    assert digests(tmp_path / "b") == digests(tmp_path / "c") == digests(tmp_path / "a")


@pytest.mark.parametrize("view", ["transposed", "strided", "backwards"])
def test_arrays_that_are_views_are_written_as_what_they_show(view: str) -> None:
    whole = np.arange(48, dtype=np.float32).reshape(6, 8)
    array = {"transposed": whole.T, "strided": whole[::2, ::3], "backwards": whole[::-1]}[view]
    assert not array.flags.c_contiguous
    data = b"".join(tensor_chunks({"x": array, "n": np.arange(20, dtype=np.int64)[::2][: len(array)]}))
    np.testing.assert_array_equal(load(data)["x"], array)
