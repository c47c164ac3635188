"""A hostile store is refused with an error that names what is wrong, in bounded memory, however it is opened."""

from __future__ import annotations

import os
import re
import shutil
import tracemalloc
from functools import partial
from pathlib import Path

import forge
import pytest
from stores import ATTACKS, small_store
from test_additions import add

from memoir_retrieval.errors import StoreError
from memoir_retrieval.store import read as store_module
from memoir_retrieval.store.read import EditStore
from memoir_retrieval.store.remove import remove_edits
from memoir_retrieval.store.verify import verify_store
from memoir_retrieval.store.write import write_again

MEMORY = 48 << 20  # bytes; a manifest may have 16 MB


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "store"
    small_store(folder)
    assert len(EditStore.open(folder).codes) == 4 and verify_store(folder) == []
    return folder


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_by_name(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    says, attack = ATTACKS[name]
    folder = Path(shutil.copytree(sound, tmp_path / "store"))
    attack(folder)
    tracemalloc.start()
    try:
        for mapped in (False, True):
            if mapped:
                monkeypatch.setattr(store_module, "MAPPED_FROM", 1)
            with pytest.raises(StoreError) as caught:
                EditStore.open(folder)
            message = str(caught.value)
            assert re.search(says, message) and "\n" not in message and len(message) < 900, message
        try:
            faults = verify_store(folder)
        except StoreError as error:
            faults = [str(error)]
        assert faults and all(len(fault) < 900 and "\n" not in fault for fault in faults)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("numbers", [{"generation": 1 << 53}, {"next_id": (1 << 63) - 1}], ids=["generation", "id"])
@pytest.mark.parametrize("whole", [False, True], ids=["addition", "files"])
def test_a_store_at_the_end_of_its_numbers_stays_as_it_is(
    sound: Path, tmp_path: Path, numbers: dict[str, int], whole: bool
) -> None:
    """The numbers that a manifest may have end somewhere; a write that would pass the end must not break the store."""
    folder = Path(shutil.copytree(sound, tmp_path / "store"))
    forge.sign(folder, forge.manifest(folder) | numbers)
    store = EditStore.open(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    end = "generation 9007199254740993" if "generation" in numbers else "next_id 9223372036854775808"
    after = store.manifest.next_id + ("next_id" in numbers)
    commit = {
        True: partial(write_again, folder, store, generation=store.manifest.generation + 1, next_id=after),
        False: partial(add, folder, source="a test"),
    }
    with pytest.raises(
        StoreError,
        match=f"cannot be written again, its next generation would have {end}, more than the format allows: edit",
    ):
        commit[whole]()
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"} == before
    assert verify_store(folder) == [] and EditStore.open(folder).manifest == store.manifest


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_a_lock_that_is_no_file_is_not_taken(sound: Path, tmp_path: Path, kind: str) -> None:
    """A folder that came from somebody else: whoever writes it must not make or cut off what its lock leads to."""
    folder, secret = Path(shutil.copytree(sound, tmp_path / "store")), tmp_path / "secret"
    (folder / ".lock").unlink(missing_ok=True)
    if kind == "link":
        secret.write_text("kept")
    if kind.endswith("link"):
        (folder / ".lock").symlink_to(secret)
    elif kind == "folder":
        (folder / ".lock").mkdir()
    else:
        os.mkfifo(folder / ".lock")
    with pytest.raises(StoreError, match=r"/\.lock is a link, a folder or a device, not a file: remove it"):
        remove_edits(folder, [0])
    assert (secret.read_text() if kind == "link" else secret.exists()) == ("kept" if kind == "link" else False)
    assert EditStore.open(folder).manifest == EditStore.open(sound).manifest
