"""Random damage to stores and edit files: refused with one line, or what is read is consistent. Never anything else.

    PYTHONPATH=tests/retrieval python tests/attacks/fuzz.py --inputs 100000 --seed 0

runs that many inputs, one after another, and prints what became of them. The same seed gives the same inputs.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import forge
import hypothesis
import numpy as np
import read_format
from hypothesis import strategies as st
from safetensors.numpy import load, save
from stores import small_store
from test_additions import add, columns

from memoir_index import popcount
from memoir_retrieval.edits.files import read_edits
from memoir_retrieval.errors import EditFileError, StoreError
from memoir_retrieval.store import read as store_module
from memoir_retrieval.store.read import EditStore

ADDED = "added-2.safetensors"
NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 7, 12, 64, 1 << 31, 1 << 53, (1 << 63) - 1, 1 << 64, 10**40, 0.5, -0.0, 1e308, 1e-320,
    "", "0", "F32", "I64", "U8", "question", "all", "../x", "/dev/zero", "memory-1.safetensors", "\0", "\ud7ff",
    "x" * 300, [], [0], [1, 2], [[]], [[[[[[]]]]]], {}, {"name": "x"}, {"id": 0}, {"role": "user"}, "{}",
]  # fmt: skip

EDIT_FILES = [
    b'{"prompt":"Who?","target":"Me","rephrases":["Who is it?"],"locality":[{"prompt":"a","answer":"b"}]}\n'
    b'{"prompt":"Where?","target":"Here","subject":"s"}\n',
    b'[{"src":"Who?","alt":"Me","rephrase":"Who is it?","loc":"a","loc_ans":"b","subject":"s"}]',
    b'[{"requested_rewrite":{"prompt":"{} is","subject":"Oslo","target_new":{"str":"x"},"target_true":{"str":"y"}},'
    b'"paraphrase_prompts":["a"],"neighborhood_prompts":["b"]}]',
    b'[{"prompt":"Who?","target_new":"Me","rephrase_prompt":"Who is it?","subject":"s","locality":{"r":[{"prompt":"a",'
    b'"ground_truth":["b"]}]},"portability":{}}]',
    b'[{"requested_rewrite":[{"prompt":"{} is","subject":"Oslo","target_new":{"str":"x"},"question":"q"}],'
    b'"questions":["a"]}]',
    b'[{"question":"Who?","object":"Me","subject":"s","paraphrased_question":"p","locality_question":"l"}]',
]


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where values stand in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, part in inner for path in paths(part, (*at, key)))]


def mutate_json(value: Any, draw: random.Random) -> Any:
    """Replace, remove or repeat one part."""
    value = json.loads(json.dumps(value))
    *before, last = draw.choice(paths(value)[1:] or [(0,)])
    holder = value
    for key in before:
        holder = holder[key]
    kind = draw.randrange(5)
    if kind < 3:
        holder[last] = draw.choice(NASTY)
    elif kind == 3:
        del holder[last]
    elif isinstance(holder, dict):
        holder[draw.choice(["x", "", "id", "name", *holder])] = holder[last]
    else:
        holder.insert(0, holder[last])
    return value


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Flip a bit, set a byte, or cut, repeat, insert or move a piece."""
    out = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        at, length = draw.randrange(len(out) + 1), draw.choice([1, 1, 4, 8, 64])
        kind = draw.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = draw.choice(b'\0\xff\n"{}[],:09-e')
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = out[at : at + length]
        elif kind == 4:
            out[at:at] = draw.randbytes(length)
        elif kind == 5:
            out[at : at + length] = draw.randbytes(length)
        else:
            piece = out[at : at + length]
            del out[at : at + length]
            to = draw.randrange(len(out) + 1)
            out[to:to] = piece
    return bytes(out)


def mutate_tensors(data: bytes, draw: random.Random) -> bytes:
    """Change the header's JSON, or some numbers in a file that is otherwise sound."""
    length = int.from_bytes(data[:8], "little")
    if draw.random() < 0.5:
        text = json.dumps(mutate_json(json.loads(data[8 : 8 + length]), draw)).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + data[8 + length :]
    tensors = {name: array.copy() for name, array in load(data).items()}
    array = tensors[draw.choice(sorted(tensors))]
    flat = array.reshape(-1).view(np.uint8)
    for _ in range(draw.choice([1, 1, 4])):
        flat[draw.randrange(len(flat))] = draw.randrange(256)
    return save(tensors)


def mutate_lines(data: bytes, draw: random.Random) -> bytes:
    lines = [json.loads(line) for line in data.splitlines()]
    return b"".join(json.dumps(line).encode() + b"\n" for line in mutate_json(lines, draw))


