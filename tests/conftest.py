"""What all tests share: the embedded model, loaded once, and threads that do not fight each other."""

from __future__ import annotations

import os

import pytest
import torch

from memoir_retrieval.model.base import BaseModel, load_model
from memoir_retrieval.model.embedded import get_model


@pytest.fixture(scope="session")
def smollm2() -> BaseModel:
    """SmolLM2-135M-Instruct in float32, ready for editing."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    get_model("smollm2-135m")
    return load_model("smollm2-135m")
