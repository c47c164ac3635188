"""The store that the engines of these tests serve, and the Hugging Face answers that they must give."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import LAYER, NEW_TOKENS, PROMPTS, Engine, Expected, make_store

from memoir_retrieval.errors import ModelError
from memoir_retrieval.model import BaseModel, load_model, resolve
from memoir_retrieval.reference import EditedModel
from memoir_retrieval.store import EditStore


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
def expected(store_folder: Path, model_folder: Path) -> dict[str, Expected]:
    """One prompt at a time, in float32: what every engine here must reproduce token for token."""
    model = EditedModel.open(store_folder, str(model_folder))
    found = {}
    for name, prompt in PROMPTS.items():
        ids = model.prompt_ids(prompt)
        edited, plain = (
            model.generate([ids], max_new_tokens=NEW_TOKENS, edited=on, batch_size=1)[0] for on in (True, False)
        )
        found[name] = Expected(ids, list(edited.tokens), list(plain.tokens), edited.edit, edited.overlap)
    return found


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
