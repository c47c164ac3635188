"""A small random model with the real tokenizer: a stand-in where only speed matters, not what the model says."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_models import save_llama

from memoir_retrieval.model.embedded import get_model


def save_tiny(folder: Path, seed: int) -> Path:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    save_llama(folder, get_model("smollm2-135m"), seed, scale=50, **shape)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the small model."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", seed=0)


@pytest.fixture(scope="session")
def other_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same shape with other weights."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "other", seed=1)
