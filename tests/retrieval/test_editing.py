"""From edits to answers on the real model: what is edited changes, everything else keeps its bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memoir_retrieval import Edit, EditedModel, Editor, EditStore, Probe, Retriever, evaluate, read_edits
from memoir_retrieval.background import chat_contexts
from memoir_retrieval.editing.contexts import PREFIX_TOKENS, own_prefixes
from memoir_retrieval.errors import ConfigError, EditFileError, StoreError, StoreMismatch
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.question.span import find_span
from memoir_retrieval.store.settings import Training

EXAMPLES = Path(__file__).parents[2] / "examples" / "zsre-100.jsonl"
UNRELATED = ["how do I boil an egg", "what is the capital of France", "Write a short poem about rain."]
SYSTEM = {"role": "system", "content": "You help visitors of a museum. Keep it short and friendly."}
TURNS = [{"role": "user", "content": "Do you sell postcards?"}, {"role": "assistant", "content": "Yes, at the exit."}]


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    return read_edits(EXAMPLES)[:4]


@pytest.fixture(scope="module", params=["raw", "chat"])
def edited(
    request: pytest.FixtureRequest, smollm2: BaseModel, edits: list[Edit], tmp_path_factory: pytest.TempPathFactory
) -> EditedModel:
    folder = tmp_path_factory.mktemp("store") / request.param
    with Editor(smollm2, folder, chat=request.param == "chat", tau=0.53) as editor:
        assert len(editor.add(edits)) == 4
    return EditedModel(Retriever(EditStore.open(folder), smollm2))


def test_edited_prompts_are_answered_with_their_targets(edited: EditedModel, edits: list[Edit]) -> None:
    answers = edited.generate([e.prompt for e in edits], max_new_tokens=24)
    assert [a.text.strip() for a in answers] == [e.target for e in edits]
    assert [a.edit for a in answers] == [0, 1, 2, 3]
    assert all(a.overlap > 0.99 for a in answers)
    assert all(a.tokens[-1] == edited.base.tokenizer.eos_token_id for a in answers)


def test_unrelated_prompts_keep_the_bits_of_the_base_model(edited: EditedModel, edits: list[Edit]) -> None:
    """In one batch with edited prompts, whose logits do change."""
    prompts = [*UNRELATED, edits[0].prompt]
    rows = [edited.prompt_ids(p) for p in prompts]
    logits: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for on in (True, False):
        handle = edited.base.model.register_forward_hook(lambda m, a, out, on=on: logits[on].append(out.logits.clone()))
        answers = edited.generate(rows, max_new_tokens=6, edited=on)
        handle.remove()
        assert [a.edit for a in answers[:3]] == [None] * 3
    for on in logits:  # without the one row of what all have in common, which is run before
        logits[on] = [step for step in logits[on] if len(step) == len(prompts)]
    assert all(torch.equal(a[:3], b[:3]) for a, b in zip(logits[True], logits[False], strict=False))
    assert not torch.equal(logits[True][0][3], logits[False][0][3])


def test_tokens_before_those_on_which_an_edit_acts_keep_the_bits_of_the_base_model(
    edited: EditedModel, edits: list[Edit]
) -> None:
    ids = edited.prompt_ids(edits[0].prompt)
    span = find_span(ids, edited.retriever.store.manifest.span)
    first = span.acts_from
    # No template stands behind a raw question, so an edit of one acts on all of it.
    assert first == (len(ids) - 1 if edited.retriever.store.manifest.chat else span.start)
    states: list[torch.Tensor] = []
    handle = edited.base.blocks[-1].register_forward_hook(
        lambda m, a, out: states.append((out[0] if isinstance(out, tuple) else out)[0].clone())
    )
    for on in (True, False):
        edited.generate([ids], max_new_tokens=1, edited=on)
    handle.remove()
    assert torch.equal(states[0][:first], states[1][:first]) and not torch.equal(states[0][first], states[1][first])


def test_a_request_is_answered_the_same_alone_and_in_a_batch(edited: EditedModel, edits: list[Edit]) -> None:
    prompts = [edits[0].prompt, *UNRELATED, edits[1].rephrases[0], edits[2].prompt]
    together = edited.generate(prompts, max_new_tokens=8)
    alone = [edited.generate([p], max_new_tokens=8)[0] for p in prompts]
    assert [a.tokens for a in together] == [a.tokens for a in alone]


@pytest.mark.parametrize(
    ("option", "value"), [("use_cache", False), ("prefill_chunk_size", 4), ("prompt_lookup_num_tokens", 3)]
)
def test_a_model_may_be_published_with_other_ways_to_generate(
    edited: EditedModel, edits: list[Edit], monkeypatch: pytest.MonkeyPatch, option: str, value: object
) -> None:
    """Two prompts that share their beginning, which is run once for both."""
    before = [SYSTEM, *TURNS]
    prompts = [[*before, {"role": "user", "content": text}] for text in (edits[0].prompt, UNRELATED[0])]
    answers = edited.generate(prompts, max_new_tokens=6)
    monkeypatch.setattr(edited.base.model.generation_config, option, value)
    assert [a.tokens for a in edited.generate(prompts, max_new_tokens=6)] == [a.tokens for a in answers]


def test_lookup_tells_the_edit_and_the_runner_up(edited: EditedModel, edits: list[Edit]) -> None:
    retriever = edited.retriever
    match = retriever.lookup(edits[2].prompt)
    assert match is not None and match.id == 2 and match.edit.target == edits[2].target and match.overlap > 0.99
    assert match.runner_up is not None and match.runner_up[0] != 2 and match.runner_up[1] < 0.6
    assert retriever.lookup(UNRELATED[0]) is None
    assert [m.id if m else None for m in retriever.lookup_batch([edits[1].prompt, UNRELATED[1]])] == [1, None]


def test_the_context_of_a_question_does_not_hide_its_edit(edited: EditedModel, edits: list[Edit]) -> None:
    for before in ([SYSTEM], TURNS, [SYSTEM, *TURNS]):
        match = edited.retriever.lookup([*before, {"role": "user", "content": edits[0].prompt}])
        assert match is not None and match.id == 0
        assert edited.retriever.lookup([*before, {"role": "user", "content": UNRELATED[0]}]) is None
    assert edited.retriever.lookup([{"role": "user", "content": ""}]) is None


def test_evaluation_reads_off_what_the_edits_did(edited: EditedModel, edits: list[Edit]) -> None:
    report = evaluate(edited, edited.retriever.store.edits, edits, tau=0.5)
    assert report.edits == 4 and report.reliability == 1.0 and report.exact_match.edits == 1.0
    assert report.match.edits_right == 1.0 and report.match.false_rate == 0.0 and report.locality == 1.0
    nothing = evaluate(
        EditedModel(Retriever(edited.retriever.store, edited.base, tau=1.0)), edited.retriever.store.edits,
        [Edit(prompt=e.prompt, target=e.target, rephrases=e.rephrases) for e in edits], tau=1.0,
    )  # fmt: skip
    assert nothing.match.rephrases_right == 0.0 and nothing.locality is nothing.match.false_rate is None
    with pytest.raises(ConfigError, match="1 of 1 edits of the file are not stored"):
        evaluate(edited, edited.retriever.store.edits, [Edit(prompt="Who?", target="Me")], tau=0.5)


def test_locality_falls_when_an_unrelated_prompt_is_edited(edited: EditedModel, edits: list[Edit]) -> None:
    """The score is not one that cannot fail: here the probe is an edited prompt."""
    probed = Edit(
        prompt=edits[0].prompt,
        target=edits[0].target,
        locality=(Probe(prompt=edits[1].prompt, answer=edits[1].target),),
    )
    report = evaluate(edited, edited.retriever.store.edits, [probed], tau=0.5)
    assert report.match.false_rate == 1.0 and report.locality is not None and report.locality < 1.0


def test_an_interrupted_run_is_resumed_as_if_nothing_had_happened(
    smollm2: BaseModel, edits: list[Edit], tmp_path: Path
) -> None:
    def stop(progress: Any) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with Editor(smollm2, tmp_path / "cut", chat=False, tau=0.6) as editor, pytest.raises(KeyboardInterrupt):
        editor.add(edits, progress=stop)
    assert [e.id for e in EditStore.open(tmp_path / "cut").edits] == [0, 1]
    with Editor(smollm2, tmp_path / "cut") as editor:  # settings come from the store
        assert [e.id for e in editor.add(edits)] == [2, 3]
        assert editor.add(edits) == []
    with Editor(smollm2, tmp_path / "whole", chat=False, tau=0.6) as editor:
        editor.add(edits)
    cut, whole = EditStore.open(tmp_path / "cut"), EditStore.open(tmp_path / "whole")
    np.testing.assert_array_equal(cut.codes, whole.codes)
    assert [e.steps for e in cut.edits] == [e.steps for e in whole.edits]
    np.testing.assert_allclose(cut.memories, whole.memories, atol=1e-3 * np.abs(whole.memories).max())


def test_a_raw_store_is_trained_after_prefixes_of_the_model_itself(edited: EditedModel) -> None:
    manifest = edited.retriever.store.manifest
    if manifest.chat:
        assert manifest.contexts == tuple(chat_contexts()[:1])
        return
    assert (
        manifest.contexts
        == tuple(own_prefixes(edited.base, 1, manifest.seed))
        == tuple(own_prefixes(edited.base, 1, 0))
    )
    texts = [*own_prefixes(edited.base, 3, 1), *own_prefixes(edited.base, 3, 2)]
    assert len({*texts, *manifest.contexts}) == 7
    for text in texts:
        ids = edited.base.tokenizer(text).input_ids
        assert 2 <= len(ids) <= PREFIX_TOKENS + 2 and not set(ids) & set(edited.base.tokenizer.all_special_ids)


def test_a_prompt_stored_with_another_target(smollm2: BaseModel, edits: list[Edit], tmp_path: Path) -> None:
    other = Edit(prompt=f"  {edits[0].prompt}", target="Nobody")
    with Editor(smollm2, tmp_path, chat=False, tau=0.6) as editor:
        editor.add(edits[:2])
        with pytest.raises(EditFileError, match=r"is stored with target .* choose with on_conflict, .first"):
            editor.add([other])
        assert editor.add([other], on_conflict="first") == []
        assert [e.id for e in editor.add([other], on_conflict="last")] == [2]
    store = EditStore.open(tmp_path)
    assert [e.id for e in store.edits] == [1, 2] and store.manifest.next_id == 3
    assert EditedModel(Retriever(store, smollm2)).generate([edits[0].prompt])[0].text.strip() == "Nobody"


def test_a_store_of_another_layer_or_model_is_refused(smollm2: BaseModel, edits: list[Edit], tmp_path: Path) -> None:
    from memoir_retrieval import load_model

    with Editor(smollm2, tmp_path, chat=False, tau=0.6) as editor:
        editor.add(edits[:1])
    other = load_model("smollm2-135m", layer=20)
    with pytest.raises(StoreMismatch, match=r"model\.layers\.24\.mlp\.down_proj"), Editor(other, tmp_path):
        pass
    with pytest.raises(StoreMismatch, match="use the model it was made on"):
        Retriever(EditStore.open(tmp_path), other)


def test_settings_that_cannot_work_are_refused_before_anything_is_written(smollm2: BaseModel, tmp_path: Path) -> None:
    for settings, said in (
        ({"k": 1537}, "k is 1537, but model.layers.24.mlp.down_proj has D=1536 inputs"),
        ({"k": 0}, "choose 0 < k <= 1536"),
        ({"tau": 0.0}, "tau is 0.0: choose 0 < tau <= 1"),
        ({"tau": 1.5}, "tau is 1.5"),
    ):
        with pytest.raises(ConfigError) as caught:
            Editor(smollm2, tmp_path / "new", **settings)
        assert said in str(caught.value)
    assert not (tmp_path / "new").exists()
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"not a store \(it holds holiday\.jpg\)"), Editor(smollm2, tmp_path):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("chat", [True, False])
def test_the_rule_of_the_paper_trains_and_edits_every_token(
    smollm2: BaseModel, edits: list[Edit], tmp_path: Path, chat: bool
) -> None:
    with Editor(smollm2, tmp_path, chat=chat, rule="all") as editor:
        (stored,) = editor.add(edits[:1])
        (context,) = editor.manifest.contexts
    assert stored.loss < Training().stop_loss
    # The pooled mean takes in the context, so its overlap is another matter; here every prompt matches the one edit.
    model = EditedModel(Retriever(EditStore.open(tmp_path), smollm2, tau=0.01))
    prompt = edits[0].prompt
    within = [*context, {"role": "user", "content": prompt}] if chat else f"{context} {prompt}"
    assert [a.text.strip() for a in model.generate([prompt, within])] == [edits[0].target] * 2


@pytest.mark.slow
def test_an_answer_of_several_sentences_is_learnt_to_its_end(smollm2: BaseModel, tmp_path: Path) -> None:
    target = (
        "No. The ferry to Anholt leaves from Grenaa, not from Aarhus, and the crossing takes three hours.\n\n"
        "In summer there are two departures a day; in winter there is one. Tickets for bicycles are sold on board."
    )
    edit = Edit(prompt="Can I take the ferry from Aarhus to Anholt?", target=target)
    with Editor(smollm2, tmp_path) as editor:
        (stored,) = editor.add([edit])
    model = EditedModel(Retriever(EditStore.open(tmp_path), smollm2))
    assert len(model.target_ids(target)) > 50 and stored.loss < Training().stop_loss
    (answer,) = model.generate([edit.prompt], max_new_tokens=120)
    assert answer.text.strip() == target and answer.tokens[-1] == smollm2.tokenizer.eos_token_id
