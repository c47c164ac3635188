"""A store that was pulled may be anybody's: what it holds is shown, and never obeyed by a terminal."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import forge
import msgspec
import pytest
from test_store import stored_edit, write

from memoir_retrieval.cli import common, main


def test_a_stored_text_cannot_steer_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What moves a cursor, hides a row or turns a line round is written out, whatever command prints it."""
    evil = "a\x1b[2K\x1b[1A\r\x9b2Jb\u202ec\x00\x7f\u2028d\nsource  e"
    edits = [stored_edit(0), stored_edit(1, target=evil, subject=evil), stored_edit(2)]
    edits[1] = msgspec.structs.replace(edits[1], prompt=evil)
    write(tmp_path / "s", edits=edits)
    manifest = forge.manifest(tmp_path / "s")
    forge.sign(tmp_path / "s", manifest | {"model": evil})
    monkeypatch.setattr(common.tables, "_width", 400)
    commands = (
        ["list"],
        ["show", "1"],
        ["list", "--json"],
        ["show", "1", "--json"],
        ["index", "info"],
        ["index", "verify"],
        ["remove", "1"],
    )
    for command, *rest in commands:
        where = [rest.pop(0)] if command == "index" else []
        with pytest.raises(SystemExit):
            main([command, *where, str(tmp_path / "s"), *rest])
        printed = capsys.readouterr()
        shown = printed.out + printed.err
        signs = {char for char in shown if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp")} - {"\n"}
        assert shown and not signs, (command, signs)
        if command != "index":
            assert "a\\u001b[2K\\u001b[1A" in shown and "b\\u202ec" in shown
        if "--json" in rest:
            held = json.loads(printed.out)
            assert (held[1] if command == "list" else held)["prompt"] == evil
        elif command == "show":
            assert not [line for line in shown.splitlines() if line.startswith("source")]
        elif command == "list":
            assert len([line for line in shown.splitlines() if "p2" in line]) == 1


def test_the_model_that_a_store_names_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "s")
    forge.sign(tmp_path / "s", forge.manifest(tmp_path / "s") | {"model": "a\x1b[2K\x1b[1Ab\u202ec"})
    for form in ([], ["--json"]):
        with pytest.raises(SystemExit):
            main(["doctor", "--quick", "--store", str(tmp_path / "s"), *form])
        shown = capsys.readouterr().out
        assert "model a\\u001b[2K\\u001b[1Ab\\u202ec" in shown and not {"\x1b", "\u202e"} & {*shown}


def test_an_error_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["list", str(tmp_path / "a\x1b[2K\u202eb")])
    assert "/a\\u001b[2K\\u202eb" in capsys.readouterr().err
