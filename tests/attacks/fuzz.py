"""Random damage to stores, edit files, repositories that are pulled and requests to the administration.

What comes of it is a refusal with one line, or something consistent. Never anything else.

    PYTHONPATH=tests/retrieval python tests/attacks/fuzz.py --inputs 100000 --seed 0

runs that many inputs, one after another, and prints what became of them. The same seed gives the same inputs. Of ten,
four are stores, three edit files, one a repository and two requests.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import forge
import httpx
import hypothesis
import numpy as np
import read_format
from http_stand_in import running
from hub_stand_in import StandInHub
from hypothesis import strategies as st
from safetensors.numpy import load, save
from stores import small_store
from test_additions import add, columns

from memoir_index import popcount
from memoir_retrieval.edits.files import read_edits
from memoir_retrieval.errors import EditFileError, HubError, StoreError
from memoir_retrieval.question.text import plain_text
from memoir_retrieval.store import read as store_module
from memoir_retrieval.store.hub import pull
from memoir_retrieval.store.read import EditStore
from memoir_retrieval.store.write import write_again
from memoir_vllm.admin.routes import make_app
from memoir_vllm.admin.service import Service
from memoir_vllm.admin.tokens import Tokens
from memoir_vllm.config import parse_section

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
    b'[{"prompt":"Who?","target":"Me","rephrase":"p","subject":"s","locality":[{"loc":"a","loc_ans":"b"}]}]',
    b'[{"update":"Who?","ans":"Me","rephrase":"p","personas":"q","mhop":"a","mhop_ans":"b","loc":"c","loc_ans":"d"}]',
    b'[{"question":"Who?","answer":"Me","para_question":"p","sub_question":["a"],"sub_answer":["b"]}]',
    b'[{"messages":[{"role":"system","content":"a"},{"role":"user","content":"b"},{"role":"assistant","content":"c"}]}]',
    b'[{"conversations":[{"from":"human","value":"a"},{"from":"gpt","value":"b"}]},{"instruction":"a","output":"b"}]',
    b'[{"en":{"src":"{} is","alt":"Me","subject":"s"}}]',
    b'{\n"prompt":"Who?",\n"target":"Me"}\n{"prompt":"Where?",\n"target":3}\n',
    b'{"data":[{"prompt":"Who?","target":"Me"}]}',
    b'{"0":{"prompt":"Who?","target":"Me"},"1":{"prompt":"{} is","subject":"s","target_new":{"str":"Me"}}}',
    b'{"prompt":{"0":"Who?","1":"Where?"},"target":{"0":"Me","1":"Here"}}',
    b'{"columns":["prompt","target"],"index":[0],"data":[["Who?","Me"]]}',
    b'{"rows":[{"row":{"prompt":"Who?","target":"Me"},"truncated_cells":[]}],"num_rows_total":1}',
    b'{"prompts":["Who?"],"target_new":["Me"],"subject":["s"],"locality_inputs":{"n":{"prompt":["a"],"ground_truth":["b"]}}}',
]
TABLES = [
    b'prompt,target,rephrases\nWho?,Me,"a, b"\nWhere?,Here,\n',
    b"src;alt\r\na;b\r\n",
    b"question\tanswer\nWho?\tMe\n",
]

REQUESTS = [
    (
        "/edits",
        {"prompt": "Who?", "target": "Me", "rephrases": ["a"], "subject": "s", "requires": ["Who", ["x", "who"]]},
    ),
    ("/edits", {"prompt": "{} is", "target": "Me", "subject": "s", "on_conflict": "last"}),
    ("/edits", {"prompt": "p0", "target": "t"}),
    ("/lookup", {"prompt": "Who?", "n": 3}),
    ("/lookup", {"messages": [{"role": "user", "content": "Who?"}], "n": 3}),
]
TOKEN = "0123456789abcdef0123456789abcdef"


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
        holder[draw.choice(["x", "", "id", "name", "\ud800", "\x1b[2K", *holder])] = holder[last]
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
        message = ""
        try:
            store = EditStore.open(self.folder)
        except StoreError as error:
            message = str(error)
        if message:
            assert damaged, f"a sound store was refused: {message}"
            assert "\n" not in message and len(message) < 900, message
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
        manifest = forge.manifest(self.folder)
        if draw.random() < 0.3:
            data = json.dumps({k: v for k, v in manifest.items() if k != "sha256"} | {"sha256": "0" * 64}).encode()
            after: Any = mutate_bytes(data if signed else self.sound["memoir.json"], draw)
        else:
            after = mutate_json(manifest, draw)
        if signed:
            forge.sign(self.folder, after if isinstance(after, bytes | dict) else b"")
        else:
            data = after if isinstance(after, bytes) else json.dumps(after).encode()
            same = isinstance(after, dict) and after == manifest
            (self.folder / "memoir.json").write_bytes(self.sound["memoir.json"] if same else data)


def consistent(store: EditStore) -> None:
    """What was opened is what an independent reader reads, and every mask finds its own edit."""
    read = read_format.read(store.path)
    manifest = store.manifest
    assert {edit.id for edit in store.edits} == {*read} == {*store.ids.tolist()}
    assert 0 < manifest.tau <= 1 and all(0 <= number < manifest.next_id for number in read)
    assert np.isfinite(store.memories).all() and np.isfinite(store.background).all()
    assert sorted(store.permutation.tolist()) == list(range(manifest.d))
    assert store.memories.shape[1:] == (manifest.h, manifest.d) and (popcount(store.codes) == manifest.k).all()
    for row, (number, memory) in enumerate(zip(store.ids.tolist(), store.memory_of.tolist(), strict=True)):
        edit, masks, weights = read[number]
        assert edit["prompt"] == store.edit(number).prompt and edit["target"] == store.edit(number).target
        assert (np.packbits(masks, axis=1, bitorder="little") == store.codes[row]).all(1).any()
        np.testing.assert_array_equal(weights, store.memories[memory])
    hits = store.index().search(store.codes, manifest.tau)
    assert (hits.overlaps == 1).all()
    assert all((store.codes[row] == code).all() for row, code in zip(hits.rows, store.codes, strict=True))


class EditFileFuzz:
    """An edit file, in one of the layouts and forms that are read."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self, seed: int) -> str:
        draw = random.Random(seed)
        table = draw.random() < 0.15
        data = draw.choice(TABLES if table else EDIT_FILES)
        if table or draw.random() < 0.5:
            data = mutate_bytes(data, draw)
        elif data.count(b"\n") <= 1 and data[:1] in b"[{":
            data = json.dumps(mutate_json(json.loads(data), draw)).encode()
        elif data.startswith(b'{"'):
            data = mutate_lines(data, draw)
        path = self.folder / ("edits.csv" if table else "edits.jsonl")
        path.write_bytes(data)
        message = ""
        try:
            edits = read_edits(path, note=one_line)
        except EditFileError as error:
            message = str(error)
        if message:
            one_line(message)
            return "edit file: refused"
        assert edits and all(edit.prompt.strip() and edit.target.strip() for edit in edits)
        assert all(plain_text(edit.prompt) == edit.prompt for edit in edits)
        return "edit file: read"


