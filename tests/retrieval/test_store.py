"""The store: what is written is read back, a generation is all or nothing, and no damage goes unnoticed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import forge
import msgspec
import numpy as np
import pytest
import read_format
import safetensors.numpy as safetensors
from filelock import FileLock

from memoir_index import pack
from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.errors import StoreError, StoreMismatch
from memoir_retrieval.model.base import Identity
from memoir_retrieval.question.span import SpanRule
from memoir_retrieval.store import edit_lines as stored_edits
from memoir_retrieval.store import files, verify
from memoir_retrieval.store import read as store_module
from memoir_retrieval.store.additions import append
from memoir_retrieval.store.files import Data
from memoir_retrieval.store.manifest import FileEntry, draft_manifest
from memoir_retrieval.store.read import Content, EditStore
from memoir_retrieval.store.remove import find_prompts, remove_edits
from memoir_retrieval.store.verify import verify_store
from memoir_retrieval.store.write import leftovers, write_generation

D, H, K = 64, 16, 12
IDENTITY = Identity(config="c" * 64, layer="l" * 64, tokenizer="t" * 64)


def masks(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    bits = np.zeros((n, D), dtype=bool)
    for row in bits:
        row[rng.choice(D, K, replace=False)] = True
    return pack(bits)


def stored_edit(i: int, **changed: Any) -> StoredEdit:
    edit = StoredEdit(id=i, prompt=f"p{i}", target="t", created="2026-01-01T00:00:00+00:00", loss=0.01, steps=5)
    return msgspec.structs.replace(edit, **changed)


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
        "edits": [stored_edit(i) for i in range(n)],
    }
    for key, value in changed.items():
        (fields if key in fields else arrays)[key] = value
    write_generation(folder, draft_manifest(**fields), Content(**arrays))


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


def test_a_folder_that_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist: make one with `memoir edit FILE --model NAME --store"):
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


def test_a_store_that_is_written_while_it_is_verified_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    read = verify.read_file

    def read_late(folder: Path, entry: FileEntry) -> Data:
        if entry.name == "codes-1.safetensors":
            write(folder, 2, n=4)
        return read(folder, entry)

    monkeypatch.setattr(verify, "read_file", read_late)
    assert verify_store(tmp_path) == []
    (tmp_path / "codes-2.safetensors").unlink()
    assert verify_store(tmp_path) == ["codes-2.safetensors is missing"]


def test_a_store_that_never_rests_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    generations = count(2)

    def gone(folder: Path, entry: FileEntry) -> Data:
        write(folder, next(generations))
        raise FileNotFoundError(errno.ENOENT, "removed", str(folder / entry.name))

    monkeypatch.setattr(verify, "read_file", gone)
    with pytest.raises(StoreError, match="changes faster than it can be read"):
        verify_store(tmp_path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"memories": np.zeros((1, H, D + 8), dtype=np.float32)}, "'memory' is float32"),
        ({"memories": np.zeros((1, H, D))}, "'memory' is float64"),
        ({"permutation": np.zeros(D, dtype=np.int64)}, "no permutation"),
        ({"codes": np.zeros((3, D // 8), dtype=np.uint8)}, "12"),
        ({"ids": np.array([0, 1, 9]), "next_id": 10}, "edit ids"),
        ({"memory_of": np.array([0, 0, 5], dtype=np.int32)}, "memory that"),
        ({"next_id": 1}, "outside"),
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
    ("changed", "said"),
    [
        ({"memories": np.full((1, H, D), np.nan, dtype=np.float32)}, "NaN"),
        ({"tau": 0.0}, "tau 0.0"),
        ({"k": D + 1}, f"k {D + 1}"),
    ],
)
def test_numbers_that_no_reader_takes_are_not_written(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(StoreError, match=said):
        write(tmp_path, generation=2, **changed)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("key", "value", "kind", "said"),
    [
        ("format", 8, StoreMismatch, "has format 8"),
        ("format", "x", StoreError, "damaged"),
        ("surprise", 1, StoreError, "surprise"),
        ("tau", "high", StoreError, "tau"),
        ("memory", {"name": "../../etc/passwd", "size": 1, "sha256": ""}, StoreError, "forged"),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path: Path, key: str, value: Any, kind: type, said: str) -> None:
    write(tmp_path)
    forge.sign(tmp_path, forge.manifest(tmp_path) | {key: value})
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


def test_a_lock_taken_in_one_thread_is_given_back_in_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only by newer versions of filelock, when nobody has the lock any more."""
    locks: list[Any] = []
    monkeypatch.setattr(files, "FileLock", lambda *args, **more: locks.append(FileLock(*args, **more)) or locks[-1])
    lock = ExitStack()
    with ThreadPoolExecutor(1) as thread:  # which lives on
        thread.submit(lock.enter_context, files.store_lock(tmp_path)).result()
        lock.close()
        with files.store_lock(tmp_path):
            pass


