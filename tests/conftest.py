"""What all tests share: the embedded model, loaded once, and threads that do not fight each other."""

from __future__ import annotations

import pytest
import torch

from memoir_retrieval.embedded import get_model
from memoir_retrieval.model import BaseModel, load_model


@pytest.fixture(scope="session")
def smollm2() -> BaseModel:
    """SmolLM2-135M-Instruct in float32, ready for editing."""
    torch.set_num_threads(2)
    get_model("smollm2-135m")
    return load_model("smollm2-135m")
