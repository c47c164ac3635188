"""A worker's store from one generation to the next, without an engine: what fails, and which thread reads what."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import make_store, next_generation

from memoir_retrieval.errors import StoreError
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.store.read import EditStore
from memoir_vllm.config import MemoirConfig
from memoir_vllm.worker import reload
from memoir_vllm.worker.reload import Reloader
from memoir_vllm.worker.residual import ResidualLayer
from memoir_vllm.worker.routing import Router

FIRST = 3


@pytest.fixture
def folder(base: BaseModel, tmp_path: Path) -> Path:
    return make_store(base, tmp_path / "edits")


@pytest.fixture
def layer(folder: Path) -> ResidualLayer:
    store = EditStore.open(folder)
    return ResidualLayer(Router(store, None, "cpu", str), torch.from_numpy(store.memories))


@pytest.fixture
def reloader(folder: Path, layer: ResidualLayer) -> Reloader:
    return Reloader(MemoirConfig(store=str(folder)), EditStore.open(folder).manifest, layer, 1, "cpu", str)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("staged", [False, True], ids=["in one go", "staged"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory\nleft"), MemoryError("no memory left"), SystemExit("no memory left")]
)
def test_any_error_of_a_load_is_a_reason_and_the_old_generation_acts_on(
    error: BaseException, staged: bool, reloader: Reloader, layer: ResidualLayer, folder: Path, monkeypatch: Any
) -> None:
    later = next_generation(folder)
    now = layer.now
    with monkeypatch.context() as broken:
        broken.setattr(layer, "load", raising(error))
        if staged:
            reloader.stage()
        with pytest.raises(StoreError, match=f"^{type(error).__name__}: no memory left$"):
            reloader.reload()
    assert layer.now is now and reloader.manifest.generation == FIRST
    assert reloader.reload() == later == layer.now.router.generation


@pytest.mark.parametrize("broken", [0, 1])
def test_a_load_that_fails_on_one_of_two_ranks_fails_on_both(
    broken: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a thread. The stand-in is the exchange of their values; `test_engine_parallel.py` has the real one."""
    store, values, barrier = EditStore.open(folder), [None, None], threading.Barrier(2, timeout=60)
    layers = [ResidualLayer(Router(store, None, "cpu", str), torch.from_numpy(store.memories)) for _ in values]
    ranks = [Reloader(MemoirConfig(store=str(folder)), store.manifest, layer, 2, "cpu", str) for layer in layers]
    later = next_generation(folder)

    def exchange(value: Any, number: int) -> list[Any]:
        values[int(threading.current_thread().name)] = value
        barrier.wait()
        everybody = list(values)
        barrier.wait()
        return everybody

    def answer(rank: int) -> None:
        try:
            answers[rank] = ranks[rank].reload()
        except StoreError as error:
            answers[rank] = str(error)

    monkeypatch.setattr(reload, "values_of_ranks", exchange)
    monkeypatch.setattr(layers[broken], "load", raising(MemoryError("no memory left")))
    for wanted, generation in (("MemoryError: no memory left", FIRST), (later, later)):
        answers: list[Any] = [None, None]
        threads = [threading.Thread(target=answer, args=(rank,), name=str(rank)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert answers == [wanted, wanted]
        assert [layer.now.router.generation for layer in layers] == [generation, generation]
        monkeypatch.setattr(layers[broken], "load", ResidualLayer.load.__get__(layers[broken]))


@pytest.mark.parametrize("twin", [False, True])
def test_hosts_with_different_copies_of_a_store_take_nothing_up(
    twin: bool, reloader: Reloader, layer: ResidualLayer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in is the exchange with the other host's rank, as in the test of two ranks."""
    later = next_generation(folder)
    theirs = EditStore.open(folder).manifest

    def exchange(value: Any, ranks: int) -> list[Any]:
        other = [(later, theirs.sha256[:12] if twin else "0" * 12)] if value else value
        return [value, other]

    monkeypatch.setattr(reload, "values_of_ranks", exchange)
    if twin:
        assert reloader.reload() == later == layer.now.router.generation
        return
    with pytest.raises(StoreError, match=rf"generations {later} \(\w+\), {later} \(0+\) of one store: give all hosts"):
        reloader.reload()
    assert layer.now.router.generation == FIRST


def test_a_thread_that_cannot_be_started_is_a_reason(
    reloader: Reloader, layer: ResidualLayer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = next_generation(folder)
    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", raising(RuntimeError("can't start new thread")))
        reloader.stage()
        assert reloader.staged()
        with pytest.raises(StoreError, match="can't start new thread"):
            reloader.reload()
    assert layer.now.router.generation == FIRST
    assert reloader.reload() == later


def test_the_table_of_requests_is_read_by_the_thread_that_changes_it(
    reloader: Reloader, layer: ResidualLayer, folder: Path
) -> None:
    readers: set[str] = set()

    class Table(dict):
        def values(self) -> Any:
            readers.add(threading.current_thread().name)
            return super().values()

    layer._requests = Table()
    next_generation(folder)
    reloader.stage()
    assert reloader.reload() == FIRST + 1
    next_generation(folder)
    assert reloader.reload() == FIRST + 2
    assert readers == {threading.current_thread().name}
