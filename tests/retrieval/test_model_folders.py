"""Folders of models that are damaged, or not what they seem: refused in one line, whatever the libraries raise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_models import save_llama

from memoir_retrieval.errors import ModelError
from memoir_retrieval.model.base import identify, load_model, load_tokenizer, resolve
from memoir_retrieval.model.embedded import get_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n"
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "a model with spaces"
    get_model("smollm2-135m")
    save_llama(folder, resolve("smollm2-135m"), **SHAPE)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "model")
    return tmp_path / "model"


def configured(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def with_own_code(folder: Path) -> None:
    configured(folder, model_type="ours", auto_map={"AutoConfig": "ours.Config", "AutoModelForCausalLM": "ours.Model"})
    (folder / "ours.py").write_text("raise SystemExit('it was run')")


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights are a pointer": (lambda f: (f / "model.safetensors").write_bytes(POINTER), "run `git lfs pull` in"),
    "a tokenizer is a pointer": (lambda f: (f / "tokenizer.json").write_bytes(POINTER), "run `git lfs pull` in"),
    "weights are cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "cannot be loaded: .*header",
    ),
    "weights are empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be loaded: .*header"),
    "more layers than weights": (
        lambda f: configured(f, num_hidden_layers=4),
        "do not fit its config.json: 18 tensors are missing or of another size, such as model.layers.2.",
    ),
    "another width": (lambda f: configured(f, intermediate_size=48), "6 tensors are missing or of another size"),
    "a part that is not installed": (
        lambda f: configured(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "cannot be loaded: Loading a GPTQ quantized model requires",
    ),
    "code of its own": (with_own_code, "code of its own, which is not run here"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "the tokenizer of .* cannot be loaded"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_cannot_be_loaded_is_refused_in_one_line(name: str, folder: Path) -> None:
    spoil, message = BROKEN[name]
    spoil(folder)
    with pytest.raises(ModelError, match=message) as refused:
        load_model(folder)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)


def test_a_sound_folder_is_loaded(sound: Path) -> None:
    assert load_model(sound).d == SHAPE["intermediate_size"]
    assert load_tokenizer(sound).decode(load_tokenizer(sound)("Who is it?").input_ids) == "Who is it?"


def test_a_configuration_that_was_saved_again_is_the_same(folder: Path) -> None:
    """transformers writes the dtype and its version into the configuration of each tower, too."""
    tower = {"hidden_size": 32, "rope_parameters": {"rope_theta": 1e4}}
    digests = []
    for more in ({}, {"dtype": "bfloat16", "transformers_version": "5.19.0"}, {"hidden_size": 48}):
        configured(folder, text_config=tower | more, **more)
        digests.append(identify(folder, "model.layers.1.mlp.down_proj").config)
    assert digests[0] == digests[1] != digests[2]