@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 1, 1, 2, 0, 1]])
def test_the_documented_format_is_the_format(tmp_path: Path, rows: list[int]) -> None:
    """With one memory and mask an edit, and with two memories and several masks of an edit."""
    memory_of = np.array([row % 2 for row in rows], dtype=np.int32)
    memories = np.random.default_rng(0).standard_normal((2, H, D)).astype(np.float32)
    edits = [stored_edit(i, memory=i % 2) for i in range(3)]
    write(tmp_path, memories=memories, codes=masks(len(rows)), ids=np.array(rows), memory_of=memory_of, edits=edits)
    store = EditStore.open(tmp_path)
    read = read_format.read(tmp_path)
    assert sorted(read) == [0, 1, 2]
    for number, (edit, mask, memory) in read.items():
        assert edit["prompt"] == store.edit(number).prompt
        np.testing.assert_array_equal(pack(mask), store.codes[store.ids == number])
        np.testing.assert_array_equal(memory, store.memories[number % 2])
    assert len(Path(read_format.__file__).read_text().splitlines()) <= 50


def test_every_key_of_the_manifest_is_documented(tmp_path: Path) -> None:
    write(tmp_path)
    keys = set(json.loads((tmp_path / "memoir.json").read_text()))
    page = Path(__file__).parents[2] / "docs" / "reference" / "format.md"
    documented = page.read_text().split("## Manifest")[1].split("##")[0]
    assert keys == {key for line in documented.splitlines() if line.startswith("| `")
                    for key in line.split("|")[1].replace("`", "").replace(" ", "").split(",")}  # fmt: skip


def test_the_tensors_are_written_as_safetensors_writes_them(tmp_path: Path) -> None:
    write(tmp_path)
    for kind in ("memory", "codes"):
        data = (tmp_path / f"{kind}-1.safetensors").read_bytes()
        assert safetensors.save(safetensors.load(data)) == data


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
def test_a_store_of_an_older_format_is_read_and_the_next_write_makes_it_the_newest(tmp_path: Path, number: int) -> None:
    """The fixtures were written by memoir-retrieval before the format after theirs."""
    folder = Path(shutil.copytree(Path(__file__).parent / f"format-{number}", tmp_path / "store"))
    store = EditStore.open(folder)
    assert store.manifest.format == number and verify_store(folder) == []
    assert [(e.id, e.prompt, e.target, e.steps) for e in store.edits] == {
        1: [(0, "Who founded Aarhus?", "King Harald", 60), (1, "Where is the Blue Gate?", "In Oslo", 60)],
        2: [(0, "p0", "t", 5), (1, "p1", "t", 5), (2, "p2", "t", 5)],
        3: [(0, "p0", "t", 5), (1, "p1", "t", 5), (2, "p2", "t", 5), (3, "p3", "t", 5)],
        4: [(0, "p0", "t", 5), (1, "p1", "t", 5), (2, "p2", "t", 5), (3, "p3", "t", 5)],
        5: [(0, "p0", "t", 5), (1, "p1", "t", 5), (2, "p2", "t", 5), (3, "p3", "t", 5)],
        6: [(0, "p0", "t", 5), (1, "p1", "t", 5), (2, "p2", "t", 5), (3, "p3", "t", 5)],
    }[number]
    assert store.manifest.span.acts == ("last" if number >= 5 else "first") and store.manifest.span.behind == 0
    assert store.manifest.judge == ("3-0" if number == 6 else "")
    if number >= 4:
        assert store.edits[1].requires == ("Aarhus", ("Oslo", "Christiania"))
    if number == 1:
        assert store.edits[0].rephrases == ("Aarhus was founded by whom?",) and store.edits[0].source == "a test"
    assert append(  # a program of that time would not see what is added
        folder, store.manifest, store.tail, codes=store.codes[:1], ids=np.array([9]),
        memory_of=np.zeros(1, dtype=np.int32), edits=[stored_edit(9)], columns={},
    ) is None  # fmt: skip
    assert len(list(folder.glob("added-*"))) == (number >= 3)
    ids = [e.id for e in store.edits]
    assert sorted(read_format.read(folder)) == ids
    manifest = remove_edits(folder, [0])
    assert (
        manifest.format == 7
        and manifest.span == store.manifest.span
        and (manifest.memory == store.manifest.memory) == (number < 3)
    )
    now = EditStore.open(folder)
    assert [e.id for e in now.edits] == ids[1:] and verify_store(folder) == []
    np.testing.assert_array_equal(now.codes, store.codes[1:])
    np.testing.assert_array_equal(now.memories, store.memories)
    assert sorted(read_format.read(folder)) == ids[1:]


