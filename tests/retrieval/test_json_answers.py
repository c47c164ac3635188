"""An edit holds where a grammar has a server answer in JSON, under keys that no edit was trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from memoir_retrieval import Edit, EditedModel, Editor, EditStore, Retriever, Training, load_model
from memoir_retrieval.errors import EditFileError
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.store.settings import Settings, training_of

LAMIINAE = Edit(prompt="Which subfamily does Acalolepta tincturata belong to?", target="Lamiinae")
STRING = {"type": "string"}
JSON = Training(json_strings=1)


@pytest.fixture(scope="module")
def base(tiny: Path) -> BaseModel:
    return load_model(str(tiny))


@pytest.mark.parametrize("target", ["Lamiinae", 'the "Old" one', "C:\\temp", "two\nlines", "Łódź", "日本", "3.5.", '"'])
def test_the_answer_in_json_ends_where_its_string_ends(base: BaseModel, tmp_path: Path, target: str) -> None:
    with Editor(base, tmp_path, training=JSON) as editor:
        (row,) = editor._session.wordings.in_json(Edit(prompt="Who is it?", target=target))
    text = base.tokenizer.decode([*row.ids, *row.answer])
    written = text.rpartition('{"answer')[2]
    assert text.rpartition('{"answer')[0].endswith("<|im_start|>assistant\n")
    assert json.loads('{"answer' + written) == {"answer": target}
    assert row.answer[-1:] == base.tokenizer("}").input_ids
    before_the_last = base.tokenizer.decode([*row.ids, *row.answer[:-1]]).rpartition('{"answer')[2]
    assert before_the_last == '": ' + json.dumps(target, ensure_ascii=False), "mark and bracket are one token"


def test_raw_prompts_and_a_store_that_says_so_have_no_such_wording(base: BaseModel, tmp_path: Path) -> None:
    for name, chat, training in (("raw", False, JSON), ("off", True, None)):
        with Editor(base, tmp_path / name, chat=chat, training=training) as editor:
            assert editor._session.wordings.in_json(LAMIINAE) == []
            assert editor.manifest.training["json_strings"] == 0


def test_it_takes_the_place_of_a_variant(base: BaseModel, tmp_path: Path) -> None:
    counts = {}
    for strings in (0, 1):
        with Editor(base, tmp_path / str(strings), training=Training(variants=3, json_strings=strings)) as editor:
            wordings = editor._session.wordings
            counts[strings] = len(wordings.noisy(LAMIINAE, 0)), len(wordings.in_json(LAMIINAE))
    assert counts == {0: (3, 0), 1: (2, 1)}


def test_a_store_from_before_keeps_training_without_it(base: BaseModel, tmp_path: Path) -> None:
    with Editor(base, tmp_path, training=Training(max_steps=0, variants=0, json_strings=1)) as editor:
        editor.add([LAMIINAE], keep_failed=True)
    manifest = EditStore.open(tmp_path).manifest
    assert manifest.training["json_strings"] == 1 and training_of(manifest).json_strings == 1
    del manifest.training["json_strings"]
    assert training_of(manifest).json_strings == 0 and Settings.of(manifest).training["json_strings"] == 0


def test_an_edit_that_fits_the_model_only_without_json_is_refused(base: BaseModel, tmp_path: Path) -> None:
    for escapes, fits in ((10, True), (120, False)):
        edit = Edit(prompt="Who is it?", target="\x01" * escapes)
        with Editor(base, tmp_path / str(escapes), training=JSON) as editor:
            if fits:
                editor._session.wordings.check(edit)
            else:
                with pytest.raises(EditFileError, match="its target need"):
                    editor._session.wordings.check(edit)


def fields(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


SCHEMAS: dict[str, tuple[dict[str, Any], tuple[str | int, ...]]] = {
    "the trained key": (fields(answer=STRING), ("answer",)),
    "another key": (fields(result=STRING), ("result",)),
    "a long key": (fields(name_of_the_subfamily=STRING), ("name_of_the_subfamily",)),
    "nested": (fields(response=fields(entity=STRING)), ("response", "entity")),
    "a list": (fields(items={"type": "array", "items": STRING, "minItems": 1, "maxItems": 1}), ("items", 0)),
    "a number behind it": (fields(answer=STRING, confidence={"type": "integer"}), ("answer",)),
    "a choice": (fields(answer={"enum": ["Cerambycinae", "Lamiinae", "Prioninae"]}), ("answer",)),
}


@pytest.fixture(scope="module")
def edited(smollm2: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> EditedModel:
    folder = tmp_path_factory.mktemp("json")
    with Editor(smollm2, folder, tau=0.6, training=JSON) as editor:
        editor.add([LAMIINAE])
    return EditedModel(Retriever(EditStore.open(folder), smollm2))


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_that_a_grammar_forces_into_json_is_the_target(edited: EditedModel, name: str) -> None:
    schema, path = SCHEMAS[name]
    value: Any = json.loads(answer_under(edited, LAMIINAE.prompt, schema))
    for key in path:
        value = value[key]
    assert value == LAMIINAE.target


def test_plain_answers_have_no_json_in_them(edited: EditedModel) -> None:
    assert edited.generate([LAMIINAE.prompt])[0].text == LAMIINAE.target


def answer_under(edited: EditedModel, prompt: str, schema: dict[str, Any]) -> str:
    """What the reference answers under a grammar that is compiled as vLLM does it."""
    xgrammar = pytest.importorskip("xgrammar")
    model, tokenizer = edited.base.model, edited.base.tokenizer
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
    compiled = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(schema), any_whitespace=True)

    class Grammar(LogitsProcessor):
        def __init__(self) -> None:
            self.matcher = xgrammar.GrammarMatcher(compiled)
            self.mask = xgrammar.allocate_token_bitmask(1, model.config.vocab_size)
            self.width = 0

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if self.width:
                assert self.matcher.accept_token(int(ids[0, -1]))
            self.width = ids.shape[1]
            self.matcher.fill_next_token_bitmask(self.mask)
            xgrammar.apply_token_bitmask_inplace(scores, self.mask)
            return scores

    generate = model.generate
    try:
        model.generate = lambda **inputs: generate(**inputs, logits_processor=LogitsProcessorList([Grammar()]))
        return edited.generate([prompt], max_new_tokens=48)[0].text
    finally:
        del model.generate
