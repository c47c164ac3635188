"""Small commits: what is added to a store without writing its files again is as much a part of it."""

from __future__ import annotations

import fcntl
import shutil
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forge
import msgspec
import numpy as np
import pytest
import read_format
import safetensors.numpy as safetensors
import torch
from test_store import D, H, contents, masks, stored_edit, write

from memoir_index import pack
from memoir_retrieval import Edit, Editor, load_model
from memoir_retrieval.errors import StoreError
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.store import additions as additions_module
from memoir_retrieval.store import commits as commits_module
from memoir_retrieval.store import read as store_module
from memoir_retrieval.store.additions import Columns, append
from memoir_retrieval.store.commits import Commits
from memoir_retrieval.store.read import EditStore
from memoir_retrieval.store.remove import remove_edits
from memoir_retrieval.store.settings import Training
from memoir_retrieval.store.verify import verify_store
from memoir_retrieval.store.write import leftovers, write_again


def add(
    folder: Path,
    *,
    codes: np.ndarray | None = None,
    columns: dict[int, Columns] | None = None,
    rows: int = 1,
    **edit: Any,
) -> None:
    """Add one edit, under the next id, with masks of its own or these."""
    store = EditStore.open(folder)
    number = store.manifest.next_id
    assert append(
        folder,
        store.manifest,
        store.tail,
        codes=masks(rows, 100 + number) if codes is None else codes,
        ids=np.full(rows, number),
        memory_of=np.full(rows, edit.get("memory", 0), dtype=np.int32),
        edits=[stored_edit(number, **edit)],
        columns=columns or {},
    )


def columns(*numbers: int, value: float) -> Columns:
    return Columns(np.array(numbers), np.full((H, len(numbers)), value, dtype=np.float32))