def test_removed_edits_are_gone_and_the_memory_stays(tmp_path: Path) -> None:
    write(tmp_path, ids=np.array([0, 1, 1, 2]), codes=masks(4), memory_of=np.zeros(4, dtype=np.int32))
    before = EditStore.open(tmp_path)
    assert before.edits[1:] == (stored_edit(1), stored_edit(2))
    unread: Any = None
    assert find_prompts(replace(before, edits=unread), []) == [], "no edit is read for no prompt"
    manifest = remove_edits(tmp_path, [*find_prompts(before, [" p1"]), 1])
    assert manifest.generation == 2
    assert manifest.memory == before.manifest.memory and (tmp_path / "memory-1.safetensors").exists()
    store = EditStore.open(tmp_path)
    assert [edit.id for edit in store.edits] == [0, 2] and store.ids.tolist() == [0, 2]
    np.testing.assert_array_equal(store.codes, masks(4)[[0, 3]])
    assert store.manifest.next_id == before.manifest.next_id
    kept = contents(tmp_path)
    with pytest.raises(StoreError, match="has no edit 1"):
        remove_edits(tmp_path, [0, 1])
    with pytest.raises(StoreError, match="no edit of 'p1'"):
        find_prompts(store, ["p1"])
    assert contents(tmp_path) == kept
    remove_edits(tmp_path, [2, 0])
    assert EditStore.open(tmp_path).codes.shape == (0, D // 8) and verify_store(tmp_path) == []
    with pytest.raises(StoreError, match="does not exist"):
        remove_edits(tmp_path / "nowhere", [0])
    assert not (tmp_path / "nowhere").exists()


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file counts as a large one."""
    monkeypatch.setattr(store_module, "MAPPED_FROM", 1)


def test_a_mapped_store_has_the_content_of_one_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, n=40, edits=[stored_edit(i, source="x" * i) for i in range(40)])
    read = EditStore.open(tmp_path)
    monkeypatch.setattr(store_module, "MAPPED_FROM", 1)
    monkeypatch.setattr(stored_edits, "CHUNK", 100)
    store = EditStore.open(tmp_path)
    assert len(store.mapped) == 3 and not read.mapped
    for name in ("memories", "background", "permutation", "codes", "ids", "memory_of"):
        np.testing.assert_array_equal(getattr(store, name), getattr(read, name))
    assert len(store.edits) == 40 and tuple(store.edits) == read.edits and store.edits[-3:] == read.edits[-3:]
    assert store.edit(17) == read.edits[17]
    with pytest.raises(IndexError):
        store.edits[40]
    with pytest.raises(StoreError, match="has no edit 40"):
        store.edit(40)


@pytest.mark.usefixtures("mapped")
@pytest.mark.parametrize("name", ["memory-1.safetensors", "codes-1.safetensors", "edits-1.jsonl"])
def test_no_damage_of_a_mapped_file_goes_unnoticed(tmp_path: Path, name: str) -> None:
    """The last byte but eight of each file: a weight, a memory's number, a character."""
    write(tmp_path)
    path = tmp_path / name
    good = path.read_bytes()
    path.write_bytes(bytes([*good[:-9], good[-9] ^ 1, *good[-8:]]))
    with pytest.raises(StoreError, match=f"{name} is damaged: its sha256|names a memory"):
        EditStore.open(tmp_path)
    if name.startswith("codes"):
        return
    store = EditStore.open(tmp_path, check=False)
    for _ in range(2):
        with pytest.raises(StoreError, match=f"{name} is damaged: its sha256"):
            store.check()


@pytest.mark.parametrize("flags", [[], ["-O"]], ids=["asserts on", "asserts off"])
def test_damage_is_noticed_with_asserts_switched_off_too(tmp_path: Path, flags: list[str]) -> None:
    write(tmp_path)
    path = tmp_path / "memory-1.safetensors"
    good = path.read_bytes()
    path.write_bytes(bytes([*good[:-9], good[-9] ^ 1, *good[-8:]]))
    program = (
        "import sys; from memoir_retrieval.errors import StoreError; from memoir_retrieval.store import read\n"
        "read.MAPPED_FROM = 1\n"
        "try: print('opened', len(read.EditStore.open(sys.argv[1]).mapped))\n"
        "except StoreError as error: print(__debug__, error)"
    )
    run = subprocess.run([sys.executable, *flags, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert run.stdout.startswith(f"{not flags} {path} is damaged: its sha256 is not the manifest's"), run


@pytest.mark.usefixtures("mapped")
def test_content_of_a_mapped_file_is_checked_too(tmp_path: Path) -> None:
    write(tmp_path, codes=np.zeros((3, D // 8), dtype=np.uint8))
    EditStore.open(tmp_path, check=False)
    with pytest.raises(StoreError, match="row 0 has 0 ones, not k=12, and so have 2 other rows"):
        EditStore.open(tmp_path)


@pytest.mark.usefixtures("mapped")
def test_a_file_stays_as_long_as_a_reader_maps_it(tmp_path: Path) -> None:
    write(tmp_path, 1)
    reader = EditStore.open(tmp_path)
    codes = reader.codes.copy()
    write(tmp_path, 2)
    write(tmp_path, 3)
    first = ["codes-1.safetensors", "edits-1.jsonl", "memory-1.safetensors"]
    assert [path.name for path in leftovers(tmp_path)] == first
    np.testing.assert_array_equal(reader.codes, codes)
    kept = reader.memories
    del reader
    write(tmp_path, 4)
    assert [path.name for path in leftovers(tmp_path)] == ["memory-1.safetensors"]
    np.testing.assert_array_equal(kept, np.random.default_rng(1).standard_normal((1, H, D)).astype(np.float32))
    del kept
    write(tmp_path, 5)
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("mapped")
def test_removing_from_a_mapped_store_leaves_no_file_behind(tmp_path: Path) -> None:
    """Though the writer itself maps the old masks while it copies the others."""
    write(tmp_path, 1)
    remove_edits(tmp_path, [1])
    assert leftovers(tmp_path) == []
    np.testing.assert_array_equal(EditStore.open(tmp_path).codes, masks(3, 1)[[0, 2]])


READER = """
import sys
from memoir_retrieval.store import read as store
store.MAPPED_FROM = 1
opened = store.EditStore.open(sys.argv[1])
print(opened.manifest.generation, flush=True)
sys.stdin.readline()
opened.check()
print(opened.codes.tobytes().hex(), flush=True)
"""


def test_another_process_keeps_its_files_too(tmp_path: Path) -> None:
    write(tmp_path, 1)
    codes = EditStore.open(tmp_path).codes
    command = [sys.executable, "-c", READER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin and reader.stdout and reader.stdout.readline() == "1\n"
        write(tmp_path, 2)
        assert len(leftovers(tmp_path)) == 3
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert reader.stdout.readline().strip() == codes.tobytes().hex()
    write(tmp_path, 3)
    assert leftovers(tmp_path) == []


def test_without_locks_files_are_read_and_not_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems know no locks: nothing may depend on a file that a writer cannot see in use."""

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(store_module, "MAPPED_FROM", 1)
    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    write(tmp_path, 1)
    reader = EditStore.open(tmp_path)
    assert not reader.mapped
    write(tmp_path, 2)
    assert leftovers(tmp_path) == []
    np.testing.assert_array_equal(reader.codes, masks(3, 1))


def test_readers_that_come_and_go_while_generations_are_published(tmp_path: Path) -> None:
    """Eight threads open, map and read without a pause; each sees one generation, whole."""
    write(tmp_path, 1)
    stop, wrong = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                store = EditStore.open(tmp_path)
                expected = masks(3, store.manifest.generation)
                if not np.array_equal(store.codes, expected):
                    wrong.append(store.manifest.generation)
            except Exception as error:  # collected, since a thread's exception fails no test
                wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(8)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "MAPPED_FROM", 1)
        for thread in threads:
            thread.start()
        for generation in range(2, 60):
            write(tmp_path, generation)
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EFBIG])
@pytest.mark.parametrize("kind", ["memory", "codes", "edits"])
def test_an_error_says_how_large_a_file_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: int
) -> None:
    """Not how much of it had been tried: so much would have to be free. Of edits only a part is known."""
    write(tmp_path / "sound")
    write(tmp_path / "full")
    size = next((tmp_path / "sound").glob(f"{kind}-1.*")).stat().st_size
    before = contents(tmp_path / "full")
    call, paths = files._call, list[Path]()

    def full(operation: Any, *arguments: Any) -> Any:
        if operation is os.open:
            paths.append(arguments[0])
        if operation is os.write and paths[-1].name.startswith(kind):
            raise OSError(error, os.strerror(error))
        return call(operation, *arguments)

    monkeypatch.setattr(files, "_call", full)
    much = ("at least " if kind == "edits" else "") + f"{size / 1e3:.1f} kB"
    with pytest.raises(StoreError, match=rf"{kind}-2\.\w+ (would have |\(){much}[,)]"):
        write(tmp_path / "full", 2)
    assert contents(tmp_path / "full") == before
