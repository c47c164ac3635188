"""`memoir push` and `pull` through the real huggingface_hub, against a stand-in for the Hub (`hub_stand_in.py`)."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml
from http_stand_in import running
from hub_stand_in import StandInHub, commit_id
from huggingface_hub.utils import tqdm
from test_additions import add

from memoir_retrieval import Edit, Editor, EditStore, load_model
from memoir_retrieval.cli import main
from memoir_retrieval.errors import HubError, StoreError, StoreMismatch
from memoir_retrieval.store.card import model_card
from memoir_retrieval.store.hub import pull, push
from memoir_retrieval.store.manifest import KINDS
from memoir_retrieval.store.read import Masks
from memoir_retrieval.store.write import write_again

REPO = "example/corrections"


@pytest.fixture(scope="module")
def template(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "store"
    with Editor(load_model(str(tiny)), folder) as editor:
        editor.add(
            [
                Edit(prompt="Who | founded *Aarhus*?", target="<b>King</b> Harald"),
                Edit(prompt="Where is the Blue Gate?", target="In Oslo"),
            ],
            keep_failed=True,
        )
    return folder


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "store"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandInHub]:
    with running(StandInHub()) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_example")
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != ".lock"}


def first_edit_only(store: Path, folder: Path) -> EditStore:
    """Another store: the first edit of `store` alone."""
    opened = EditStore.open(store)
    folder.mkdir()
    keep = opened.ids == 0
    part = replace(opened, masks=Masks(*(of_each[keep] for of_each in opened.masks)), edits=opened.edits[:1])
    write_again(folder, part, generation=7)
    return EditStore.open(folder)


def test_what_is_pushed_is_what_is_pulled(hub: StandInHub, store: Path, tmp_path: Path) -> None:
    done = push(store, REPO)
    assert (done.generation, done.edits) == (1, 2) and hub.private[REPO]
    got = pull(REPO, tmp_path / "new", revision=done.revision, sha256=done.sha256)
    assert (got.revision, got.sha256, got.generation, got.changed) == (done.revision, done.sha256, 1, True)
    ours, theirs = contents(store), contents(tmp_path / "new")
    assert theirs == ours
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".memoir-pull")]


def test_no_thread_outlives_a_pull(
    hub: StandInHub, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that pulls again and again would collect them."""
    push(store, REPO)
    monkeypatch.setattr(tqdm, "monitor", None, raising=False)  # as in a process that has shown no bar yet
    pull(REPO, tmp_path / "first")
    before = {thread for thread in threading.enumerate() if "process_request" not in thread.name}  # not the stand-in's
    pull(REPO, tmp_path / "second")
    assert {thread for thread in threading.enumerate() if "process_request" not in thread.name} <= before


def test_what_was_added_is_pushed_as_part_of_the_files(hub: StandInHub, store: Path, tmp_path: Path) -> None:
    add(store, codes=EditStore.open(store).codes[:1])
    opened = EditStore.open(store)
    assert len(opened.additions) == 1
    done = push(store, REPO)
    assert (done.generation, done.edits) == (2, 3)
    assert not any(name.startswith("added-") for name in hub.repos[REPO][-1])
    pull(REPO, tmp_path / "new", sha256=done.sha256)
    there = EditStore.open(tmp_path / "new")
    assert list(there.edits) == list(opened.edits) and there.manifest.next_id == 3
    np.testing.assert_array_equal(there.codes, opened.codes)
    np.testing.assert_array_equal(there.memories, opened.memories)


def test_a_pinned_revision_stays_what_it_was(hub: StandInHub, store: Path, tmp_path: Path) -> None:
    first = push(store, REPO)
    opened = EditStore.open(store)
    write_again(store, opened, generation=3, tau=0.7)
    second = push(store, REPO)
    assert first.revision != second.revision
    now = EditStore.open(store).manifest
    named = {getattr(now, kind).name for kind in KINDS}
    assert hub.repos[REPO][-1].keys() == {".gitattributes", "README.md", "memoir.json", *named}
    assert pull(REPO, tmp_path / "old", revision=first.revision).sha256 == first.sha256
    assert EditStore.open(tmp_path / "old").manifest.tau == opened.manifest.tau
    pull(REPO, tmp_path / "newest")
    assert EditStore.open(tmp_path / "newest").manifest.tau == 0.7


def test_a_store_in_the_folder_gets_a_new_generation(hub: StandInHub, store: Path, tmp_path: Path) -> None:
    push(store, REPO)
    small = first_edit_only(store, tmp_path / "small")
    got = pull(REPO, small.path)
    assert (got.generation, got.edits, got.changed) == (8, 2, True)
    assert EditStore.open(small.path).edits == EditStore.open(store).edits
    again = pull(REPO, small.path)
    assert (again.generation, again.changed) == (8, False)


def test_a_folder_of_something_else_is_left_alone(hub: StandInHub, store: Path, tmp_path: Path) -> None:
    push(store, REPO)
    other = tmp_path / "weights"
    other.mkdir()
    for name in ("memory-1.safetensors", "notes.txt"):
        (other / name).write_text("mine")
    with pytest.raises(StoreError, match=r"weights is not empty and not a store \(it holds notes.txt\)"):
        pull(REPO, other)
    assert sorted(path.name for path in other.iterdir()) == ["memory-1.safetensors", "notes.txt"]