def one_line(message: str) -> None:
    """What every message must be."""
    assert "\n" not in message and len(message) < 900, message
    message.encode()


class PullFuzz:
    """A repository of the Hub, and what a pull of it leaves in a folder with a store and in one without."""

    def __init__(self, folder: Path, hub: StandInHub):
        self.folder, self.hub = folder, hub
        small_store(folder / "sound")
        self.sound = {path.name: path.read_bytes() for path in (folder / "sound").iterdir()}
        self.digest = hashlib.sha256(self.sound["memoir.json"]).hexdigest()
        (folder / "here").mkdir()
        write_again(folder / "here", EditStore.open(folder / "sound"), generation=4)
        self.here = {path.name: path.read_bytes() for path in (folder / "here").iterdir()}

    def run(self, seed: int) -> str:
        draw = random.Random(seed)
        forged = self.folder / "forged"
        shutil.rmtree(forged, ignore_errors=True)
        shutil.copytree(self.folder / "sound", forged)
        kind = draw.choice(["nothing", "manifest", "bytes", "missing", "more", "size", *forge.KINDS])
        claimed = {}
        if kind == "manifest":
            forge.sign(forged, mutate_json(forge.manifest(forged), draw))
        elif kind in forge.KINDS:
            change = mutate_lines if kind == "edits" else mutate_tensors
            forge.put(forged, kind, change(forge.get(forged, kind), draw))
        name = draw.choice(sorted(self.sound))
        if kind == "bytes":
            (forged / name).write_bytes(mutate_bytes(self.sound[name], draw))
        elif kind == "missing":
            (forged / name).unlink()
        files = {path.name: path.read_bytes() for path in forged.iterdir()}
        if kind == "more":
            more = draw.choice(["memory-7.safetensors", "a/edits-1.jsonl", "added-2.safetensors", "../x", "x" * 300])
            files[more] = draw.randbytes(2000)
        elif kind == "size":
            claimed[name] = draw.choice([0, 1, len(files[name]) - 1, len(files[name]) + 1, 1 << 40])
        self.hub.repos["a/b"], self.hub.claimed, self.hub.fetched = [files], claimed, []
        pinned = draw.random() < 0.5
        target = self.folder / draw.choice(["here", "new"])
        message = ""
        try:
            pull("a/b", target, sha256=self.digest if pinned else None)
        except (StoreError, HubError) as error:
            message = str(error)
        assert {*self.hub.fetched} <= {*self.sound}, self.hub.fetched
        assert not [path for path in self.folder.iterdir() if path.name.startswith(".memoir-pull")]
        if message:
            one_line(message)
            assert not (self.folder / "new").exists()
            if target.name == "here":
                assert {p.name: p.read_bytes() for p in target.iterdir() if p.name != ".lock"} == self.here, message
            outcome = "refused"
        else:
            assert not pinned or files["memoir.json"] == self.sound["memoir.json"]
            consistent(EditStore.open(target))
            outcome = "pulled"
        shutil.rmtree(self.folder / "new", ignore_errors=True)
        for path in [*target.iterdir()] if target.name == "here" else []:
            path.unlink()
        for file, data in self.here.items():
            (self.folder / "here" / file).write_bytes(data)
        return f"repository, {kind}: {outcome}"


