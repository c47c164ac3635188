"""The store that the engines of these tests serve, the Hugging Face answers that they must give, and schedulers driven
by hand."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from engines import (
    LAYER,
    MAX_MODEL_LEN,
    Engine,
    Expected,
    answers,
    flags,
    make_store,
    small_model,
    small_store,
)
from simulation import RULE, Simulate, Simulation, World, world
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs

from memoir_retrieval.errors import ModelError
from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.model.base import BaseModel, load_model, resolve
from memoir_retrieval.question.span import SpanRule
from memoir_retrieval.store.read import EditStore
from memoir_vllm.core.scheduler import MemoirAsyncScheduler, MemoirScheduler
from memoir_vllm.worker.residual import ResidualLayer
from memoir_vllm.worker.routing import Router


@pytest.fixture(scope="session")
def model_folder() -> Path:
    try:
        return resolve(os.environ.get("MEMOIR_TEST_MODEL", "smollm2-135m"))
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def base(model_folder: Path) -> BaseModel:
    return load_model(str(model_folder), layer=LAYER)


@pytest.fixture(scope="session")
def store_folder(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(base, tmp_path_factory.mktemp("store") / "edits")


@pytest.fixture(scope="session")
def store(store_folder: Path) -> EditStore:
    return EditStore.open(store_folder)


@pytest.fixture(scope="session")
def small(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "model"
    small_model(folder, model_folder)
    return folder


@pytest.fixture(scope="session")
def small_edits(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_store(small, tmp_path_factory.mktemp("store") / "small")


@pytest.fixture(scope="session")
def small_expected(small_edits: Path, small: Path) -> dict[str, Expected]:
    return answers(EditedModel.open(small_edits, str(small)))


@pytest.fixture(scope="session")
def expected(store_folder: Path, model_folder: Path) -> dict[str, Expected]:
    return answers(EditedModel.open(store_folder, str(model_folder)))


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Engine]]:
    """Starts engines that live until the module's tests are done."""
    engines: list[Engine] = []

    def start_one(**engine_flags: Any) -> Engine:
        engines.append(Engine(**engine_flags))
        return engines[-1]

    yield start_one
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def here() -> World:
    return world()


class Steps(NamedTuple):
    """How steps follow each other: whether scheduling is asynchronous; stages of a pipeline; how many steps are in
    flight while one is scheduled; whether it is as for the model runner V2."""

    later: bool
    stages: int = 1
    lag: int = 0
    v2: bool = False


STEPS = {
    "sync": Steps(False),
    "async": Steps(True, lag=1),
    "pipeline": Steps(False, stages=2, lag=1),
    "async pipeline": Steps(True, stages=2, lag=2, v2=True),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if how.stages > 1 else ()) for name, how in STEPS.items()],
)
def simulate(request: pytest.FixtureRequest, here: World, model_folder: Path, store_folder: Path) -> Simulate:
    """Starts a scheduler and its worker. The budget of a step is 64 tokens."""
    how = STEPS[request.param]
    configs: dict[tuple[int, ...], Any] = {}

    def start_one(
        *,
        kv_blocks: int = 200,
        budget: int = 64,
        seqs: int = 40,
        block: int = 16,
        model_len: int = MAX_MODEL_LEN,
        rule: SpanRule = RULE,
        served: World = here,
        host_blocks: int = 0,
        policy: str = "fcfs",
        chunk: int = 0,
    ) -> Simulation:
        sizes = {"block_size": block, "max_num_batched_tokens": budget, "max_num_seqs": seqs}
        given = flags(model_folder, store_folder, **sizes) | {"max_model_len": model_len}
        key = (budget, seqs, block, model_len)
        if key not in configs:  # most of a test's time otherwise: the store is read and checked
            configs[key] = EngineArgs(**given).create_engine_config()
        config = copy.deepcopy(configs[key])
        config.scheduler_config.async_scheduling = how.later
        config.scheduler_config.policy = policy
        config.scheduler_config.long_prefill_token_threshold = chunk
        config.parallel_config.pipeline_parallel_size = how.stages
        if host_blocks:
            size = {"cpu_bytes_to_use": host_blocks * 4096}
            config.kv_transfer_config = KVTransferConfig(
                kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=size
            )
        config.additional_config |= {
            "memoir_stores": {
                "": {"span": msgspec.to_builtins(rule), "chat": served.store.manifest.chat, "adapter": ""}
            },
        }
        manifest = SimpleNamespace(**vars(served.store.manifest) | {"span": rule})
        layer = ResidualLayer(
            Router(dataclasses.replace(served.store, manifest=manifest), None, "cpu", str),
            torch.from_numpy(served.store.memories),
        )
        kind = MemoirAsyncScheduler if how.later else MemoirScheduler
        return Simulation.start(kind, config, layer, served.embedding, blocks=kv_blocks, lag=how.lag, v2=how.v2)

    return start_one