@pytest.fixture(params=[64 << 20, 1], ids=["read", "mapped"])
def grown(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three edits in files and two that were added; the last changes columns that the one before has changed."""
    monkeypatch.setattr(store_module, "MAPPED_FROM", request.param)
    write(tmp_path, memories=np.zeros((8, H, D), dtype=np.float32))
    add(tmp_path, columns={0: columns(1, 5, value=1.0), 1: columns(7, value=3.0)}, rows=2)
    add(tmp_path, columns={0: columns(5, 9, value=2.0)}, trained=False, source="a test")
    return tmp_path


def test_what_is_added_is_read_back(grown: Path) -> None:
    store = EditStore.open(grown)
    manifest = store.manifest
    assert (manifest.generation, manifest.next_id, manifest.untrained) == (3, 5, 1)
    assert [edit.id for edit in store.edits] == [0, 1, 2, 3, 4] and store.edits[-1].source == "a test"
    assert store.edits[1:4] == tuple(stored_edit(i) for i in (1, 2, 3)) and store.edit(4).id == 4
    assert store.ids.tolist() == [0, 1, 2, 3, 3, 4] and store.memory_of.tolist() == [0] * 6
    np.testing.assert_array_equal(store.codes, np.concatenate([masks(3, 1), masks(2, 103), masks(1, 104)]))
    wanted = np.zeros((8, H, D), dtype=np.float32)
    wanted[0, :, 1], wanted[0, :, 5], wanted[0, :, 9], wanted[1, :, 7] = 1, 2, 2, 3
    np.testing.assert_array_equal(store.memories, wanted)
    index = store.index()
    assert index.ids.tolist() == store.ids.tolist()
    np.testing.assert_array_equal(index.codes, store.codes)
    assert verify_store(grown) == [] and leftovers(grown) == []
    store.check()
    assert sum(path.stat().st_size for path in grown.glob("*-*")) == store.size


def test_the_documented_format_is_the_format_with_additions(grown: Path) -> None:
    store, read = EditStore.open(grown), read_format.read(grown)
    assert sorted(read) == [0, 1, 2, 3, 4]
    for number, (edit, mask, memory) in read.items():
        assert edit["prompt"] == store.edit(number).prompt
        np.testing.assert_array_equal(pack(mask), store.codes[store.ids == number])
        np.testing.assert_array_equal(memory, store.memories[0])


def test_an_addition_has_the_bytes_that_safetensors_writes(grown: Path) -> None:
    paths = list(grown.glob("added-*"))
    assert paths
    for path in paths:
        assert safetensors.save(safetensors.load(path.read_bytes())) == path.read_bytes()


def test_the_next_write_of_the_files_takes_additions_up(grown: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    store = EditStore.open(grown)
    copy = tmp_path_factory.mktemp("copy")
    write_again(copy, store, generation=9)
    there = EditStore.open(copy)
    del store
    manifest = remove_edits(grown, [0, 4])
    assert manifest.generation == 4 and manifest.untrained == 0
    now = EditStore.open(grown)
    assert not now.additions and not list(grown.glob("added-*")) and verify_store(grown) == []
    assert now.ids.tolist() == [1, 2, 3, 3]
    for left, right in ((there.memories, now.memories), (there.codes[1:5], now.codes)):
        np.testing.assert_array_equal(left, right)
    assert there.edits[1:4] == now.edits[:]


def test_a_reader_keeps_what_it_opened(grown: Path) -> None:
    reader = EditStore.open(grown)
    before = reader.memories.copy(), reader.codes.copy()
    add(grown, columns={0: columns(*range(D), value=9.0)})
    remove_edits(grown, [1])
    np.testing.assert_array_equal(reader.memories, before[0])
    np.testing.assert_array_equal(reader.codes, before[1])
    assert reader.edit(1) == stored_edit(1)


def test_a_store_keeps_of_additions_what_is_not_in_its_memories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they change lies in the memories from then on, and meanwhile only in the bytes that are still to be read."""
    monkeypatch.setattr(store_module, "MAPPED_FROM", 1)
    write(tmp_path, memories=np.zeros((512, H, D), dtype=np.float32))
    for first in range(0, 384, 32):
        add(tmp_path, columns={first + i: columns(*range(D), value=1.0) for i in range(32)})
    size = EditStore.open(tmp_path).tail.size
    assert size > 1.5e6
    tracemalloc.start()
    try:
        store = EditStore.open(tmp_path)
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(store.additions) == 12 and (store.memories[:384] == 1).all() and not store.memories[384:].any()
    assert held < 0.2 * size and most < 1.6 * size, (held, most, size)


def test_every_changed_bit_is_noticed(grown: Path) -> None:
    path = grown / "added-2.safetensors"
    sound = path.read_bytes()
    for at in [*range(0, len(sound), 37), len(sound) - 1]:
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 4]) + sound[at + 1 :])
        with pytest.raises(StoreError, match=r"added-2.safetensors is damaged"):
            EditStore.open(grown)
        assert len(verify_store(grown)) == 1
    for cut in (0, 7, 40, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:cut])
        with pytest.raises(StoreError, match=r"added-2.safetensors is damaged"):
            EditStore.open(grown)
    path.write_bytes(sound)
    assert len(EditStore.open(grown).edits) == 5


def test_an_addition_that_is_missing_or_of_another_store_is_noticed(grown: Path, tmp_path: Path) -> None:
    first = (grown / "added-2.safetensors").read_bytes()
    (grown / "added-2.safetensors").unlink()
    with pytest.raises(StoreError, match=r"added-2.safetensors is missing"):
        EditStore.open(grown)
    (grown / "added-2.safetensors").write_bytes((grown / "added-3.safetensors").read_bytes())
    with pytest.raises(StoreError, match=r"does not follow generation 1"):
        EditStore.open(grown)
    (grown / "added-2.safetensors").write_bytes(first)
    forge.sign(grown, forge.manifest(grown) | {"tau": 0.6})
    with pytest.raises(StoreError, match=r"does not follow generation 1"):
        EditStore.open(grown)


