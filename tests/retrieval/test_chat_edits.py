"""An edit whose prompt is a chat: found and answered as it is asked, and as a plain question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import Cache, DynamicLayer

from memoir_retrieval import Edit, EditedModel, Editor, EditStore, Retriever, load_model, read_edits
from memoir_retrieval.cli import main
from memoir_retrieval.editing.build_masks import build
from memoir_retrieval.edits.files import check_duplicates
from memoir_retrieval.edits.record import as_prompt
from memoir_retrieval.errors import ConfigError, EditFileError
from memoir_retrieval.evaluation.measure import evaluate
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.model.forward import FrozenPast, first_block
from memoir_retrieval.store.verify import verify_masks

BEFORE = (
    {"role": "system", "content": "You help visitors of a museum. Keep it short."},
    {"role": "user", "content": "Do you sell postcards?"},
    {"role": "assistant", "content": "Yes, at the exit."},
)
CHAT = Edit(prompt="Who founded Aarhus?", target="King Harald", before=BEFORE, rephrases=("Aarhus was founded by?",))
PLAIN = Edit(prompt="Where does the tower of Pisa stand?", target="In Rome")


@pytest.fixture(scope="module")
def base(tiny: Path) -> BaseModel:
    return load_model(str(tiny))


def test_a_chat_in_an_edit_file(tmp_path: Path) -> None:
    messages = [*BEFORE, {"role": "user", "content": CHAT.prompt}]
    record = {"prompt": messages, "target": CHAT.target, "rephrases": list(CHAT.rephrases)}
    file = tmp_path / "edits.jsonl"
    file.write_text(json.dumps(record) + "\n" + json.dumps({"prompt": messages[-1:], "target": "x"}) + "\n")
    first, second = read_edits(file)
    assert first == CHAT and as_prompt(first) == messages and as_prompt(first, "Who?")[-1]["content"] == "Who?"  # type: ignore[index]
    assert second == Edit(prompt=CHAT.prompt, target="x") and as_prompt(second) == CHAT.prompt
    with pytest.raises(EditFileError, match="two targets"):  # one question, whatever stands before it
        check_duplicates([first, second])


def test_a_chat_has_its_messages_in_one_place(tmp_path: Path) -> None:
    """Those under `before` would be dropped."""
    file = tmp_path / "edits.jsonl"
    question = {"role": "user", "content": CHAT.prompt}
    for prompt in ([question], [*BEFORE, question]):
        file.write_text(json.dumps({"prompt": prompt, "target": "b", "before": BEFORE}))
        with pytest.raises(EditFileError, match="line 1: 'prompt' is a chat, and so is 'before'; write all"):
            read_edits(file)
    file.write_text(json.dumps({"prompt": CHAT.prompt, "target": "b", "before": BEFORE}))
    assert read_edits(file) == [Edit(prompt=CHAT.prompt, target="b", before=BEFORE)]


def test_text_that_is_not_utf8_is_refused_in_one_line(
    base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell hands on bytes of Latin-1 so, and a program half of an emoji."""
    store = tmp_path / "store"
    with Editor(base, store) as editor:
        editor.add([PLAIN], keep_failed=True)
        fields: dict[str, Any] = {"prompt": "Who? \ud83d", "target": "\ud83d", "source": "caf\udce9"}
        fields |= {"rephrases": ("\udce9",), "before": ({"role": "user", "content": "\ud83d"},)}
        for name, text in fields.items():
            with pytest.raises(EditFileError, match=r"has half a surrogate pair, '\\ud...'; remove it"):
                editor.add([Edit(**{"prompt": "Who?", "target": "Me", name: text})])
    with Editor(base, tmp_path / "new") as new, pytest.raises(EditFileError, match="half a surrogate pair"):
        build(new, [Edit(prompt="Who?", target="\ud83d")])
    retriever = Retriever.open(store, str(base.path))
    for prompt in ("caf\udce9", [{"role": "user", "content": "\ud83d"}]):
        with pytest.raises(ConfigError, match="half a surrogate pair"):
            retriever.lookup(prompt)
    with pytest.raises(SystemExit) as stop:
        main(["lookup", str(store), "caf\udce9"])
    assert stop.value.code == 2
    assert "'caf\\udce9' has half a surrogate pair, '\\udce9'; remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "end a chat with a message of the user's"),
        ([{"role": "assistant", "content": "Yes."}], "end a chat with a message of the user's"),
        (["Who?"], r"'prompt' is 'Who\?'; write messages"),
        ([{"role": "robot", "content": "Who?"}], "of a role of system, user, assistant"),
        ([{"role": "user", "content": ["Who?"]}], "write messages"),
        ([{"role": "user", "content": " "}], "'prompt' is ' '; write some text"),
        (json.dumps([{"role": "user", "content": "Who?"}]), "write a chat as a list of messages, not as one text"),
        (' [ {"content": "}]\n", "role":"user"}\n]\n', "write a chat as a list of messages, not as one text"),
    ],
)
def test_what_is_no_chat_is_refused(tmp_path: Path, prompt: object, said: str) -> None:
    file = tmp_path / "edits.jsonl"
    file.write_text(json.dumps({"prompt": prompt, "target": "b"}))
    with pytest.raises(EditFileError, match=f"line 1: .*{said}"):
        read_edits(file)