class StoreFuzz:
    """A store on disk, and what becomes of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        small_store(folder)
        add(folder, columns={0: columns(1, 5, value=1.0)}, source="a test")
        self.sound = {path.name: path.read_bytes() for path in folder.iterdir()}

    def run(self, seed: int) -> str:
        draw = random.Random(seed)
        for name, data in self.sound.items():
            (self.folder / name).write_bytes(data)
        kind = draw.choice(["manifest", "addition", *forge.KINDS])
        signed = draw.random() < 0.7
        if kind != "addition":  # it follows a manifest as it is, and would hide what else is wrong
            (self.folder / ADDED).unlink()
        if kind == "manifest":
            self._manifest(draw, signed)
        elif kind == "addition":
            self._addition(draw, signed)
        else:
            before = forge.get(self.folder, kind)
            blind = draw.random() < 0.3
            change = mutate_bytes if blind else mutate_lines if kind == "edits" else mutate_tensors
            after = change(before, draw)
            if signed:
                forge.put(self.folder, kind, after)
            else:
                (self.folder / forge.manifest(self.folder)[kind]["name"]).write_bytes(after)
        store_module.MAPPED_FROM = 1 if draw.random() < 0.3 else 64 << 20
        names = [name for name in self.sound if name != ADDED or kind == "addition"]
        damaged = any((self.folder / name).read_bytes() != self.sound[name] for name in names)
        told = ""
        try:
            store = EditStore.open(self.folder)
        except StoreError as error:
            told = str(error)
        if told:
            assert damaged, f"a sound store was refused: {told}"
            assert "\n" not in told and len(told) < 900, told
            return f"{kind}: refused"
        assert signed or not damaged, f"damage to {kind} went unnoticed"
        consistent(store)
        return f"{kind}: forged, opened and consistent" if damaged else f"{kind}: unchanged"

    def _addition(self, draw: random.Random, signed: bool) -> None:
        before = self.sound[ADDED]
        if draw.random() < 0.3:
            after = mutate_bytes(before, draw)
        elif draw.random() < 0.3:
            tensors = load(before)
            part = draw.choice(["head", "edits"])
            lines = mutate_lines(tensors[part].tobytes(), draw)
            after = save({**tensors, part: np.frombuffer(lines, np.uint8)})
        else:
            after = mutate_tensors(before, draw)
        (self.folder / ADDED).write_bytes(forge.signed(after) if signed and len(after) > 32 else after)

    def _manifest(self, draw: random.Random, signed: bool) -> None:
        made = forge.manifest(self.folder)
        if draw.random() < 0.3:
            data = json.dumps({k: v for k, v in made.items() if k != "sha256"} | {"sha256": "0" * 64}).encode()
            after: Any = mutate_bytes(data if signed else self.sound["memoir.json"], draw)
        else:
            after = mutate_json(made, draw)
        if signed:
            forge.sign(self.folder, after if isinstance(after, bytes | dict) else b"")
        else:
            data = after if isinstance(after, bytes) else json.dumps(after).encode()
            same = isinstance(after, dict) and after == made
            (self.folder / "memoir.json").write_bytes(self.sound["memoir.json"] if same else data)


def consistent(store: EditStore) -> None:
    """What was opened is what an independent reader reads, and every mask finds its own edit."""
    read = read_format.read(store.path)
    made = store.manifest
    assert {edit.id for edit in store.edits} == {*read} == {*store.ids.tolist()}
    assert 0 < made.tau <= 1 and all(0 <= number < made.next_id for number in read)
    assert np.isfinite(store.memories).all() and np.isfinite(store.background).all()
    assert sorted(store.permutation.tolist()) == list(range(made.d))
    assert store.memories.shape[1:] == (made.h, made.d) and (popcount(store.codes) == made.k).all()
    for row, (number, memory) in enumerate(zip(store.ids.tolist(), store.memory_of.tolist(), strict=True)):
        edit, masks, weights = read[number]
        assert edit["prompt"] == store.edit(number).prompt and edit["target"] == store.edit(number).target
        assert (np.packbits(masks, axis=1, bitorder="little") == store.codes[row]).all(1).any()
        np.testing.assert_array_equal(weights, store.memories[memory])
    hits = store.index().search(store.codes, made.tau)
    assert (hits.overlaps == 1).all()
    assert all((store.codes[row] == code).all() for row, code in zip(hits.rows, store.codes, strict=True))


class EditFileFuzz:
    def __init__(self, folder: Path):
        self.path = folder / "edits.jsonl"

    def run(self, seed: int) -> str:
        draw = random.Random(seed)
        data = draw.choice(EDIT_FILES)
        if draw.random() < 0.5:
            data = mutate_bytes(data, draw)
        elif data.startswith(b"["):
            data = json.dumps(mutate_json(json.loads(data), draw)).encode()
        else:
            data = mutate_lines(data, draw)
        self.path.write_bytes(data)
        told = ""
        try:
            edits = read_edits(self.path)
        except EditFileError as error:
            told = str(error)
        if told:
            assert "\n" not in told and len(told) < 900, told
            return "edit file: refused"
        assert edits and all(edit.prompt.strip() and edit.target.strip() for edit in edits)
        return "edit file: read"


def fuzz(inputs: int, seed: int, folder: Path) -> Counter[str]:
    """Run that many inputs, a quarter of them edit files. Raises what an input breaks, with the seed of that input."""
    (folder / "store").mkdir()
    targets = [StoreFuzz(folder / "store"), EditFileFuzz(folder)]
    became: Counter[str] = Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=inputs, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(st.integers(0, 1 << 64), st.sampled_from([0, 0, 0, 1]))
    def one(number: int, target: int) -> None:
        became[targets[target].run(number)] += 1

    try:
        one()
    finally:
        store_module.MAPPED_FROM = 64 << 20
    return became


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        became = fuzz(given.inputs, given.seed, Path(folder))
    for what, count in sorted(became.items()):
        print(f"{count:8d}  {what}")
    print(f"{became.total():8d}  inputs, seed {given.seed}: nothing unexpected")


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "retrieval"))
    main()
