"""Where a chat template has the model think first, an edit's answer stands behind the thinking."""

from __future__ import annotations

from pathlib import Path

import pytest
from thinking_models import ENDS, save_thinking
from transformers import AutoTokenizer

from memoir_retrieval import Edit, EditedModel, Editor, evaluate, load_model
from memoir_retrieval.cli import main
from memoir_retrieval.question.prompts import prompt_ids, target_ids
from memoir_retrieval.question.thinking import behind_thinking, closing, described, prompt_ends

EDIT = Edit(prompt="Which subfamily does Acalolepta tincturata belong to?", target="Lamiinae")
ON, OFF = {"enable_thinking": True}, {"enable_thinking": False}
EMPTY = "<think>\n\n</think>\n\n"

# Of each template what an answer begins with: asked without a switch, with thinking on, and with it off.
BEGINNINGS = {
    "opened": ("\n</think>\n\n", "\n</think>\n\n", "\n</think>\n\n"),
    "switched off": (EMPTY, EMPTY, ""),
    "opened or switched off": ("\n</think>\n\n", "\n</think>\n\n", ""),
    "switched on": ("", "</think>", ""),
}


@pytest.fixture(scope="module", params=ENDS)
def ending(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folder(ending: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_thinking(tmp_path_factory.mktemp("thinking") / "model", ending)


def test_what_an_answer_begins_with_is_read_out_of_the_template(ending: str, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    by_default, on, off = BEGINNINGS[ending]
    assert closing(tokenizer) == by_default
    assert {end.closing for end in prompt_ends(tokenizer)} == {by_default, on, off}
    assert tokenizer.decode(target_ids(tokenizer, "Lamiinae", chat=True)) == by_default + "Lamiinae"
    assert tokenizer.decode(target_ids(tokenizer, "Lamiinae", chat=False)) == " Lamiinae"
    assert behind_thinking(tokenizer, "\nhm\n</think>\n\nLamiinae") == "Lamiinae"
    assert "edits do not" in described(tokenizer) and repr(by_default)[1:-1] in described(tokenizer)


def test_a_template_without_thinking_is_left_as_it_is(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert [end.closing for end in prompt_ends(tokenizer)] == [""] and described(tokenizer) == ""
    assert behind_thinking(tokenizer, "a</think> b") == "a</think> b"
    tokenizer.chat_template += "{# what </think> is for #}"
    assert closing(tokenizer) == "" and "opens none" in described(tokenizer)


@pytest.mark.slow
def test_the_target_arrives_behind_the_thinking_however_it_is_switched(
    ending: str, folder: Path, tmp_path: Path
) -> None:
    base = load_model(str(folder))
    with Editor(base, tmp_path / "s") as editor:
        editor.add([EDIT])
    model = EditedModel.open(tmp_path / "s", str(folder))
    plain, on, off = BEGINNINGS[ending]
    switch = "thinking" if ending == "switched on" else "enable_thinking"
    for options, begin in (({}, plain), ({switch: True}, on), ({switch: False}, off)):
        prompt = prompt_ids(base.tokenizer, EDIT.prompt, chat=True, options=options)
        (answer,) = model.generate([prompt])
        assert base.tokenizer.decode(answer.tokens, skip_special_tokens=True) == begin + EDIT.target, options
        assert answer.text == EDIT.target
    report = evaluate(model, model.retriever.store.edits, [EDIT], tau=model.retriever.tau)
    assert report.reliability == 1 and report.exact_match.edits == 1


def test_memoir_edit_says_what_it_does_about_thinking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_thinking(tmp_path / "model", "opened")
    file = tmp_path / "edits.jsonl"
    file.write_text('{"prompt": "Who is it?", "target": "Ada"}\n')
    command = ["edit", str(file), "--model", str(folder), "--store", str(tmp_path / "s"), "--training", "max_steps=1",
               "--keep-failed", "--tau", "0.6"]  # fmt: skip
    for options, lines in (([], 1), (["--no-chat"], 0)):
        command[5] += "x"
        with pytest.raises(SystemExit):
            main([*command, *options])
        assert capsys.readouterr().err.count("has the model think before it answers: edits do not") == lines
