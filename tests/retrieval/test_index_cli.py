"""`memoir index info` and `memoir bench index`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from memoir_index.synthetic import MaskSource
from memoir_retrieval.cli.bench import bench
from memoir_retrieval.cli.index_info import info
from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.evaluation.index_bench import free_bytes
from memoir_retrieval.model.base import Identity
from memoir_retrieval.question.span import SpanRule
from memoir_retrieval.store.manifest import draft_manifest
from memoir_retrieval.store.read import Content
from memoir_retrieval.store.write import write_generation


@pytest.fixture(autouse=True)
def _threads_as_they_were() -> Iterator[None]:
    """The benchmark sets them for its process, which here is that of the other tests."""
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    yield
    faiss.omp_set_num_threads(before[0])
    torch.set_num_threads(before[1])


def write(folder: Path, d: int, k: int, codes: np.ndarray, ids: np.ndarray, tied: int = 0) -> Path:
    """tied: how many of the edits, the first ones, require words."""
    folder.mkdir()
    stores = {
        "generation": 3,
        "model": "toy",
        "base": Identity(config="c" * 64, layer="l" * 64, tokenizer="t" * 64),
        "module": "model.layers.1.mlp.down_proj",
        "layer": 1,
        "d": d,
        "h": 1,
        "k": k,
        "tau": 0.5,
        "span": SpanRule(),
        "chat": False,
        "dtype": "float32",
        "seed": 0,
        "contexts": (),
        "training": {},
        "next_id": int(ids.max()) + 1,
    }
    edits = [
        StoredEdit(
            id=i,
            prompt=f"p{i}",
            target="t",
            created="2026-01-01T00:00:00+00:00",
            loss=0.01,
            steps=5,
            requires=("p",) if i < tied else (),
        )
        for i in sorted(set(ids.tolist()))
    ]
    write_generation(
        folder,
        draft_manifest(**stores),
        Content(
            memories=np.zeros((1, 1, d), np.float32),
            background=np.zeros(d, np.float32),
            permutation=np.arange(d),
            codes=codes,
            ids=ids,
            memory_of=np.zeros(len(ids), np.int32),
            edits=edits,
        ),
    )
    return folder


def test_info_tells_size_and_plan(tmp_path: Path) -> None:
    store = write(tmp_path / "small", 64, 12, MaskSource(64, 12).masks(5), np.array([0, 0, 1, 2, 3]))
    result = json.loads(CliRunner().invoke(info, [str(store), "--json"], catch_exceptions=False).stdout)
    assert result["generation"] == 3 and (result["edits"], result["masks"], result["d"], result["k"]) == (4, 5, 64, 12)
    assert result["tau"] == 0.5 and result["plan"]["kind"] == "scan" and result["plan"]["sketch_bits"] == 0
    assert result["bytes_per_mask"] == 16 and result["bytes_per_edit"] == 20.0
    assert result["threads"] == {"1": "one", "32": "all"}
    text = CliRunner().invoke(info, [str(store)], catch_exceptions=False).stdout
    assert "generation 3: 4 edits, 5 masks of 64 bits with 12 ones" in text and "full scan" in text
    with pytest.raises(ConfigError, match=r"tau is 1\.5: choose 0 < tau <= 1"):
        CliRunner().invoke(info, [str(store), "--tau", "1.5"], catch_exceptions=False)


def test_info_of_a_large_store_names_the_sketch(tmp_path: Path) -> None:
    d, k = 12288, 3510
    store = write(tmp_path / "large", d, k, MaskSource(d, k).masks(4200), np.arange(4200))
    result = json.loads(CliRunner().invoke(info, [str(store), "--json"], catch_exceptions=False).stdout)
    assert result["plan"]["kind"] == "sketch" and result["plan"]["sketch_bits"] == 2048
    assert result["bytes_per_edit"] <= 1.2 * d / 8
    at_low_tau = CliRunner().invoke(info, [str(store), "--tau", "0.4"], catch_exceptions=False).stdout
    assert "lookup at tau 0.4: full scan (below tau=0.5" in at_low_tau and "are searched so" not in at_low_tau


def test_info_counts_the_masks_that_lookups_search(tmp_path: Path) -> None:
    """Those of edits that require words are in no scan and in no sketch."""
    d, k = 12288, 3510
    store = write(tmp_path / "tied", d, k, MaskSource(d, k).masks(4200), np.arange(4200), tied=200)
    result = json.loads(CliRunner().invoke(info, [str(store), "--json"], catch_exceptions=False).stdout)
    assert (result["masks"], result["masks_searched"], result["plan"]["kind"]) == (4200, 4000, "scan")
    text = CliRunner().invoke(info, [str(store)], catch_exceptions=False).stdout
    assert "full scan (below 4096 masks" in text and "4000 masks are searched so; the others are of edits that" in text


GIB = 1 << 30


def tree(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8388608 kB"}  # 8 GiB


@pytest.mark.parametrize(
    ("files", "free"),
    [
        (MEMINFO, 8 * GIB),
        (MEMINFO | {"proc/self/cgroup": "0::/"}, 8 * GIB),
        (
            MEMINFO
            | {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/b/memory.max": "max",
                "sys/fs/cgroup/a/b/memory.current": GIB,
                "sys/fs/cgroup/a/b/memory.stat": "inactive_file 0",
                "sys/fs/cgroup/a/memory.max": 4 * GIB,
                "sys/fs/cgroup/a/memory.current": 3 * GIB,
                "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {GIB}",
            },
            2 * GIB,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,memory:/docker/0123\n4:pids:/docker/0123",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": 3 * GIB,
                "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB,
                "sys/fs/cgroup/memory/memory.stat": "inactive_file 7\ntotal_inactive_file 0",
            },
            2 * GIB,
        ),
    ],
)
def test_memory_is_that_of_the_machine_or_of_the_container(tmp_path: Path, files: dict[str, object], free: int) -> None:
    assert free_bytes(tree(tmp_path, files)) == free


def test_where_memory_is_not_known_one_says_how_much(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="free is not known on this machine: say how much may be used, --memory 4"):
        free_bytes(tmp_path)


def test_the_benchmark_prints_one_object_a_row_and_every_method_is_right() -> None:
    arguments = ["index", "--d", "14336", "--n", "4200", "--batch", "1", "--batch", "2", "--seconds", "0.5", "--json"]
    done = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    rows = json.loads(done.stdout)
    assert all(list(row) == ["d", "n", "batch", "method", "ms", "vs_flat", "recall"] for row in rows)
    lookups = {(row["batch"], row["method"]): row for row in rows if row["vs_flat"] is not None}
    methods = {method for _, method in lookups}
    assert methods == {
        "IndexBinaryFlat",
        "memoir",
        "memoir, 8 edits",
        "memoir, full scan",
        "one read of all codes",
        "int8 matmul",
        "float32 matmul",
        "published, cast per query",
    }
    for (_, method), row in lookups.items():
        assert row["ms"] > 0 and row["recall"] == (None if method.startswith("one read") else 1.0)
    others = {row["method"]: row for row in rows if row["vs_flat"] is None}
    assert set(others) == {"TopHash", "TopHash by topk", "TopHash by stable sort", "append one", "remove one"}
    assert "14336 n=4200: sketch" in done.stderr


def test_the_benchmark_leaves_out_what_does_not_fit_into_memory() -> None:
    arguments = ["index", "--d", "1536", "--n", "1000", "--n", "100000", "--batch", "1", "--memory", "0.004"]
    done = CliRunner().invoke(bench, [*arguments, "--seconds", "0.1", "--json"], catch_exceptions=False)
    assert {(row["n"], row["method"]) for row in json.loads(done.stdout) if row["vs_flat"]} == {
        (1000, "IndexBinaryFlat"),
        (1000, "memoir"),
        (1000, "memoir, 8 edits"),
        (1000, "memoir, full scan"),
        (1000, "one read of all codes"),
        (1000, "int8 matmul"),
    }
    assert "d=1536 n=100000 is left out: it takes 36 MiB of memory, 4 may be used" in done.stderr
    assert "d=1536 n=1000: no float32 matmuls" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tau", "0"], "tau is 0.0: choose 0 < tau <= 1"),
        (["--d", "100"], "--d is 100: choose a multiple of 64"),
        (["--cpu-time", "--threads", "2"], "--cpu-time counts the work of all threads, and --threads is 2"),
    ],
)
def test_the_benchmark_refuses_what_it_cannot_measure(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CliRunner().invoke(bench, ["index", *arguments], catch_exceptions=False)
