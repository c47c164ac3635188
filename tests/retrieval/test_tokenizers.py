"""A tokenizer that transformers reads in another way than its file says must not be edited with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_models import save_llama

from memoir_retrieval.errors import ModelError
from memoir_retrieval.model.base import load_model
from memoir_retrieval.model.embedded import get_model

SHAPE = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "CodeLlamaTokenizer"])
def test_a_tokenizer_that_loses_spaces_is_refused(tmp_path: Path, name: str) -> None:
    save_llama(tmp_path, get_model("smollm2-135m"), **SHAPE)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"tokenizer_class": name}))
    with pytest.raises(ModelError, match=r'Tokenizer, which loses the spaces .*"PreTrainedTokenizerFast"'):
        load_model(tmp_path, layer=1)
    file.write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    tokenizer = load_model(tmp_path, layer=1).tokenizer
    assert tokenizer.decode(tokenizer.encode("who is it")) == "who is it"
