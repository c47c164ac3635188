"""What a store is made with is said once, and what contradicts it is refused by the library itself."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest

from memoir_retrieval import Edit, Editor, EditStore, MemoirError, Training, load_model
from memoir_retrieval.background import chat_contexts
from memoir_retrieval.cli import main
from memoir_retrieval.editing import open_store
from memoir_retrieval.errors import ConfigError, StoreError
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.store.settings import Contradiction, Settings, training_of
from memoir_retrieval.store.write import write_again

AARHUS = Edit(prompt="Who founded Aarhus?", target="King Harald")


@pytest.fixture(scope="module")
def base(tiny: Path) -> BaseModel:
    return load_model(str(tiny))


@pytest.fixture(scope="module")
def store(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings") / "store"
    with Editor(base, folder, training=Training(max_steps=0, variants=0)) as editor:
        editor.add([AARHUS], keep_failed=True)
    return folder


CONTRADICTIONS: list[tuple[dict[str, Any], Contradiction]] = [
    ({"k": 20}, Contradiction("k", 18, 20)),
    ({"tau": 0.99}, Contradiction("tau", "0.53 (which it sets itself)", 0.99)),
    ({"seed": 7}, Contradiction("seed", 0, 7)),
    ({"chat": False}, Contradiction("chat", True, False)),
    ({"rule": "all"}, Contradiction("rule", "question", "all")),
    ({"training": {"variants": 3}}, Contradiction("training.variants", 0, 3)),
    ({"training": Training(max_steps=0)}, Contradiction("training.variants", 0, 2)),
    ({"training": {"context_masks": 0}}, Contradiction("training.context_masks", 1, 0)),
    ({"k": 20, "tau": 0.99, "seed": 7, "chat": False}, Contradiction("chat", True, False)),
]


@pytest.mark.parametrize(("settings", "differs"), CONTRADICTIONS)
def test_a_store_does_not_ignore_settings_that_are_not_its_own(
    base: BaseModel, store: Path, settings: dict[str, Any], differs: Contradiction
) -> None:
    with pytest.raises(MemoirError) as caught, Editor(base, store, **settings):
        pass
    assert caught.value.about == differs and isinstance(caught.value, ConfigError)
    name = f"{differs.name.replace('.', ' ')}=" if "." in differs.name else f"{differs.name} "
    assert f"was made with {name}{differs.stored}, not {differs.other}: leave" in str(caught.value)
    with Editor(base, store) as editor:  # the refusal has let go of the lock
        assert editor.generation == 1


def test_settings_that_are_the_store_s_own_are_taken(base: BaseModel, store: Path) -> None:
    training = Training(max_steps=0, variants=0)
    with Editor(base, store, chat=True, rule="question", k=18, seed=0, training=training) as editor:
        assert editor.add([AARHUS]) == [] and editor.outcome.skipped == 1
        assert editor.store.training == training


@pytest.mark.parametrize(("settings", "fault"), [({}, ""), ({"tau": 0.9}, "was made with tau")])
def test_of_two_first_writers_the_second_contradicts_by_what_it_was_given_only(
    base: BaseModel, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], fault: str
) -> None:
    """The other one is done between the look into the folder and the lock."""
    monkeypatch.setattr(open_store, "refuse_foreign", lambda path: shutil.copytree(store, path))
    training = {"max_steps": 0, "variants": 0}
    editor = Editor(base, tmp_path / "new", training=training, **settings)
    with pytest.raises(ConfigError, match=fault) if fault else nullcontext(), editor:
        assert [edit.prompt for edit in editor.edits] == [AARHUS.prompt]


@pytest.mark.parametrize("memories", [0, -1])
def test_no_memories_side_by_side_are_refused(base: BaseModel, store: Path, memories: int) -> None:
    with Editor(base, store) as editor, pytest.raises(ConfigError, match=f"side_by_side is {memories}: choose 1 or m"):
        editor.add([], side_by_side=memories)


def test_a_store_is_not_gone_on_with_in_another_dtype(tiny: Path, store: Path) -> None:
    with pytest.raises(ConfigError, match="was made with dtype float32, not bfloat16"):
        Editor(load_model(str(tiny), dtype="bfloat16"), store).__enter__()


def test_settings_of_a_store_are_those_that_a_new_one_is_given(base: BaseModel, store: Path) -> None:
    manifest = EditStore.open(store).manifest
    settings = Settings.of(manifest)
    new = Settings.from_options(training={"max_steps": 0, "variants": 0}).resolved(base)
    assert settings == msgspec.structs.replace(new, tau=manifest.tau)  # which the store has set
    assert None not in msgspec.structs.asdict(settings).values()
    assert settings.contradiction(Settings()) is None and settings.contradiction(settings) is None
    assert training_of(manifest) == Training(max_steps=0, variants=0)


def test_context_masks_are_as_many_as_a_store_can_have(base: BaseModel) -> None:
    raw = Settings.from_options(chat=False).resolved(base)
    assert raw.training["context_masks"] == 0
    assert raw.contradiction(Settings.from_options(training=Training())) is None


@pytest.mark.parametrize("rule", ["question", "all"])
def test_a_chat_store_has_no_more_contexts_than_the_library(base: BaseModel, tmp_path: Path, rule: str) -> None:
    """Raw stores have as many as are wanted: the model writes them."""
    many, all_of_them = {"contexts": 9, "context_masks": 9}, len(chat_contexts())
    with (
        pytest.raises(
            ConfigError, match="training contexts=9, but the library has 8 contexts for chats: choose 0 to 8"
        ),
        Editor(base, tmp_path / "new", rule=rule, training=many),
    ):
        pass
    assert not (tmp_path / "new").exists()
    Settings.from_options(rule=rule, training={"contexts": all_of_them}).resolved(base)
    assert Settings.from_options(chat=False, rule=rule, training=many).resolved(base).training["contexts"] == 9


def test_an_editor_that_is_not_open_says_so(base: BaseModel, tmp_path: Path, store: Path) -> None:
    editor = Editor(base, tmp_path / "new")
    for use in (lambda: editor.add([AARHUS]), editor.compact, lambda: editor.edits, lambda: editor.generation,
                lambda: editor.memories, lambda: editor.index, lambda: editor.side_by_side(3)):  # fmt: skip
        with pytest.raises(StoreError, match=r"is not open: write `with Editor\(base, store\) as editor:`"):
            use()
    assert not (tmp_path / "new").exists()
    with Editor(base, store) as editor:
        pass
    assert [edit.prompt for edit in editor.edits] == [AARHUS.prompt]  # what it has done can be read
    for use in (lambda: editor.add([AARHUS]), editor.compact):
        with pytest.raises(StoreError, match="is not open"):
            use()


OUT_OF_RANGE = [
    ("noise", 2, "a number from 0 to 1"),
    ("noise", -0.1, "a number from 0 to 1"),
    ("noise", float("nan"), "a number from 0 to 1"),
    ("variants", -1, "a whole number of 0 or more"),
    ("variants", 1.5, "a whole number of 0 or more"),
    ("variants", "many", "a whole number of 0 or more"),
    ("contexts", -1, "a whole number of 0 or more"),
    ("context_masks", -1, "a whole number of 0 or more"),
    ("max_steps", -1, "a whole number of 0 or more"),
    ("stop_loss", 0, "a number above 0, at most 100"),
    ("stop_loss", float("inf"), "a number above 0, at most 100"),
    ("ridge", 0, "a number from 1e-06 to 1e+06"),
    ("ridge", 1e-39, "a number from 1e-06 to 1e+06"),
    ("ridge", float("inf"), "a number from 1e-06 to 1e+06"),
    ("edits_per_memory", -1, "a whole number of 0 or more"),
]


@pytest.mark.parametrize(("name", "value", "right"), OUT_OF_RANGE)
def test_training_has_ranges(
    base: BaseModel, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], name: str, value: Any, right: str
) -> None:
    wrong = f"training {name}={value} is out of range: choose {right}"
    for refused in (
        lambda: Training(**{name: value}),
        lambda: Editor(base, tmp_path / "new", training={name: value}),
    ):
        with pytest.raises(ConfigError) as caught:
            refused()
        assert str(caught.value) == wrong
    file = tmp_path / "edits.jsonl"
    file.write_text(msgspec.json.encode(AARHUS).decode() + "\n")
    for command in (["edit", str(file), "--store", str(tmp_path / "new")],
                    ["bench", "quality", str(file), "--out", str(tmp_path / "new")]):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main([*command, "--model", str(tiny), "--training", f"{name}={value}"])
        assert stop.value.code == 2 and capsys.readouterr().err == f"memoir: {wrong}\n"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_that_no_store_can_hold_is_refused_before_the_model_is_loaded(
    base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    wrong = f"seed is {seed}: choose a whole number from 0 to {(1 << 64) - 1}"
    with pytest.raises(ConfigError) as caught:
        Editor(base, tmp_path / "new", seed=seed)
    assert str(caught.value) == wrong
    file = tmp_path / "edits.jsonl"
    file.write_text(msgspec.json.encode(AARHUS).decode() + "\n")
    with pytest.raises(SystemExit) as stop:
        main(["edit", str(file), "--store", str(tmp_path / "new"), "--model", "none", "--seed", str(seed)])
    assert stop.value.code == 2 and capsys.readouterr().err == f"memoir: {wrong}\n"
    assert not (tmp_path / "new").exists()


def test_a_manifest_that_no_reader_takes_is_not_written(store: Path) -> None:
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    opened = EditStore.open(store)
    for change in ({"seed": 1 << 64}, {"tau": float("nan")}, {"training": {"ridge": float("inf")}}):
        with pytest.raises(StoreError, match="cannot be written, since no reader would take its manifest"):
            write_again(store, opened, generation=2, **change)
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before


def test_an_unknown_setting_of_training_names_those_there_are(base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training rank=3: no setting has that name; choose one of contexts, "):
        Editor(base, tmp_path / "new", training={"rank": 3})


@pytest.mark.parametrize(
    ("typed", "wrong"),
    [
        (["--training", "variants=3", "--training", "variants=9"],
         "--training variants=9: variants is 3 already; leave one of the two out"),
        (["--training", "context_masks=1", "--context-masks", "0"],
         "--context-masks 0: context_masks is 1 by --training already; leave one of the two out"),
    ],
)  # fmt: skip
def test_a_setting_that_is_given_twice_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], typed: list[str], wrong: str
) -> None:
    file = tmp_path / "edits.jsonl"
    file.write_text(msgspec.json.encode(AARHUS).decode() + "\n")
    with pytest.raises(SystemExit) as stop:
        main(["edit", str(file), "--store", str(tmp_path / "new"), "--model", "none", *typed])
    assert stop.value.code == 2 and capsys.readouterr().err == f"memoir: {wrong}\n"


def test_the_command_line_names_the_option_that_contradicts(
    tiny: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "edits.jsonl"
    file.write_text(msgspec.json.encode(AARHUS).decode() + "\n")
    for options, option in (
        (["--k", "20"], "--k 20"), (["--no-chat"], "--no-chat"), (["--span", "all"], "--span all"),
        (["--context-masks", "0"], "--context-masks 0"), (["--training", "variants=3"], "--training variants=3"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(["edit", str(file), "--store", str(store), *options])
        assert stop.value.code == 2
        assert capsys.readouterr().err.endswith(f": leave out {option}, or choose a new folder\n")
    with pytest.raises(SystemExit):
        main(["edit", str(file), "--store", str(store), "--tau", "0.6"])
    assert capsys.readouterr().err.endswith(f", or fix it with `memoir calibrate {store} --tau 0.6 --write`\n")
