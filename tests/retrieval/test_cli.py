"""The command line: what it prints, its exit codes, and that bad input is one line and changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import forge
import msgspec
import pytest

from memoir_retrieval.cli import cli, inspect, main
from memoir_retrieval.cli.serve import server_command
from memoir_retrieval.editing import session
from memoir_retrieval.edits.files import read_edits
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.evaluation.measure import stored_ids
from memoir_retrieval.store import files, read
from memoir_retrieval.store.files import store_lock
from memoir_retrieval.store.read import EditStore
from memoir_retrieval.store.write import leftovers, write_again, write_generation

EDITS = [
    {"prompt": "Who founded Aarhus?", "target": "King Harald", "rephrases": ["Aarhus was founded by whom?"],
     "locality": [{"prompt": "how tall is a giraffe", "answer": "five metres"}]},
    {"prompt": "Where is the Blue Gate?", "target": "In Oslo"},
]  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process."""
    try:
        main([str(a) for a in arguments])
        code = 0
    except SystemExit as done:
        code = int(done.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


@pytest.fixture(scope="session")
def template(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two edits; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("made")
    write(folder / "edits.jsonl", EDITS)
    main_arguments = ["edit", folder / "edits.jsonl", "--model", tiny, "--store", folder / "store", "--json"]
    cli.main([str(a) for a in main_arguments], standalone_mode=False)
    return folder / "store"


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "store"))


def commands() -> list[list[str]]:
    names = []
    for name, command in cli.commands.items():
        names.append([name])
        names += [[name, sub] for sub in getattr(command, "commands", {})]
    return names


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0 and "Example:" in out and f"memoir {' '.join(command)}" in out


def test_help_does_not_wait_for_torch() -> None:
    probe = (
        "import sys, memoir_retrieval.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'vllm')))"
    )
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0


def test_edits_are_listed_shown_looked_up_and_measured(
    capsys: pytest.CaptureFixture[str], store: Path, tiny: Path, tmp_path: Path
) -> None:
    code, out, _ = run(capsys, "list", store, "--json")
    assert code == 0 and [e["prompt"] for e in json.loads(out)] == [e["prompt"] for e in EDITS]
    assert "Where is the Blue Gate?" in run(capsys, "list", store)[1]
    assert json.loads(run(capsys, "show", store, "1", "--json")[1])["target"] == "In Oslo"
    assert "In Oslo" in run(capsys, "show", store, "1")[1]
    result = json.loads(run(capsys, "lookup", store, EDITS[1]["prompt"], "--json")[1])
    assert result["edit"] == 1 and result["overlap"] == 1.0 and result["runner_up"]["edit"] == 0
    messages = tmp_path / "messages.json"
    for content in (EDITS[0]["prompt"], [{"type": "text", "text": EDITS[0]["prompt"]}]):
        chat = [{"role": "user", "content": content}]
        for body in (chat, {"model": "m", "messages": chat}):
            messages.write_text(json.dumps(body))
            assert "edit 0, overlap 1.000" in run(capsys, "lookup", store, "--messages", messages)[1]
    code, out, err = run(capsys, "eval", store, store.parent / "edits.jsonl", "--json")
    assert (code == 2 and "does not exist" in err) or "No such file" in err
    file = write(tmp_path / "edits.jsonl", EDITS)
    code, out, _ = run(capsys, "eval", store, file, "--json", "--controls", "4", "--context", "all")
    report = json.loads(out)
    assert code == 0 and json.loads((tmp_path / "store.eval.json").read_text()) == report
    in_each = {"edits", "reliability", "generality", "locality", "average", "exact_match", "match", "tau", "context",
               "seconds", "neighbourhood", "perplexity", "generated"}  # fmt: skip
    assert set(report) == in_each | {"portability", "ood", "text", "contexts"}
    assert {name: set(scores) for name, scores in report["contexts"].items()} == {
        "system": in_each, "turn": in_each, "passages": in_each
    }  # fmt: skip
    assert set(report["exact_match"]) == {"edits", "rephrases"} and report["generated"]["prompts"] == 4
    assert set(report["match"]) == {"edits_right", "rephrases_right", "false_rate"}
    assert report["match"]["edits_right"] == 1.0 and report["edits"] == 2


def test_a_second_run_skips_what_is_stored_and_appends_what_is_new(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "more.jsonl", [*EDITS, {"prompt": "When did it rain?", "target": "On Monday"}])
    summary = json.loads(run(capsys, "edit", file, "--store", store, "--json")[1])
    assert (summary["stored"], summary["skipped"], summary["generation"]) == (1, 2, 2)
    assert summary["bytes"] == sum(len(b) for n, b in contents(store).items() if n != "memoir.json")
    before = contents(store)
    assert json.loads(run(capsys, "edit", file, "--store", store, "--json")[1])["stored"] == 0
    assert contents(store) == before


