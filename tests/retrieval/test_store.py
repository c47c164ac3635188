"""The store: what is written is read back, a generation is all or nothing, and no damage goes unnoticed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import read_format

from memoir_index import pack
from memoir_retrieval import files
from memoir_retrieval.edit import StoredEdit
from memoir_retrieval.errors import StoreError, StoreMismatch
from memoir_retrieval.model import Identity
from memoir_retrieval.span import SpanRule
from memoir_retrieval.store import EditStore, write_generation

D, H, K = 64, 16, 12
IDENTITY = Identity(config="c" * 64, layer="l" * 64, tokenizer="t" * 64)


def masks(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    bits = np.zeros((n, D), dtype=bool)
    for row in bits:
        row[rng.choice(D, K, replace=False)] = True
    return pack(bits)


def write(folder: Path, generation: int = 1, n: int = 3, **changed: Any) -> None:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(generation)
    fields = {
        "generation": generation,
        "model": "toy",
        "base": IDENTITY,
        "module": "model.layers.1.mlp.down_proj",
        "layer": 1,
        "d": D,
        "h": H,
        "k": K,
        "tau": 0.5,
        "span": SpanRule(starts=((1, 2),), newlines=(3,), end=(4,)),
        "chat": True,
        "dtype": "float32",
        "seed": 0,
        "contexts": ([{"role": "system", "content": "Be brief."}],),
        "training": {"steps": 10},
        "next_id": n,
    }
    arrays = {
        "memories": rng.standard_normal((1, H, D)).astype(np.float32),
        "background": rng.standard_normal(D).astype(np.float32),
        "permutation": rng.permutation(D),
        "codes": masks(n, generation),
        "ids": np.arange(n),
        "memory_of": np.zeros(n, dtype=np.int32),
        "edits": [
            StoredEdit(id=i, prompt=f"p{i}", target="t", created="2026-01-01T00:00:00+00:00", loss=0.01, steps=5)
            for i in range(n)
        ],
    }
    for key, value in changed.items():
        (fields if key in fields else arrays)[key] = value
    write_generation(folder, fields, **arrays)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path)
    store = EditStore.open(tmp_path)
    assert store.manifest.span == SpanRule(starts=((1, 2),), newlines=(3,), end=(4,))
    assert store.manifest.contexts == ([{"role": "system", "content": "Be brief."}],)
    np.testing.assert_array_equal(store.codes, masks(3, 1))
    np.testing.assert_array_equal(store.memories, np.random.default_rng(1).standard_normal((1, H, D)).astype("f4"))
    assert [e.prompt for e in store.edits] == ["p0", "p1", "p2"]
    assert store.edit(2).prompt == "p2"
    with pytest.raises(StoreError, match="has no edit 7: `memoir list"):
        store.edit(7)


def test_a_new_generation_replaces_the_files_of_the_old(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2, n=4)
    assert EditStore.open(tmp_path).manifest.generation == 2
    assert sorted(contents(tmp_path)) == ["codes-2.safetensors", "edits-2.jsonl", "memoir.json", "memory-2.safetensors"]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("step", range(1, 12))
def test_a_write_that_fails_anywhere_leaves_the_old_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Every sync and rename in turn reports a full disk; eleven is more than one commit makes."""
    write(tmp_path, 1)
    before = contents(tmp_path)
    calls = 0

    def failing(real: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        return call

    monkeypatch.setattr(files.os, "fsync", failing(os.fsync))
    monkeypatch.setattr(files.os, "replace", failing(os.replace))
    said = ""
    try:
        write(tmp_path, 2)
    except StoreError as error:
        said = str(error)
    if "unchanged" in said:
        assert "no space left" in said and contents(tmp_path) == before
    else:  # nothing failed, or the rename went through and only the last sync did not
        assert "is written" in said or calls < step
        assert EditStore.open(tmp_path).manifest.generation == 2


def test_a_folder_that_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist: make one with `memoir edit FILE --store"):
        EditStore.open(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"no memoir\.json"):
        EditStore.open(tmp_path)


@pytest.mark.parametrize("name", ["memory-1.safetensors", "codes-1.safetensors", "edits-1.jsonl"])
def test_every_kind_of_damage_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    path = tmp_path / name
    good = path.read_bytes()
    for damage, said in (
        (good[:-1], "bytes, the manifest says"),
        (good + b"x", "bytes, the manifest says"),
        (bytes([*good[:-9], good[-9] ^ 1, *good[-8:]]), "sha256"),
    ):
        path.write_bytes(damage)
        with pytest.raises(StoreError, match=said) as caught:
            EditStore.open(tmp_path)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(StoreError, match=f"{name} is missing"):
        EditStore.open(tmp_path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"memories": np.full((1, H, D), np.nan, dtype=np.float32)}, "NaN"),
        ({"memories": np.zeros((1, H, D + 8), dtype=np.float32)}, "'memory' is float32"),
        ({"memories": np.zeros((1, H, D))}, "'memory' is float64"),
        ({"permutation": np.zeros(D, dtype=np.int64)}, "no permutation"),
        ({"codes": np.zeros((3, D // 8), dtype=np.uint8)}, "12"),
        ({"ids": np.array([0, 1, 9])}, "edit ids"),
        ({"memory_of": np.array([0, 0, 5], dtype=np.int32)}, "memory that"),
        ({"next_id": 1}, "outside"),
        ({"tau": 0.0}, "tau 0.0"),
        ({"k": D + 1}, f"k {D + 1}"),
    ],
)
def test_a_store_with_sound_digests_and_unsound_content_is_refused(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    write(tmp_path, **changed)
    with pytest.raises(StoreError, match="damaged") as caught:
        EditStore.open(tmp_path)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "kind", "said"),
    [
        ("format", 2, StoreMismatch, "has format 2"),
        ("format", "x", StoreError, "damaged"),
        ("surprise", 1, StoreError, "surprise"),
        ("tau", "high", StoreError, "tau"),
        ("memory", {"name": "../../etc/passwd", "size": 1, "sha256": ""}, StoreError, "forged"),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path: Path, key: str, value: Any, kind: type, said: str) -> None:
    write(tmp_path)
    path = tmp_path / "memoir.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(kind, match=said):
        EditStore.open(tmp_path)


def test_a_manifest_that_is_no_json(tmp_path: Path) -> None:
    write(tmp_path)
    for junk in (b"", b"{", b"[]", b"\xff\xfe", b'{"format": 1}'):
        (tmp_path / "memoir.json").write_bytes(junk)
        with pytest.raises(StoreError, match="damaged"):
            EditStore.open(tmp_path)


def test_another_model_is_refused_by_what_differs(tmp_path: Path) -> None:
    write(tmp_path)
    store = EditStore.open(tmp_path)
    store.require(IDENTITY, "toy")
    for field in ("config", "layer", "tokenizer"):
        other = Identity(**{"config": "c" * 64, "layer": "l" * 64, "tokenizer": "t" * 64, field: "0" * 64})
        with pytest.raises(StoreMismatch, match=r"was made on toy .* but other has .*0000: use the model"):
            store.require(other, "other")


def test_only_one_writer(tmp_path: Path) -> None:
    with files.store_lock(tmp_path), pytest.raises(StoreError, match="being written"), files.store_lock(tmp_path):
        pass
    with files.store_lock(tmp_path):
        pass


def test_the_documented_format_is_the_format(tmp_path: Path) -> None:
    write(tmp_path)
    store = EditStore.open(tmp_path)
    read = read_format.read(tmp_path)
    assert sorted(read) == [0, 1, 2]
    for number, (edit, mask, memory) in read.items():
        assert edit["prompt"] == store.edit(number).prompt
        assert (pack(mask[None]) == store.codes[number]).all()
        np.testing.assert_array_equal(memory, store.memories[0] * mask)
    keys = set(json.loads((tmp_path / "memoir.json").read_text()))
    documented = (Path(__file__).parents[2] / "docs" / "format.md").read_text().split("## Manifest")[1].split("##")[0]
    assert keys == {key for line in documented.splitlines() if line.startswith("| `")
                    for key in line.split("|")[1].replace("`", "").replace(" ", "").split(",")}  # fmt: skip
