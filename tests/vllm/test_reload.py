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