def test_calibrate_measures_a_store_and_writes_its_tau(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "edits.jsonl", EDITS)
    before = contents(store)
    code, out, err = run(capsys, "calibrate", store, file, "--json")
    result = json.loads(out)
    assert code == 0 and set(result) == {"now", "suggested", "curve", "overlaps", "nearest", "threshold"}
    assert {kind: len(values) for kind, values in result["overlaps"].items()} == {
        "edits": 2, "rephrases": 1, "unrelated": 101
    }  # fmt: skip
    assert contents(store) == before and "2 edits, 1 rephrasings, 101 other prompts" in err
    of_store = json.loads(run(capsys, "calibrate", store, "--json")[1])  # without FILE: no probe, same rephrasing
    assert of_store["overlaps"]["rephrases"] == result["overlaps"]["rephrases"]
    assert len(of_store["overlaps"]["unrelated"]) == 100
    code, out, err = run(capsys, "calibrate", store, file, "--write")
    tau = result["suggested"]["tau"]
    assert code == 0 and f"tau {tau} written to {store} as generation 2" in " ".join(err.split())
    assert " suggested" in out and "0.95-1.00" in out and "nearest unrelated:" in out
    written = json.loads((store / "memoir.json").read_text())
    assert (written["tau"], written["generation"]) == (tau, 2)


def test_calibrate_compares_layers_of_a_model(capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "edits.jsonl", EDITS)
    arguments = ("calibrate", "--model", tiny, file, "--layers", "2,0", "--ks", "9")
    code, out, _ = run(capsys, *arguments, "--no-chat", "--json")
    assert code == 0 and {(row["layer"], row["k"]) for row in json.loads(out)} == {(0, 9), (2, 9)}
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "best apart: --layer" in out and "--tau 0" not in out