class RequestFuzz:
    """Bodies for the administration's routes, up to the queue and the engine, which are not there."""

    def __init__(self, folder: Path):
        small_store(folder)
        self.folder = folder

    def run(self, seed: int) -> str:
        draw = random.Random(seed)
        path, body = draw.choice(REQUESTS)
        if draw.random() < 0.4:
            data = mutate_bytes(json.dumps(body).encode(), draw)
        else:
            data = json.dumps(mutate_json(body, draw)).encode()
        reply = asyncio.run(self.post(path, data))
        assert reply.status_code in (200, 202, 400, 409, 413, 422, 503), (reply.status_code, reply.text)
        answer = reply.json()
        if reply.status_code in (400, 409, 503):
            one_line(answer["detail"])
        return f"{path}: {reply.status_code}"

    async def post(self, path: str, data: bytes) -> httpx.Response:
        """What the administration replies to a body."""
        # Nobody works on the queue and nobody answers a lookup: what is tried is what comes before.
        service = Service(parse_section({"store": str(self.folder)}), "m", "here:1", NoEngines(), None)  # type: ignore[arg-type]
        app = make_app(Tokens({hashlib.sha256(TOKEN.encode()).digest(): "ann"}), lambda: service, schema=False)
        headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
            with mock.patch.object(Service, "lookup", no_lookup):
                reply = await client.post(path, content=data)
        (self.folder / "audit.jsonl").unlink(missing_ok=True)
        return reply


class NoEngines:
    async def reload(self) -> int:
        return 0

    async def stats(self) -> list[dict[str, Any]]:
        return []


async def no_lookup(service: Service, body: Any) -> Any:
    raise StoreError("no engine here")


def fuzz(inputs: int, seed: int, folder: Path) -> Counter[str]:
    """Run that many inputs of all kinds. Raises what an input breaks, with the seed of that input."""
    for name in ("store", "pull", "requests"):
        (folder / name).mkdir()
    with running(StandInHub()) as hub, mock.patch.dict(os.environ, {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_example"}):
        targets: list[Any] = [StoreFuzz(folder / "store"), EditFileFuzz(folder), PullFuzz(folder / "pull", hub)]
        return _run([*targets, RequestFuzz(folder / "requests")], inputs, seed)


def _run(targets: list[Any], inputs: int, seed: int) -> Counter[str]:
    became: Counter[str] = Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=inputs, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(st.integers(0, 1 << 64), st.sampled_from([0, 0, 0, 0, 1, 1, 1, 2, 3, 3]))
    def attack(number: int, target: int) -> None:
        became[targets[target].run(number)] += 1

    try:
        attack()
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
