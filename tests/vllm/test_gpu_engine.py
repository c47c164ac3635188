"""An engine on a GPU, in bfloat16, eager and with CUDA graphs, against the reference on the same GPU.

pytest -m gpu tests
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import Engine, flags

from memoir_retrieval.background import unrelated_prompts
from memoir_retrieval.editing.editor import Editor
from memoir_retrieval.edits.files import read_edits
from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.lookup.retriever import Retriever
from memoir_retrieval.model.base import load_model
from memoir_retrieval.question.prompts import end_token
from memoir_retrieval.store.read import EditStore

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

EXAMPLE = Path(__file__).parents[2] / "examples" / "zsre-100.jsonl"
ROOM = {"dtype": "bfloat16", "gpu_memory_utilization": 0.4}
TOKENS = 12


@pytest.fixture(scope="module")
def reference(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> EditedModel:
    """Eight edits that were trained there."""
    base = load_model(str(model_folder), dtype="bfloat16", device="cuda")
    folder = tmp_path_factory.mktemp("gpu") / "store"
    with Editor(base, folder) as editor:
        editor.add(read_edits(EXAMPLE)[:8])
        assert not editor.outcome.failed
    return EditedModel(Retriever(EditStore.open(folder), base))


@pytest.mark.parametrize("graphs", ["NONE", "PIECEWISE", "FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"])
def test_answers_are_the_references_and_others_keep_their_bits(
    graphs: str,
    reference: EditedModel,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    store = reference.retriever.store
    texts = [text for pair in zip((e.prompt for e in store.edits), unrelated_prompts(), strict=False) for text in pair]
    prompts = [reference.prompt_ids(text) for text in texts]
    how = {"max_tokens": TOKENS, "ignore_eos": True}  # so that every step has the same rows, whatever is answered
    eager, opt_out = graphs == "NONE", [{"memoir": "off"}]
    chosen = {} if eager else {"compilation_config": {"cudagraph_mode": graphs}}
    replies = []
    for served in (None, store.path):
        engine = Engine(**flags(model_folder, served, enforce_eager=eager, **chosen, **ROOM))
        try:
            replies.append(engine.ask(prompts, **how))
            if served:
                others = prompts[1::2]
                replayed = engine.stats()["replayed"]
                assert (replayed > 0) == graphs.startswith("FULL"), "edits act in full graphs"
                off = engine.ask(prompts, opt_out * len(prompts), **how)
                unrelated = [engine.ask(others, option, **how) for option in (None, opt_out * len(others))]
        finally:
            engine.close()
    without, edited = replies
    end = end_token(reference.base.tokenizer)
    for i in range(0, len(texts), 2):
        (wanted,) = reference.generate([prompts[i]], max_new_tokens=TOKENS)
        answer = [token for token in wanted.tokens if token != end]
        assert edited[i].memoir["edit"] == i // 2 == wanted.edit, texts[i]
        assert edited[i].tokens[: len(answer)] == answer, texts[i]
    for i in range(1, len(texts), 2):
        assert edited[i].memoir["edit"] is None, texts[i]
        if not graphs.startswith("FULL"):  # else an edited neighbour takes the step off the full graph
            assert (edited[i].tokens, edited[i].logprobs) == (off[i].tokens, off[i].logprobs), texts[i]
    for asked_for, opted_out in zip(*unrelated, strict=True):
        assert (asked_for.tokens, asked_for.logprobs) == (opted_out.tokens, opted_out.logprobs)
    if eager:  # compiled, the op splits a graph that Inductor fuses without it
        for opted_out, other, edit in zip(off, without, edited, strict=True):
            assert (opted_out.tokens, opted_out.logprobs) == (other.tokens, other.logprobs)
            assert edit.memoir["edit"] is not None or edit.logprobs == other.logprobs