def test_a_backup_over_files_of_a_later_generation_is_named(
    grown: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cure = "or files of a later generation are left here: restore it into an empty folder"
    backup = Path(shutil.copytree(grown, tmp_path_factory.mktemp("backup") / "store"))
    write_again(grown, EditStore.open(grown), generation=9)
    add(grown, prompt="later")
    shutil.copytree(backup, grown, dirs_exist_ok=True)
    with pytest.raises(StoreError, match=f"is missing or locked .*{cure}"):
        EditStore.open(grown)
    (grown / "added-10.safetensors").rename(grown / "added-4.safetensors")
    with pytest.raises(StoreError, match=f"does not follow generation 3.*{cure}"):
        EditStore.open(grown)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ids": np.array([5], dtype=np.int64)}, "edit id outside 0..4"),
        ({"ids": np.array([1], dtype=np.int64)}, "edit ids of .* differ"),
        ({"memory_of": np.array([8], dtype=np.int32)}, "names a memory"),
        ({"memory_of": np.array([1], dtype=np.int32)}, "different memories"),
        ({"codes": np.zeros((1, D // 8), dtype=np.uint8)}, "has 0 ones"),
        ({"codes": masks(2)}, r"have \[2, 1, 1\] rows"),
        ({"codes": masks(1).astype(np.int32)}, "'codes' is int32"),
        ({"columns": np.array([D], dtype=np.int64)}, r"have \[1, 2, 2\] rows"),
        ({"columns": np.array([0, D], dtype=np.int64)}, "column outside"),
        ({"columns": np.array([0, -1], dtype=np.int64)}, "column outside"),
        ({"memories": np.array([0, 8], dtype=np.int32)}, "memory outside"),
        ({"weights": np.full((2, H), np.nan, dtype=np.float32)}, "NaN"),
        ({"weights": np.zeros((2, H + 1), dtype=np.float32)}, "'weights' is float32"),
        ({"head": {"next_id": 3}}, "next_id 3"),
        ({"head": {"next_id": 1 << 63}}, "next_id"),
        ({"head": {"untrained": 0}}, "1 edits of .* are not trained"),
        ({"head": {"untrained": -1}}, "untrained -1"),
        ({"head": {"more": 1}}, "more"),
        ({"head": b'{"after": "", "next_id": 5, "next_id": 5, "untrained": 1}'}, "is given twice"),
        ({"head": b"[" * 5_000}, "damaged"),
        ({"edits": b'{"id": 4}\n'}, "is damaged"),
        ({"edits": b'{"id": 4, "prompt": "p"'}, "no end"),
        ({"edits": b""}, "0 edits of .* are not trained"),
    ],
)
def test_an_addition_with_a_sound_digest_and_unsound_content_is_refused(
    grown: Path, changed: dict[str, Any], said: str
) -> None:
    forge.add(grown, 3, changed)
    with pytest.raises(StoreError, match=said) as caught:
        EditStore.open(grown)
    assert "damaged" in str(caught.value) and "\n" not in str(caught.value)


def test_two_stores_of_one_generation_are_told_apart(grown: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As after a restore from a backup and another edit: what reloads compares manifests."""
    other = shutil.copytree(grown, tmp_path_factory.mktemp("other") / "store")
    (other / "added-3.safetensors").unlink()
    add(other, trained=False, source="another test")
    first, second = EditStore.open(grown).manifest, EditStore.open(other).manifest
    assert (first.generation, first.next_id) == (second.generation, second.next_id) and first != second
    assert first == EditStore.open(grown).manifest


def test_an_addition_that_is_locked_is_not_passed_over(grown: Path) -> None:
    with (grown / "added-2.safetensors").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match=r"added-2.safetensors is missing or locked by another program"):
            EditStore.open(grown)
    assert len(EditStore.open(grown).edits) == 5


def test_additions_of_another_store_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    (tmp_path / "added-2.safetensors").write_bytes(b"of another store")
    with pytest.raises(StoreError, match=r"holds added-2.safetensors of another store: choose a new folder"):
        write(tmp_path)
    assert contents(tmp_path) == {"added-2.safetensors": b"of another store"}


def test_a_store_that_is_gone_before_it_is_checked(grown: Path) -> None:
    store = EditStore.open(grown, check=False)
    if store.mapped:
        shutil.rmtree(grown)
        with pytest.raises(StoreError, match="gone since the store was opened"):
            store.check()


def test_a_reader_beside_a_writer_of_files_takes_the_generation_it_has_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next generation is published while this one is being checked: it is whole all the same."""
    write(tmp_path, 1)
    real = store_module.parse

    def parse(*given: Any) -> Any:
        if not (tmp_path / "codes-2.safetensors").exists():
            write(tmp_path, 2)
        return real(*given)

    monkeypatch.setattr(store_module, "parse", parse)
    assert EditStore.open(tmp_path).manifest.generation == 1
    assert EditStore.open(tmp_path).manifest.generation == 2


def test_an_addition_that_claims_to_be_huge_is_not_read(grown: Path) -> None:
    with (grown / "added-3.safetensors").open("r+b") as file:
        file.truncate(10 << 30)
    with pytest.raises(StoreError, match="may be forged"):
        EditStore.open(grown)


@pytest.mark.parametrize("grown", [64 << 20, 1], ids=["read", "mapped"], indirect=True)
def test_readers_that_come_and_go_while_edits_are_added(grown: Path) -> None:
    """Each sees a whole generation, and none that is older than one it has seen; some write takes all additions up."""
    wrong: list[object] = []
    seen: list[int] = []
    done = threading.Event()

    def read() -> None:
        last = 0
        while not done.is_set():
            try:
                store = EditStore.open(grown)
                now = store.manifest.generation
                if now < last or store.memories[0, 0, 0] != max(now - 3, 0) or len(store.edits) != len(set(store.ids)):
                    wrong.append((now, last, store.memories[0, 0, 0], len(store.edits)))
                last = now
                seen.append(now)
            except Exception as error:  # collected, since a thread's exception fails no test
                wrong.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for generation in range(4, 84):
        if generation % 8:
            add(grown, columns={0: columns(0, value=generation - 3.0)})
        else:
            store = EditStore.open(grown)
            store.memories[0, :, 0] = generation - 3
            write_again(grown, store, generation=generation)
    done.set()
    for reader in readers:
        reader.join()
    assert wrong == [] and len(set(seen)) > 10
    store = EditStore.open(grown)
    assert store.manifest.generation == 83 and len(store.additions) == 3 and verify_store(grown) == []


# ---- what an editor makes of it --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny: Path) -> BaseModel:
    return load_model(str(tiny))


def editor(model: BaseModel, folder: Path) -> Editor:
    return Editor(model, folder, training=Training(max_steps=3, variants=0, edits_per_memory=8))


def edits(*towns: str) -> list[Edit]:
    return [Edit(prompt=f"Who founded {town}?", target="King Harald") for town in towns]


def test_an_editor_adds_what_is_small_and_writes_the_files_for_the_rest(model: BaseModel, tmp_path: Path) -> None:
    with editor(model, tmp_path) as session:
        session.add(edits("Aarhus", "Oslo"), keep_failed=True)
    files = contents(tmp_path)
    with editor(model, tmp_path) as session:
        session.add(edits("Visby"), keep_failed=True)
        session.add(edits("Ribe"), keep_failed=True)
        held = [memory.numpy().copy() for memory in session.memories]
        codes, ids = session.index.codes.copy(), session.index.ids.copy()
        assert session.generation == 3
    assert {name: data for name, data in contents(tmp_path).items() if not name.startswith("added")} == files
    store = EditStore.open(tmp_path)
    assert len(store.additions) == 2 and store.manifest.generation == 3 and verify_store(tmp_path) == []
    np.testing.assert_array_equal(store.memories, np.stack(held))
    np.testing.assert_array_equal(store.codes, codes)
    np.testing.assert_array_equal(store.ids, ids)
    with editor(model, tmp_path) as session:  # a replacement cannot be added
        session.add([Edit(prompt="Who founded Visby?", target="Nobody")], on_conflict="last", keep_failed=True)
        held = [memory.numpy().copy() for memory in session.memories]
    store = EditStore.open(tmp_path)
    assert not store.additions and store.manifest.generation == 4 and not list(tmp_path.glob("added-*"))
    assert [edit.id for edit in store.edits] == [0, 1, 3, 4]
    np.testing.assert_array_equal(store.memories, np.stack(held))


def test_memories_are_put_together_on_the_host(model: BaseModel, tmp_path: Path) -> None:
    """On the device of the model there may be no room for all of them twice. A stand-in for those on a GPU."""
    with editor(model, tmp_path) as session:
        session.add(edits("Aarhus"), keep_failed=True)
        held = session.memories[0].numpy().copy()
        elsewhere: Any = [SimpleNamespace(cpu=lambda memory=memory: memory) for memory in session.memories]
        session.memories[:] = elsewhere
        session.store._commits.rewrite()
        session.store.commit()
    np.testing.assert_array_equal(EditStore.open(tmp_path).memories, held[None])


def test_additions_are_taken_up_when_they_are_many_or_large(
    model: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(additions_module, "MOST", 2)
    kinds = []
    with editor(model, tmp_path) as session:
        for town in ("Aarhus", "Oslo", "Visby", "Ribe", "Lund"):
            session.add(edits(town), keep_failed=True)
            kinds.append(len(EditStore.open(tmp_path).additions))
    assert kinds == [0, 1, 2, 0, 1]


def test_an_addition_larger_than_the_files_is_not_made(grown: Path) -> None:
    """What a reader would take for forged is never written: the files are."""
    store = EditStore.open(grown)
    files = sum(getattr(store.manifest, kind).size for kind in ("memory", "codes", "edits"))
    before = contents(grown)
    for rows in (files // (D // 8 + 12), files // (D // 8 + 12 + 80)):  # by the masks alone, and with the lines
        new = [stored_edit(store.manifest.next_id + row) for row in range(rows)]
        commit = append(
            grown,
            store.manifest,
            store.tail,
            codes=np.repeat(masks(1), rows, axis=0),
            ids=np.array([edit.id for edit in new]),
            memory_of=np.zeros(rows, dtype=np.int32),
            edits=new,
            columns={},
        )
        assert commit is None and contents(grown) == before
    while EditStore.open(grown).tail.size < files - 3000:
        add(grown)
    store = EditStore.open(grown)
    everything = {number: columns(*range(D), value=1.0) for number in range(8)}
    with pytest.raises(AssertionError):
        add(grown, columns=everything)
    assert EditStore.open(grown).manifest == store.manifest


@pytest.mark.parametrize("why", ["room", "many", "old"])
def test_columns_are_not_gathered_for_an_addition_that_cannot_be(
    grown: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """As many as all memories have may be more than there is room for beside them; it was known afterwards only."""
    store = EditStore.open(grown)
    changed = torch.arange(D if why == "room" else 1)
    if why == "many":
        monkeypatch.setattr(additions_module, "MOST", 2)
    elif why == "old":
        store = replace(store, manifest=msgspec.structs.replace(store.manifest, format=6))
    commits = Commits(grown, store)
    new = [stored_edit(5 + number, memory=number) for number in range(8)]
    for edit in new:
        commits.add(edit, masks(1, 100 + edit.id), changed)
    gathered: list[object] = []
    monkeypatch.setattr(commits_module, "append", lambda *given, **more: gathered.append(more))
    index = store.index()
    index.add([edit.id for edit in new], np.concatenate([masks(1, 100 + edit.id) for edit in new]))
    memories = [torch.tensor(memory) for memory in store.memories]
    manifest = msgspec.structs.replace(store.manifest, generation=4, next_id=13)
    everything = [*store.edits, *new]
    written = commits.write(
        manifest, memories, index, everything, store.background, store.permutation, store.tasks, store.references
    )
    assert gathered == [] and written.generation == 4 and verify_store(grown) == []
    assert [edit.id for edit in EditStore.open(grown).edits] == list(range(13))