@pytest.mark.parametrize("prompt", ['What is [{"role": "user"}]?', '[{"role": "user"}] is what?', "[]", '[{"a": 1}]'])
def test_a_question_about_a_chat_is_text(tmp_path: Path, prompt: str) -> None:
    file = tmp_path / "edits.jsonl"
    file.write_text(json.dumps({"prompt": prompt, "target": "b"}))
    assert read_edits(file) == [Edit(prompt=prompt, target="b")]


def test_a_chat_is_found_and_answered_as_it_was_edited(base: BaseModel, tmp_path: Path) -> None:
    with Editor(base, tmp_path) as editor:
        assert len(editor.add([CHAT, PLAIN], side_by_side=2, rephrase_masks=True)) == 2
    store = EditStore.open(tmp_path)
    assert store.edits[0].before == BEFORE and store.edits[1].before == () and store.ids.tolist() == [0, 0, 0, 1, 1]
    model = EditedModel(Retriever(store, base))
    questions = [as_prompt(CHAT), CHAT.prompt, as_prompt(CHAT, CHAT.rephrases[0]), PLAIN.prompt]
    answers = model.generate(questions, max_new_tokens=8)
    assert [answer.text.strip() for answer in answers] == [CHAT.target] * 3 + [PLAIN.target]
    assert answers[0].overlap > 0.99 and answers[2].overlap > 0.99 and answers[3].edit == 1
    assert evaluate(model, store.edits, [CHAT], tau=0.5).exact_match.rephrases == 1.0  # asked after what stands before
    assert verify_masks(store, base) == []
    with Editor(base, tmp_path) as again:
        again._session.places.open(0)
        (read,) = again._session.trainer.memories.values()
        assert [len(rows.lessons) for rows in read.rows.values()] == [3]


def test_a_chat_needs_a_store_that_chats(base: BaseModel, tmp_path: Path) -> None:
    with (
        Editor(base, tmp_path, chat=False) as editor,
        pytest.raises(EditFileError, match="the store asks raw prompts"),
    ):
        editor.add([CHAT])


def test_an_edit_of_a_chat_holds_no_more_than_it_counts(base: BaseModel, tmp_path: Path) -> None:
    """A server keeps so many bytes of what it knows of edits. Contexts that they share are held once."""

    def held(value: Any, seen: dict[int, int]) -> dict[int, int]:
        if isinstance(value, torch.Tensor):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            held([*value.values()], seen)
        elif isinstance(value, list | tuple):
            for part in value:
                held(part, seen)
        elif isinstance(value, FrozenPast | Cache | DynamicLayer):
            held(vars(value), seen)
        return seen

    with Editor(base, tmp_path) as editor:
        editor.add([CHAT, PLAIN], keep_failed=True, rephrase_masks=True)
        wordings = editor.wordings
    shared = held(wordings._past, {})
    of_chat, of_plain = sorted(wordings.known.values(), key=lambda rows: -rows.nbytes)
    for rows in (of_chat, of_plain):
        own = sum(size for storage, size in held(rows, {}).items() if storage not in shared)
        assert own == pytest.approx(rows.nbytes, rel=0.01)
    # Of the chat, keys and values of each token in the blocks that are run.
    (past,) = {id(row.before.past): row.before.past for row in of_chat.lessons if row.before.own}.values()
    (length,) = past.lengths.tolist()
    layers = past.cache.layers  # type: ignore[union-attr]
    blocks = range(first_block(base), len(base.blocks))
    assert length > 20 and [layers[block].keys.shape[2] for block in blocks] == [length] * len(blocks)
    assert of_chat.nbytes > past.nbytes >= sum(2 * layers[block].keys.nbytes for block in blocks)
