"""A hostile store is refused with an error that names what is wrong, in bounded memory, however it is opened."""

from __future__ import annotations

import re
import shutil
import tracemalloc
from pathlib import Path

import pytest
from stores import ATTACKS, small_store

from memoir_retrieval.errors import StoreError
from memoir_retrieval.store import read as store_module
from memoir_retrieval.store.read import EditStore
from memoir_retrieval.store.verify import verify_store

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
            told = str(caught.value)
            assert re.search(says, told) and "\n" not in told and len(told) < 900, told
        try:
            faults = verify_store(folder)
        except StoreError as error:
            faults = [str(error)]
        assert faults and all(len(fault) < 900 and "\n" not in fault for fault in faults)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