BARE = [{"prompt": edit["prompt"], "target": edit["target"]} for edit in EDITS]
OTHER = [{"prompt": "Why?", "target": "So"}]
BAD_CALIBRATIONS = {
    "no store": (["{none}"], EDITS, "does not exist: make one"),
    "nothing named": ([], EDITS, "0 paths are given"),
    "three paths": (["{store}", "{file}", "{file}"], EDITS, "3 paths are given"),
    "a file alone": (["{file}"], EDITS, "is a file: put the store before it, or add --model NAME"),
    "no rephrasings": (["{store}", "{file}"], BARE, "no edit of .* has a rephrasing"),
    "not stored": (["{store}", "{file}"], OTHER, "1 of 1 edits of the file are not stored"),
    "dtype of a store": (["{store}", "--dtype", "bfloat16"], EDITS, "--dtype cannot be set for store"),
    "no such device": (["{store}", "--device", "abacus"], EDITS, "device 'abacus' cannot be used"),
    "layer of a store": (["{store}", "--layers", "1"], EDITS, "--layers cannot be set for store"),
    "write a model": (["--model", "{tiny}", "{file}", "--write"], EDITS, "--write needs a store"),
    "no file of a model": (["--model", "{tiny}", "{none}"], EDITS, "cannot be read"),
    "layers": (["--model", "{tiny}", "{file}", "--layers", "1,x"], EDITS, "'1,x' is not a list of whole numbers"),
    "layer outside": (["--model", "{tiny}", "{file}", "--layers", "3"], EDITS, "layer 3 does not exist"),
    "k above D": (["--model", "{tiny}", "{file}", "--ks", "65"], EDITS, "k is 65, but the layer has D=64"),
    "model no rephrasings": (["--model", "{tiny}", "{file}"], BARE, "no edit of the file has a rephrasing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALIBRATIONS)
def test_what_calibrate_cannot_measure_is_one_line(
    capsys: pytest.CaptureFixture[str], store: Path, tiny: Path, tmp_path: Path, case: str
) -> None:
    arguments, lines, said = BAD_CALIBRATIONS[case]
    names = {"store": store, "tiny": tiny, "none": tmp_path / "none", "file": write(tmp_path / "edits.jsonl", lines)}
    refused(capsys, store, said, "calibrate", *(argument.format(**names) for argument in arguments))


def test_calibrate_of_a_store_without_edits(capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path) -> None:
    opened = EditStore.open(store)
    with store_lock(store):
        write_generation(
            store,
            msgspec.structs.replace(opened.manifest, generation=2),
            opened.content._replace(
                codes=opened.codes[:0], ids=opened.ids[:0], memory_of=opened.memory_of[:0], edits=[]
            ),
        )
    refused(capsys, store, "has no edits: add some", "calibrate", store)


LONG = "word " * 600
BAD_FILES = {
    "missing": (None, "does not exist|No such file"),
    "bad JSON": (['{"prompt": "a", "target": "b"}', '{"prompt": '], "line 2"),
    "empty prompt": ([{"prompt": " ", "target": "b"}], "line 1.*prompt"),
    "empty target": ([{"prompt": "a b", "target": ""}], "line 1.*target"),
    "unknown key": ([{"prompt": "a", "target": "b", "promt": "c"}], "promt"),
    "two targets": ([{"prompt": "a b", "target": "c"}, {"prompt": "a b", "target": "d"}], "'c'.*'d'.*--on-conflict"),
    "stored otherwise": ([{"prompt": EDITS[0]["prompt"], "target": "Nobody"}], "King Harald.*--on-conflict first"),
    "too long": ([{"prompt": LONG, "target": "x"}], "takes 512: shorten"),
    "target too long": ([{"prompt": "a b c", "target": LONG}], "takes 512: shorten"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_edit_file_is_one_line_and_changes_nothing(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path, case: str
) -> None:
    lines, said = BAD_FILES[case]
    file = tmp_path / "bad.jsonl"
    if lines is not None:
        write(file, lines)
    refused(capsys, store, said, "edit", file, "--store", store)


def refused(capsys: pytest.CaptureFixture[str], store: Path, said: str, *arguments: str | Path) -> None:
    before = contents(store)
    code, out, err = run(capsys, *arguments)
    complaint = [line for line in err.splitlines() if line.startswith("memoir: ")]
    assert code == 2 and len(complaint) == 1 and "Traceback" not in err, err
    assert out == ""
    assert __import__("re").search(said, complaint[0]), complaint[0]
    assert contents(store) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--k", "65"], "made with k 18, not 65"),
        (["--tau", "0.9"], r"made with tau 0\.53 \(which it sets itself\), not 0\.9"),
        (["--no-chat"], "leave out --no-chat"),
        (["--span", "all"], "made with rule question, not all: leave out --span all"),
        (["--layer", "0"], "made with layer 2"),
        (["--format", "nonsense"], "nonsense"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_options_that_contradict_the_store(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    file = write(tmp_path / "new.jsonl", [{"prompt": "a b", "target": "c"}])
    refused(capsys, store, said, "edit", file, "--store", store, *options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--k", "65"], "k is 65, but model.layers.2.mlp.down_proj has D=64"),
        (["--k", "0"], "choose 0 < k <= 64"),
        (["--tau", "0"], "tau is 0.0: choose 0 < tau <= 1"),
        (["--tau", "1.5"], "tau is 1.5"),
        (["--layer", "-1"], "layer -1 does not exist"),
        (["--layer", "3"], "layer 3 does not exist: .* has layers 0 to 2"),
        (["--dtype", "int4"], "dtype 'int4' is not known"),
    ],
)
def test_settings_that_cannot_work_make_no_store(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    file = write(tmp_path / "new.jsonl", EDITS)
    (tmp_path / "store").mkdir()
    refused(capsys, tmp_path / "store", said, "edit", file, "--store", tmp_path / "store", "--model", tiny, *options)


def test_a_target_without_tokens(capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path, tiny: Path) -> None:
    """A zero-width character is no white space, and the tokenizer of this model drops it."""
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    file = write(tmp_path / "new.jsonl", [{"prompt": "a b", "target": "\u200b"}])
    (tmp_path / "new").mkdir()
    refused(capsys, tmp_path / "new", "has no tokens", "edit", file, "--store", tmp_path / "new", "--model", model)


def test_a_store_of_another_model(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path, other_tiny: Path
) -> None:
    file = write(tmp_path / "new.jsonl", [{"prompt": "a b", "target": "c"}])
    refused(capsys, store, "was made on .* but .* use the model", "edit", file, "--store", store, "--model", other_tiny)
    refused(capsys, store, "was made on .* but .* use the model", "lookup", store, "hi", "--model", other_tiny)


@pytest.mark.parametrize("damage", ["half-written", "truncated", "flipped", "missing", "unknown key", "bad tau"])
def test_a_damaged_store(capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path, damage: str) -> None:
    manifest, memory = store / "memoir.json", store / "memory-1.safetensors"
    said = r"memory-1\.safetensors is damaged"
    if damage == "half-written":
        manifest.unlink()
        said = r"first write was cut off: it has no memoir\.json"
    elif damage == "truncated":
        memory.write_bytes(memory.read_bytes()[:-100])
    elif damage == "flipped":
        data = bytearray(memory.read_bytes())
        data[-5] ^= 4
        memory.write_bytes(bytes(data))
    elif damage == "missing":
        memory.unlink()
        said = "is missing"
    else:
        change = {"unknown key": {"taw": 1}, "bad tau": {"tau": 7}}[damage]
        forge.sign(store, forge.manifest(store) | change)
        said = "taw" if damage == "unknown key" else "tau 7"
    file = write(tmp_path / "new.jsonl", [{"prompt": "a b", "target": "c"}])
    for command in (["list", store], ["lookup", store, "hi"], ["eval", store, file], ["serve", "x", "--store", store]):
        refused(capsys, store, said, *command)
    if damage != "half-written":  # editing again is the mend for that one
        refused(capsys, store, said, "edit", file, "--store", store)


def test_no_space_left(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(files.os, "fsync", full)
    file = write(tmp_path / "new.jsonl", [{"prompt": "a b", "target": "c"}])
    refused(capsys, store, "no space left to write .* the store is unchanged", "edit", file, "--store", store)


def test_a_new_store_needs_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write(tmp_path / "new.jsonl", EDITS)
    code, _, err = run(capsys, "edit", file, "--store", tmp_path / "new")
    assert code == 2 and "add --model NAME" in err and not (tmp_path / "new").exists()
    for model, said in (("no/such/folder", "no/such/folder"), (str(tmp_path), "has no config.json")):
        code, _, err = run(capsys, "edit", file, "--store", tmp_path / "new", "--model", model)
        assert code == 2 and said in err


def test_the_first_block_can_be_edited(capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "new.jsonl", EDITS)
    code, out, _ = run(capsys, "edit", file, "--store", tmp_path / "new", "--model", tiny, "--layer", "0", "--json")
    assert code == 0 and json.loads(out)["stored"] == 2
    assert json.loads(run(capsys, "lookup", tmp_path / "new", EDITS[1]["prompt"], "--json")[1])["edit"] == 1


def test_a_group_without_a_command_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for group in ([], ["model"], ["bench"]):
        code, _, err = run(capsys, *group)
        assert code == 2 and "\nCommands:\n" in err and err.startswith("Usage: memoir")


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "--debug", "list", tmp_path / "none")
    assert code == 2 and "Traceback (most recent call last)" in err and "does not exist" in err


def test_an_error_that_no_command_expects_is_not_an_answer(
    capsys: pytest.CaptureFixture[str], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("memoir_retrieval.cli.inspect.EditStore.open", broken)
    code, _, err = run(capsys, "list", store)
    assert code == 70 and "Traceback (most recent call last)" in err and "ZeroDivisionError" in err


@pytest.mark.parametrize("arguments", [["list", "STORE"], ["list", "STORE", "--json"], ["--help"], ["list", "--help"]])
def test_a_reader_that_goes_is_not_an_answer(store: Path, arguments: list[str]) -> None:
    """As `memoir list edits | head -0`."""
    read, write_end = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "from memoir_retrieval.cli import main; main()"]
    command += [argument.replace("STORE", str(store)) for argument in arguments]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert done.returncode == 141 and done.stderr == ""


def test_doctor_fails_for_a_store_that_does_not_fit(
    capsys: pytest.CaptureFixture[str], store: Path, other_tiny: Path
) -> None:
    code, out, _ = run(capsys, "doctor", "--store", store, "--json")
    states = {finding["check"]: finding["state"] for finding in json.loads(out)}
    assert code == 0 and states[f"store {store}"] == "ok" and states["vLLM plugin"] == "ok"
    code, out, _ = run(capsys, "doctor", "--store", store, "--model", other_tiny)
    assert code == 1 and "fail" in out and "was made on" in out
    opened = EditStore.open(store)
    write_again(store, opened, generation=opened.manifest.generation + 1, judge="0-" + "0" * 16)
    code, out, _ = run(capsys, "doctor", "--store", store, "--quick")
    assert code == 1 and f"store {store} was made with judge 0-" in out


def test_serve_hands_vllm_its_flags(store: Path, tiny: Path, tmp_path: Path) -> None:
    own = json.dumps({"other": {"a": 1}})
    command, _ = server_command(str(tiny), store, ["--additional-config", own, "--port", "9"])
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"] and command[-2:] == ["--port", "9"]
    assert command[command.index("--dtype") + 1] == "float32"
    merged = json.loads(command[command.index("--additional-config") + 1])
    assert merged == {"other": {"a": 1}, "memoir": {"store": str(store.resolve())}}
    for bad, said in (
        ("[1]", "is not a JSON object"),
        ("{", "is not a JSON object"),
        ('{"memoir":{"store":"/x"}}', "give one"),
    ):
        with pytest.raises(ConfigError, match=said):
            server_command(str(tiny), store, [f"--additional-config={bad}"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--additional-config.memoir.tau", "0.5"], "would make vLLM drop the store's --additional-config: write"),
        (["--additional_config.other.x=1"], "--additional_config.other.x=1 would make vLLM drop"),
        (["--additional-config", "{}", "--additional_config={}"], "is given twice, and vLLM would take the last"),
    ],
)
def test_no_flag_makes_vllm_drop_the_store(store: Path, tiny: Path, flags: list[str], said: str) -> None:
    """vLLM would start without edits, and say nothing."""
    with pytest.raises(ConfigError, match=said):
        server_command(str(tiny), store, ["--port", "9", *flags])
    for name in ("--additional_config", "--additional-conf"):  # vLLM takes both for the same flag
        command, _ = server_command(str(tiny), store, [name, '{"memoir": {"tau": 0.5}}', "--port", "9"])
        assert [flag for flag in command if flag.startswith("--ad")] == ["--additional-config"]
        merged = json.loads(command[command.index("--additional-config") + 1])
        assert merged == {"memoir": {"store": str(store.resolve()), "tau": 0.5}} and command[-2:] == ["--port", "9"]


def test_many_edits_are_listed_line_by_line(
    capsys: pytest.CaptureFixture[str], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = EditStore.open(store)
    monkeypatch.setattr(inspect, "LONG", len(opened.edits) - 1)
    code, out, _ = run(capsys, "list", store)
    title, *lines = out.splitlines()
    assert code == 0 and title == f"{store}: {len(opened.edits)} edits of {opened.manifest.model}"
    assert lines == [f"{edit.id}: {edit.prompt} -> {edit.target} (loss {edit.loss:.3f})" for edit in opened.edits]


def test_markup_in_a_prompt_is_only_text(capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "edits.jsonl", [{"prompt": "What is [/b] or [red]?", "target": "A tag"}])
    assert run(capsys, "edit", file, "--model", tiny, "--store", tmp_path / "store", "--keep-failed")[0] == 0
    code, out, _ = run(capsys, "list", tmp_path / "store")
    assert code == 0 and "[/b] or [red]" in out


def test_lookup_tells_how_far_the_nearest_edit_was(capsys: pytest.CaptureFixture[str], store: Path) -> None:
    question = "Where was the Blue Gate?"
    code, out, _ = run(capsys, "lookup", store, question, "--tau", "1", "--json")
    result = json.loads(out)
    assert code == 0 and result["edit"] is None and result["target"] is None
    assert result["nearest"] == 1 and 0 < result["overlap"] < 1
    code, out, _ = run(capsys, "lookup", store, question, "--tau", "1")
    assert code == 0 and "no edit matches" in out and "nearest: edit 1" in out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("[]", "it is empty"),
        ('[{"role": "user"}]', "'messages' is {'role': 'user'}"),
        ('[{"role": "usr", "content": "Hi"}]', "of a role of system, user, assistant, tool"),
        ("{}", "it has no list of them"),
        (b"\xff", "malformed"),
    ],
)
def test_bad_messages(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path, text: str | bytes | None, said: str
) -> None:
    file = tmp_path / "messages.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(capsys, store, f"{said}.*write ", "lookup", store, "--messages", file)


def test_a_folder_of_something_else_is_left_alone(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "holiday"
    folder.mkdir()
    (folder / "photo.txt").write_text("sea")
    file = write(tmp_path / "edits.jsonl", EDITS)
    refused(capsys, folder, "holds photo.txt.*choose a new folder", "edit", file, "--model", tiny, "--store", folder)
    assert [path.name for path in folder.iterdir()] == ["photo.txt"]


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path, device: str
) -> None:
    file = write(tmp_path / "new.jsonl", [{"prompt": "a b", "target": "c"}])
    refused(capsys, store, f"device '{device}' cannot be used", "edit", file, "--store", store, "--device", device)


def test_what_eval_cannot_do_is_said_at_once(capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "edits.jsonl", EDITS)
    nowhere = "http://127.0.0.1:9"
    refused(capsys, store, "--tau 0.5 cannot", "eval", store, file, "--server", nowhere, "--tau", "0.5")
    refused(capsys, store, "choose another --out", "eval", store, file, "--out", tmp_path / "none" / "report.json")
    refused(capsys, store, "tau is 7", "eval", store, file, "--tau", "7")


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "edits.jsonl", EDITS)
    gone = tmp_path / "none" / "page.html"
    refused(capsys, store, f"the report cannot be written: {tmp_path} is a folder; choose another --out", "eval", store,
            file, "--out", tmp_path)  # fmt: skip
    refused(capsys, store, f"{tmp_path} is a folder; choose another --html", "calibrate", store, "--html", tmp_path)
    refused(capsys, store, "none is not a folder; choose another --html", "calibrate", store, "--html", gone)
    refused(capsys, store, "none is not a folder; choose another --plot", "bench", "latency", store, "--plot", gone)
    for command in (("routing", store), ("quality", file), ("methods", file)):
        for out in (file, file / "run"):
            refused(capsys, store, "edits.jsonl is not a folder; choose another --out", "bench", *command, "--out", out)


def test_the_report_of_a_store_that_is_the_working_folder(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "edits.jsonl", EDITS)
    monkeypatch.chdir(store)
    code, out, err = run(capsys, "eval", ".", file, "--json", "--controls", "0")
    assert code == 0, err
    assert json.loads((tmp_path / "store.eval.json").read_text()) == json.loads(out)


def test_an_edit_in_another_spelling_is_the_stored_one(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path
) -> None:
    """As for `edit`, which says that the store has it."""
    spelled = [record | {"prompt": str(record["prompt"]).replace(" ", "  ")} for record in EDITS]
    file = write(tmp_path / "edits.jsonl", spelled)
    stored, edits = EditStore.open(store).edits, read_edits(file)
    assert edits[0].prompt != stored[0].prompt and stored_ids(stored, edits) == [0, 1]
    code, out, err = run(capsys, "eval", store, file, "--json", "--controls", "0")
    assert code == 0 and json.loads(out)["edits"] == 2, err


URL = "http://127.0.0.1:9"
IDLE = {
    "requests": (["verify", "--server", URL, "--requests", "500"], "--requests 500", "a soak: add --soak MINUTES, or"),
    "clients": (["verify", "--server", URL, "--clients", "3"], "--clients 3", "a soak: add --soak MINUTES, or leave"),
    "changes": (["verify", "--server", URL, "--changes", "0"], "--changes 0", "a soak: add --soak MINUTES, or leave"),
    "turns": (["verify", "--server", URL, "--soak", "1", "--turns", "5"], "--turns 5", "in a soak: leave it out"),
    "base": (["verify", "--server", URL, "--soak", "1", "--base", URL], f"--base {URL}", "in a soak: leave it out"),
    "device": (["eval", "{store}", "{file}", "--server", URL, "--device", "cuda"], "--device cuda", "with --server: "),
    "workers": (["edit", "{file}", "--store", "{store}", "--workers", "2"], "--workers 2", "add --ray ADDRESS, or"),
    "workers of a build": (
        ["index", "build", "{file}", "--store", "{new}", "--model", "x", "--workers", "8"],
        "--workers 8",
        "add --ray ADDRESS, or leave it out",
    ),
    "device without the model": (["index", "verify", "{store}", "--device", "cpu"], "--device cpu", "add --masks, or"),
    "limit": (["calibrate", "{store}", "--limit", "2"], "--limit 2", "add the file of edits after DIR, or leave it"),
    "format": (["calibrate", "{store}", "--format", "zsre"], "--format zsre", "without FILE: add the file of edits"),
    "edits": (["bench", "routing", "{store}", "--edits", "{file}"], "--edits {file}", "that is there: leave it out"),
    "chat": (["bench", "routing", "{store}", "--no-chat"], "--no-chat", "that is there: leave it out, or DIR"),
}


@pytest.mark.parametrize("case", IDLE)
def test_an_option_that_would_do_nothing_is_refused(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path, case: str
) -> None:
    arguments, typed, cure = IDLE[case]
    names = {"store": store, "new": tmp_path / "new", "file": write(tmp_path / "edits.jsonl", EDITS)}
    said = rf"{typed.format(**names)} does nothing .*{cure}"
    refused(capsys, store, said, *(argument.format(**names) for argument in arguments))
    assert not (tmp_path / "new").exists()


def test_a_model_that_is_not_embedded(capsys: pytest.CaptureFixture[str], store: Path) -> None:
    refused(capsys, store, "'gpt-9' is not embedded: choose one of smollm2-135m", "model", "get", "gpt-9")


def test_a_package_that_cannot_be_imported(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    file = write(tmp_path / "edits.jsonl", EDITS)
    refused(capsys, store, r"pip install 'memoir-retrieval\[eval\]'", "eval", store, file, "--server", "http://x")
    monkeypatch.setitem(sys.modules, "memoir_retrieval.lookup.retriever", None)
    refused(capsys, store, "`memoir doctor` says what is missing", "lookup", store, "hi")


def test_an_interrupted_command_says_that_files_are_whole(
    capsys: pytest.CaptureFixture[str], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EditStore, "open", interrupted)
    code, out, err = run(capsys, "list", store)
    assert (code, out, err.strip()) == (130, "", "memoir: interrupted: no file is half written")


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_edit_says_what_is_kept(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: signal.Signals
) -> None:
    from memoir_retrieval.editing.session import Session

    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a script's command in the background has it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before, add, added = signal.getsignal(by), Session.train, []

    def until_the_second(self: Session, *arguments: Any) -> Any:
        if added:
            signal.raise_signal(by)
        added.append(add(self, *arguments))
        return added[0]

    new = [{"prompt": f"What is number {i}?", "target": f"It is {i}"} for i in range(3)]
    file = write(tmp_path / "more.jsonl", [*EDITS, *new])
    command = ("edit", file, "--store", store, "--side-by-side", "1", "--json")
    with monkeypatch.context() as patched:
        patched.setattr(Session, "train", until_the_second)
        code, out, err = run(capsys, *command)
    assert code == 130 and out == "" and "1 new edits are kept" in err and "Traceback" not in err
    assert signal.getsignal(by) == before
    summary = json.loads(run(capsys, *command)[1])
    assert (summary["stored"], summary["skipped"]) == (2, 3)


def test_an_edit_that_is_interrupted_twice_counts_what_is_on_the_disk(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time while what is trained is written."""
    from memoir_retrieval.editing.open_store import OpenStore

    def interrupted(self: OpenStore) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(OpenStore, "commit", interrupted)
    file = write(tmp_path / "more.jsonl", [{"prompt": "What is number 1?", "target": "It is 1"}])
    code, out, err = run(capsys, "edit", file, "--store", store, "--json")
    assert code == 130 and out == "" and "0 new edits are kept" in err


def test_no_replaced_file_of_a_large_store_is_left(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command maps the files that it replaces."""
    monkeypatch.setattr(read, "MAPPED_FROM", 1)
    file = write(tmp_path / "other.jsonl", [EDITS[0] | {"target": "Nobody"}])
    code, _, err = run(capsys, "edit", file, "--store", store, "--on-conflict", "last", "--keep-failed")
    assert code == 0 and EditStore.open(store).manifest.generation == 2 and leftovers(store) == [], err
    code, _, err = run(capsys, "calibrate", store, file, "--write")
    assert code == 0 and EditStore.open(store).manifest.generation == 3 and leftovers(store) == [], err


def test_a_large_store_is_checked_once(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once more before it is edited, and once more when what became of the edits is printed."""
    checked: list[EditStore] = []
    check = EditStore.check
    monkeypatch.setattr(EditStore, "check", lambda self: checked.append(self) or check(self))
    code, _, err = run(capsys, "edit", write(tmp_path / "same.jsonl", EDITS), "--store", store)
    assert code == 0 and len(checked) == 1, err


def test_a_new_store_is_advised_to_learn_tasks_however_long_its_first_run_was(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long run commits on the way, so its store is past generation 1 in the end."""
    monkeypatch.setattr(session, "CHECKPOINT_EVERY", 0.0)
    store, advice = tmp_path / "store", "by words alone: `memoir calibrate"
    command = ("edit", write(tmp_path / "edits.jsonl", EDITS), "--store", store, "--model", tiny, "--keep-failed")
    code, _, err = run(capsys, *command)
    assert code == 0 and EditStore.open(store).manifest.generation == 2 and err.count(advice) == 1, err
    code, _, err = run(capsys, *command)
    assert code == 0 and advice not in err, err


def test_an_editor_leaves_no_memories_that_it_has_replaced(
    store: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memoir_retrieval import Edit, Editor, load_model

    monkeypatch.setattr(read, "MAPPED_FROM", 1)
    with Editor(load_model(str(tiny)), store) as editor:
        editor.add([Edit(prompt=EDITS[0]["prompt"], target="Nobody")], on_conflict="last", keep_failed=True)
        assert not [path for path in leftovers(store) if path.name.startswith("memory")]


def test_doctor_asks_one_prompt(capsys: pytest.CaptureFixture[str], store: Path, tiny: Path) -> None:
    findings = {f["check"]: f for f in json.loads(run(capsys, "doctor", "--store", store, "--json")[1])}
    assert (
        findings["self-test"]["state"] == "ok"
        and "the prompt of edit 1 matches it, overlap 1.000" in findings["self-test"]["detail"]
    )
    assert "self-test" not in run(capsys, "doctor", "--store", store, "--quick")[1]
    assert "begins with" in run(capsys, "doctor", "--model", tiny)[1]


def test_doctor_fails_for_an_edit_that_does_not_find_itself(capsys: pytest.CaptureFixture[str], store: Path) -> None:
    """Masks of two edits exchanged: every file is sound, and each answers for the other."""
    opened = EditStore.open(store)
    elsewhere = store / "elsewhere"  # content of another folder is written whole
    masks = opened.masks._replace(ids=opened.ids[::-1].copy(), memory_of=opened.memory_of[::-1].copy())
    exchanged = replace(opened, path=elsewhere, masks=masks)
    write_again(store, exchanged, generation=opened.manifest.generation + 1)
    code, out, _ = run(capsys, "doctor", "--store", store)
    assert code == 1 and "fail  self-test" in out and "the prompt of edit 1 gives a mask far from the stored one" in out


def test_doctor_sees_a_plugin_that_vllm_would_not_load(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    code, out, _ = run(capsys, "doctor", "--quick")
    assert code == 1 and "VLLM_PLUGINS is 'lora_filesystem_resolver': add memoir to it" in out


def test_doctor_says_what_an_admin_token_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("MEMOIR_ADMIN_TOKEN", raising=False)
    assert "administration" not in run(capsys, "doctor", "--quick")[1]
    monkeypatch.setenv("MEMOIR_ADMIN_TOKEN", "sixteen characters")
    out = run(capsys, "doctor", "--quick")[1]
    assert "warn  administration" in out and "VLLM_PLUGINS=memoir" in out and "sixteen" not in out
    monkeypatch.setenv("VLLM_PLUGINS", "memoir")
    assert "ok    administration" in run(capsys, "doctor", "--quick")[1]


def test_serve_reads_the_file_that_config_names(store: Path, tiny: Path, tmp_path: Path) -> None:
    """vLLM reads its flags before ours, and takes the last."""
    file = tmp_path / "server.yaml"
    file.write_text("dtype: float16\nserved_model_name: [a, b]\nport: 9\nenforce-eager: false\n")
    command, _ = server_command(str(tiny), store, ["--config", str(file)])
    assert command[-2:] == ["--config", str(file)] and not {"--dtype", "--served-model-name"} & set(command)
    assert "--dtype" in server_command(str(tiny), store)[0], "with no flags at all"
    for text, said in (
        ("additional-config:\n  memoir: {tau: 0.7}\n", "holds additional-config, which vLLM would drop"),
        ("additional_config: '{}'\n", "holds additional_config, which vLLM would drop"),
        ("additional-config.memoir.tau: 0.7\n", "holds additional-config.memoir.tau, which vLLM would drop"),
        ("- --port\n", "holds no flags"),
        ("port: {\n", "cannot be read: while parsing"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            server_command(str(tiny), store, ["--port", "9", "--config", str(file)])
    with pytest.raises(ConfigError, match=r"cannot be read: .*No such file"):
        server_command(str(tiny), store, ["--config", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    "flags",
    [["--headless"], ["--api-server-count", "2"], ["--api_server_count=2"], ["-asc", "2"], ["-dpm"], ["--grpc"]],
    ids=" ".join,
)
def test_serve_refuses_what_only_vllms_own_command_reads(
    store: Path, tiny: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server that is started would take it, and do nothing with it."""
    monkeypatch.setenv("VLLM_PLUGINS", "memoir")
    with pytest.raises(ConfigError, match=r"is read by vLLM's own command only: VLLM_PLUGINS=memoir vllm serve "):
        server_command(str(tiny), store, ["--port", "9", *flags])


def test_serve_refuses_them_in_a_file_as_well(store: Path, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("api-server-count: 2\n")
    with pytest.raises(ConfigError, match="--api-server-count is read by vLLM's own command only"):
        server_command(str(tiny), store, ["--config", str(file)])
    file.write_text("api-server-count: 1\nheadless: false\n")
    server_command(str(tiny), store, ["--config", str(file), "--api-server-count", "1", "--api-key", "x"])


def test_doctor_finds_a_torchvision_of_another_torch(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = run(capsys, "doctor", "--quick")
    assert code == 1 and "torchvision::nms does not exist" in out and "pip uninstall torchvision" in out


def test_a_store_named_twice_is_one_store(store: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memoir_retrieval.cli.serve import server_command

    monkeypatch.chdir(store.parent)
    own = json.dumps({"memoir": {"store": store.name}})
    flags = ["--additional-config", own, "--served-model-name=mine"]
    command, _ = server_command(str(tiny), store, flags)
    merged = json.loads(command[command.index("--additional-config") + 1])
    assert merged == {"memoir": {"store": str(store.resolve())}}
    assert "--served-model-name" not in command and "--served-model-name=mine" in command


@pytest.mark.slow
def test_bench_edit_trains_both_ways_on_the_same_edits(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "edits.jsonl", EDITS)
    figures = json.loads(run(capsys, "bench", "edit", file, "--model", tiny, "--json")[1])
    assert figures["edits"] == 2 and figures["ours_reliability"] == 1.0 > figures["published_reliability"]
    assert min(figures["ours_s"], figures["published_s"], figures["ratio"]) > 0


def test_settings_of_training_are_the_stores(capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path) -> None:
    file, store = write(tmp_path / "edits.jsonl", EDITS), tmp_path / "store"
    command = ("edit", file, "--model", tiny, "--store", store)
    refused(capsys, tmp_path, "no setting has that name; choose one of contexts", *command, "--training", "steps=3")
    assert not store.exists()
    code, _, err = run(capsys, *command, "--training", "variants=5", "--training", "noise=.5")
    assert code == 0, err
    training = EditStore.open(store).manifest.training
    assert (training["variants"], training["noise"], training["context_masks"]) == (5, 0.5, 1)
    code, _, err = run(capsys, *command, "--training", "variants=5")
    assert code == 0, err
    refused(capsys, store, "made with training variants=5, not 2: leave out --training variants=2", *command,
            "--training", "variants=2")  # fmt: skip
