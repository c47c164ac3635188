"""How long a large store takes to open, to check, to answer and to be added to, and how much memory that takes.

    python benchmarks/large_store.py --edits 1000000 --json

Writes a synthetic store into a temporary folder (2.3 GB by default, removed afterwards) and opens it in a process of
its own. Its masks are those of a few thousand random ones, moved by whole bytes; its residual memory repeats one block.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from made_up_store import write_made_up

from memoir_index import pack
from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.question.span import SpanRule
from memoir_retrieval.store.additions import Columns, append
from memoir_retrieval.store.read import EditStore

K_SHARE = 3.5  # D / k, as in the method
ADDED = 100


def make(folder: Path, edits: int, d: int, h: int) -> None:
    random = np.random.default_rng(0)
    k = int(d / K_SHARE)
    bits = np.zeros((min(edits, 1000), d), dtype=bool)
    for row in bits:
        row[random.permutation(d)[:k]] = True
    base = pack(bits)
    codes = np.concatenate([np.roll(base, shift, axis=1) for shift in range(-(-edits // len(base)))])[:edits]
    write_made_up(
        folder,
        codes,
        lambda i: f"Which university did the person with number {i} attend in the years before the war?",
        np.resize(random.standard_normal(1 << 20).astype(np.float32), (h, d)),
        random.permutation(d),
        k,
        tau=0.55,
        span=SpanRule(),
    )


def anonymous() -> int:
    """Bytes of this process that are no file's: what a mapped file does not count among."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(folder: Path) -> dict[str, float]:
    before = anonymous()
    figures: dict[str, float] = {}

    def lap(name: str, started: float) -> None:
        figures[name] = round(time.perf_counter() - started, 3)

    started = time.perf_counter()
    store = EditStore.open(folder, check=False)
    lap("open_s", started)
    started = time.perf_counter()
    count = len(store.edits)
    middle = store.edit(count // 2)
    lap("first_edit_by_id_s", started)
    assert middle.id == count // 2
    started = time.perf_counter()
    store.check()
    lap("check_s", started)
    started = time.perf_counter()
    manifest = store.manifest
    index = store.index()
    hits = index.search(store.codes[[0, count // 2, count - 1]], manifest.tau)
    lap("index_and_first_search_s", started)
    assert (hits.overlaps == 1).all()
    figures["memory_added_mb"] = round((anonymous() - before) / 1e6)
    figures |= adding(store)
    started = time.perf_counter()
    again = EditStore.open(folder, check=False)
    lap("open_with_additions_s", started)
    assert len(again.edits) == count + len(again.additions) and len(again.additions) == ADDED + 1
    return figures | {"files_mb": round(store.size / 1e6)}


def adding(store: EditStore) -> dict[str, float]:
    """One edit at a time, durable: with its mask alone, and one with the columns that training has changed."""
    manifest, tail, spent = store.manifest, store.tail, []
    for changed in [0] * ADDED + [manifest.k]:
        number = manifest.next_id
        edit = StoredEdit(id=number, prompt="Who?", target="Somebody", created="", loss=0.0, steps=1)
        weights = np.ones((manifest.h, changed), dtype=np.float32)
        started = time.perf_counter()
        added = append(
            store.path,
            manifest,
            tail,
            codes=store.masks.codes[:1],
            ids=np.array([number]),
            memory_of=np.zeros(1, dtype=np.int32),
            edits=[edit],
            columns={0: Columns(np.arange(changed), weights)},
        )
        spent.append((time.perf_counter() - started) * 1000)
        assert added
        manifest, tail = added
    name = "add_one_with_columns_ms"
    return {"add_one_ms": round(sorted(spent[:-1])[ADDED // 2], 3), name: round(spent[-1], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=1_000_000)
    parser.add_argument("--d", type=int, default=14336)
    parser.add_argument("--h", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="where to put the store (default: a temporary folder)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        started = time.perf_counter()
        make(Path(scratch), options.edits, options.d, options.h)
        written = round(time.perf_counter() - started, 1)
        done = subprocess.run(
            [sys.executable, __file__, "--measure", scratch], check=True, capture_output=True, text=True
        )
    figures = {"edits": options.edits, "d": options.d, "write_s": written} | json.loads(done.stdout)
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:26s} {value}")


if __name__ == "__main__":
    main()