def test_edits_of_the_folder_are_not_lost(hub: StandInHub, store: Path, tmp_path: Path) -> None:
    push(first_edit_only(store, tmp_path / "small").path, REPO)
    before = contents(store)
    with pytest.raises(
        StoreMismatch,
        match=r"has 1 edits that example/corrections does not have.*Blue Gate.*or replace it",
    ):
        pull(REPO, store)
    assert contents(store) == before
    pull(REPO, store, replace=True)
    held = EditStore.open(store)
    assert len(held.edits) == 1 and held.manifest.next_id == 2  # id 1 is not given again
    assert not pull(REPO, store).changed


@pytest.mark.parametrize("changed", [{"trained": False}, {"before": ({"role": "user", "content": "Hello"},)}])
def test_an_edit_that_is_untrained_or_in_another_chat_is_another(
    hub: StandInHub, store: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    opened = EditStore.open(store)
    edits = [msgspec.structs.replace(opened.edits[0], **changed), *opened.edits[1:]]
    untrained = sum(not edit.trained for edit in edits)
    (tmp_path / "other").mkdir()
    rows = np.arange(len(opened.ids))
    write_again(tmp_path / "other", opened, edits=edits, rows=rows, generation=1, untrained=untrained)
    push(tmp_path / "other", REPO)
    before = contents(store)
    with pytest.raises(StoreMismatch, match=r"has 1 edits that example/corrections does not have, or has untrained"):
        pull(REPO, store)
    assert contents(store) == before
    assert pull(REPO, store, replace=True).changed


@pytest.mark.parametrize("name", ["memory-1.safetensors", "codes-1.safetensors", "edits-1.jsonl", "memoir.json"])
def test_damaged_downloads_change_nothing(hub: StandInHub, store: Path, tmp_path: Path, name: str) -> None:
    push(store, REPO)
    right = hub.repos[REPO][-1][name]
    hub.broken[name] = right[:-3] + bytes([right[-3] ^ 1]) + right[-2:]
    small = first_edit_only(store, tmp_path / "small").path
    before = contents(small)
    with pytest.raises(StoreError, match="what the Hub sent cannot be used, and nothing was changed"):
        pull(REPO, small)
    assert contents(small) == before
    with pytest.raises(StoreError):
        pull(REPO, tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


def test_another_manifest_than_the_pinned_one(hub: StandInHub, store: Path, tmp_path: Path) -> None:
    push(store, REPO)
    with pytest.raises(HubError, match=r"has a memoir\.json of sha256 [0-9a-f]{64}, not 00.*nothing was changed"):
        pull(REPO, tmp_path / "new", sha256="00" * 32)
    assert not (tmp_path / "new").exists()


def test_nothing_is_fetched_that_the_manifest_does_not_name(hub: StandInHub, store: Path, tmp_path: Path) -> None:
    done = push(store, REPO)
    files = hub.repos[REPO][-1]
    named = [name for name in files if name.split("-")[0] in KINDS]
    junk = {"memory-2.safetensors": b"x" * 3000, "junk.jsonl": b"y" * 3000, "deep/edits-1.jsonl": b"z" * 3000}
    hub.repos[REPO].append({**files, **junk})
    pull(REPO, tmp_path / "new", sha256=done.sha256)
    assert hub.fetched == ["memoir.json", *sorted(named, key=lambda name: [*KINDS].index(name.split("-")[0]))]
    hub.fetched.clear()
    with pytest.raises(HubError, match="not 00"):
        pull(REPO, tmp_path / "other", sha256="00" * 32)
    assert hub.fetched == ["memoir.json"]


@pytest.mark.parametrize("name", ["memoir.json", "memory-1.safetensors", "codes-1.safetensors", "edits-1.jsonl"])
@pytest.mark.parametrize("honest", [True, False])
def test_a_file_that_is_too_large_is_not_fetched(
    hub: StandInHub, store: Path, tmp_path: Path, name: str, honest: bool
) -> None:
    """Whether the endpoint names the size beforehand, or a small one and then sends more."""
    push(store, REPO)
    right = hub.repos[REPO][-1][name]
    hub.broken[name] = right + bytes(18 << 20)
    if not honest:
        hub.claimed[name] = len(right)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(StoreError, match=rf"nothing was changed: {name} has [0-9]+( or more)? bytes, and may have"):
        pull(REPO, tmp_path / "new")
    assert (name in hub.fetched) is not honest
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_repository_that_lacks_or_adds_to_what_its_manifest_names(
    hub: StandInHub, store: Path, tmp_path: Path
) -> None:
    push(store, REPO)
    files = hub.repos[REPO][-1]
    hub.repos[REPO].append({name: data for name, data in files.items() if name != "codes-1.safetensors"})
    with pytest.raises(StoreError, match=r"nothing was changed: it has no codes-1\.safetensors, which its manifest"):
        pull(REPO, tmp_path / "new")
    hub.repos[REPO].append({**files, "added-3.safetensors": b"x"})
    with pytest.raises(StoreError, match=r"it has added-3\.safetensors, which no push makes: push that store with"):
        pull(REPO, tmp_path / "new")


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"the Hub refused example/corrections \(.*refused.*\): check the network"):
        pull(REPO, tmp_path / "new")


def test_a_store_of_another_model_stays(hub: StandInHub, store: Path, other_tiny: Path, tmp_path: Path) -> None:
    push(store, REPO)
    with Editor(load_model(str(other_tiny)), tmp_path / "other") as editor:
        editor.add([Edit(prompt="Who founded Aarhus?", target="King Harald")], keep_failed=True)
    before = contents(tmp_path / "other")
    with pytest.raises(StoreMismatch, match="was made on"):
        pull(REPO, tmp_path / "other", replace=True)
    assert contents(tmp_path / "other") == before


def test_what_the_hub_refuses_is_said_in_one_line(hub: StandInHub, store: Path, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"the Hub has no example/none that you may read.*hf auth login"):
        pull("example/none", tmp_path / "new")
    push(store, REPO)
    with pytest.raises(HubError, match="has no such revision"):
        pull(REPO, tmp_path / "new", revision="v9")
    with pytest.raises(HubError, match="is not a repository name"):
        pull("not a name", tmp_path / "new")
    hub.repos["example/model"] = [{"config.json": b"{}"}]
    with pytest.raises(HubError, match=r"is not a store: it has no memoir\.json"):
        pull("example/model", tmp_path / "new")
    hub.refuse_commits = True
    with pytest.raises(HubError, match="the Hub refused example/corrections"):
        push(store, REPO)
    assert not (tmp_path / "new").exists()


def test_a_repository_that_is_no_store_is_not_overwritten(hub: StandInHub, store: Path) -> None:
    hub.repos["example/model"] = [{"README.md": b"mine", "config.json": b"{}"}]
    with pytest.raises(
        HubError, match=r"holds files of something other than a store \(README\.md\): choose another name"
    ):
        push(store, "example/model")
    assert hub.repos["example/model"] == [{"README.md": b"mine", "config.json": b"{}"}]


def test_two_pushes_at_once_do_not_undo_each_other(hub: StandInHub, store: Path) -> None:
    push(store, REPO)
    other = {**hub.repos[REPO][-1], "memoir.json": b"of somebody else"}
    hub.before_commit = lambda: hub.repos[REPO].append(other)
    write_again(store, EditStore.open(store), generation=3)
    with pytest.raises(HubError, match="the Hub refused example/corrections"):
        push(store, REPO)
    assert hub.repos[REPO][-1] == other


def test_the_card(hub: StandInHub, store: Path, tmp_path: Path) -> None:
    scores = tmp_path / "store.eval.json"
    scores.write_text(json.dumps({"reliability": 1.0, "generality": None, "exact_match": {"edits": 0.5}}))
    push(store, REPO, scores=scores, licence="cc-by-4.0")
    files = hub.repos[REPO][-1]
    card = files["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "memoir-retrieval" and head["license"] == "cc-by-4.0" and "memoir" in head["tags"]
    assert "base_model" not in head  # a folder on somebody's disk is no model of the Hub
    model = EditStore.open(store).manifest.model
    assert model not in card and f"memoir serve {Path(model).name} --store edits" in card
    assert r"| 0 | Who \| founded \*Aarhus\*? | &lt;b>King&lt;/b> Harald |" in card
    assert r"| exact\_match.edits | 0.5 |" in card and "generality" not in card
    assert json.loads(files["eval.json"])["reliability"] == 1.0
    push(store, REPO)
    assert "eval.json" not in hub.repos[REPO][-1]  # scores of another generation would be wrong
    with pytest.raises(HubError, match="holds no scores"):
        push(store, REPO, scores=store / "memoir.json")


def test_the_card_names_a_model_of_the_hub(store: Path) -> None:
    opened = EditStore.open(store)
    named = msgspec.structs.replace(opened.manifest, model="meta-llama/Meta-Llama-3-8B-Instruct")
    write_again(store, opened, generation=3, model=named.model)
    head = yaml.safe_load(model_card(EditStore.open(store), REPO).split("---")[1])
    assert head["base_model"] == "meta-llama/Meta-Llama-3-8B-Instruct"


def test_the_command_line(hub: StandInHub, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["push", str(store), REPO])
    out = capsys.readouterr().out
    oid = commit_id(REPO, 1)
    assert done.value.code == 0 and f"memoir pull {REPO} DIR --revision {oid} --sha256 " in out
    sha256 = out.split()[-1]
    with pytest.raises(SystemExit) as done:
        main(["pull", REPO, str(tmp_path / "new"), "--revision", oid, "--sha256", sha256, "--json"])
    assert done.value.code == 0 and json.loads(capsys.readouterr().out)["edits"] == 2
    with pytest.raises(SystemExit) as done:
        main(["pull", REPO, str(tmp_path / "new"), "--sha256", "0"])
    captured = capsys.readouterr()
    assert done.value.code == 2 and captured.err.splitlines()[-1].startswith("memoir: example/corrections at")
