"""Evaluation on the real model: each score tells what it says, and sharing work between rows changes none of them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from memoir_retrieval import Edit, EditedModel, Editor, EditStore, Probe, Retriever, read_edits
from memoir_retrieval.background import background_prompts, control_prompts, unrelated_prompts
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.evaluation.contexts import CONTEXTS, in_context
from memoir_retrieval.evaluation.measure import evaluate, measure
from memoir_retrieval.evaluation.scores import holds
from memoir_retrieval.evaluation.texts import read_texts
from memoir_retrieval.model.base import BaseModel

EXAMPLES = Path(__file__).parents[2] / "examples" / "zsre-100.jsonl"
TEXT = "The baker opened her shop before the sun was up, because the first boats came in at five."


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    return read_edits(EXAMPLES)[:3]


@pytest.fixture(scope="module")
def model(smollm2: BaseModel, edits: list[Edit], tmp_path_factory: pytest.TempPathFactory) -> EditedModel:
    folder = tmp_path_factory.mktemp("evaluation") / "store"
    with Editor(smollm2, folder, tau=0.55) as editor:
        editor.add(edits)
    return EditedModel(Retriever(EditStore.open(folder), smollm2))


@pytest.mark.slow
def test_rows_that_share_their_beginning_are_read_as_they_are_alone(model: EditedModel, edits: list[Edit]) -> None:
    prompts = in_context("passages", [edits[0].prompt, "how tall is a giraffe", edits[1].rephrases[0]])
    targets = [model.target_ids(text) for text in (edits[0].target, "Five metres and a half", "On Monday")]
    together = [model.predict(prompts, targets), model.score(prompts), model.generate(prompts, max_new_tokens=5)]
    alone = [
        [model.predict([p], [t])[0] for p, t in zip(prompts, targets, strict=True)],
        [model.score([p])[0] for p in prompts],
        [model.generate([p], max_new_tokens=5)[0] for p in prompts],
    ]
    for shared, single in zip(together, alone, strict=True):
        for a, b in zip(shared, single, strict=True):
            assert (a.tokens, a.edit) == (b.tokens, b.edit) and a.overlap == pytest.approx(b.overlap, abs=0.01)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-3)
    assert [a.edit for a in together[0]] == [0, None, 1]
    for given in (targets, None):
        on, off = model.compare(prompts, given)
        if given:
            assert on == together[0] and off == model.predict(prompts, given, edited=False)
        # A question's own tokens stand before the first one that an edit acts on.
        same = [False, True, False] if given else [True, True, True]
        assert [a.logprobs == b.logprobs for a, b in zip(on, off, strict=True)] == same


def test_an_answer_is_given_up_when_it_cannot_become_the_one_wanted(model: EditedModel, edits: list[Edit]) -> None:
    prompts = [edits[0].prompt, edits[1].prompt, "how tall is a giraffe"]
    whole = [a.text.strip() for a in model.generate(prompts, max_new_tokens=12)]
    assert whole[:2] == [edits[0].target, edits[1].target]
    # The first is as wanted, of the second only the beginning is wanted, the third is nothing like it.
    wanted = [edits[0].target, edits[1].target[:4], "Zanzibar"]
    kept, cut, other = (a.text.strip() for a in model.generate(prompts, max_new_tokens=12, wanted=wanted))
    assert kept == edits[0].target
    assert cut != wanted[1] and whole[1].startswith(cut)
    assert len(other) < len(whole[2]) and whole[2].startswith(other)


def test_a_target_of_several_lengths_is_answered_in_the_order_asked(model: EditedModel) -> None:
    prompts = ["how tall is a giraffe", "Write a poem.", "hi", "what is a semicolon for in formal writing"]
    answers = model.predict(prompts, [[5] * n for n in (4, 1, 3, 2)])
    assert [len(a.tokens) for a in answers] == [4, 1, 3, 2]


def test_every_score(model: EditedModel, edits: list[Edit]) -> None:
    prompts = [
        # What follows from the first edit is asked as a rephrasing of it, so the answer is known to be right.
        msgspec.structs.replace(
            edits[0],
            portability=(
                Probe(prompt=edits[0].rephrases[0], answer="no such year", aliases=(edits[0].target,)),
                Probe(prompt=edits[0].rephrases[0], answer=edits[0].target[:2]),  # no word of the answer
                Probe(prompt=unrelated_prompts()[0], answer="Zanzibar Zanzibar"),
            ),
            ood=(edits[0].prompt, TEXT),
        ),
        # Its neighbour is another edit, whose answer is therefore not left alone.
        msgspec.structs.replace(edits[1], neighbourhood=(Probe(prompt=edits[2].prompt, answer=edits[2].target),)),
    ]
    stored = model.retriever.store.edits
    controls = [*unrelated_prompts()[:3], edits[2].prompt]
    report, per_edit = measure(model, stored, prompts, tau=0.55, controls=controls, texts=[TEXT])
    assert report.reliability == 1.0 and report.match.edits_right == 1.0 and report.exact_match.edits == 1.0
    assert report.locality is not None and report.neighbourhood is not None
    assert report.neighbourhood < 1.0 and report.locality == pytest.approx((2 + report.neighbourhood) / 3, abs=1e-4)
    assert report.generated is not None and (report.generated.prompts, report.generated.identical) == (4, 0.75)
    assert report.generated.matched == 0.25
    assert report.perplexity is not None and 1.0 < report.perplexity < 1.05  # trained to a loss of .02
    assert report.portability is not None and report.portability.answered == 0.33333
    assert report.ood is not None and (report.ood.texts, report.ood.found) == (2, 0.5)
    assert 0 < report.ood.known < 1 and 0 < report.ood.known_before < 1
    assert report.text is not None and report.text.edited == report.text.base > 1 and report.text.matched == 0
    assert report.text.tokens == len(model.base.tokenizer(TEXT).input_ids) - 1
    assert [(o.id, o.found, o.exact) for o in per_edit] == [(0, True, True), (1, True, True)]
    assert np.mean([o.reliability for o in per_edit]) == report.reliability


def test_an_edit_that_is_not_stored_counts_as_not_found(model: EditedModel, edits: list[Edit]) -> None:
    refused = Edit(prompt=unrelated_prompts()[0], target="Zanzibar")
    report, per_edit = measure(model, model.retriever.store.edits, [edits[0], refused], tau=0.55, partly=True)
    assert [(o.id, o.found) for o in per_edit] == [(0, True), (-1, False)]
    assert report.match.edits_right == report.exact_match.edits == 0.5


def test_what_there_is_nothing_to_measure_on_is_none(model: EditedModel, edits: list[Edit]) -> None:
    bare = [Edit(prompt=edits[0].prompt, target=edits[0].target)]
    report = evaluate(model, model.retriever.store.edits, bare, tau=0.55, context="turn")
    assert report.context == "turn" and report.contexts == {} and report.average == report.reliability
    nothing = ("generality", "locality", "neighbourhood", "generated", "portability", "ood", "text")
    assert [getattr(report, name) for name in nothing] == [None] * len(nothing)


def test_contexts_surround_the_question() -> None:
    assert in_context("plain", ["Who?"]) == ["Who?"]
    for name in CONTEXTS[1:]:
        (messages,) = in_context(name, ["Who is {it}?"])
        assert isinstance(messages, list) and messages[-1]["role"] == "user"
        assert messages[-1]["content"].endswith("Who is {it}?") and (len(messages) > 1) == (name != "inline")
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, messages[-1]]
        (longer,) = in_context(name, [turns])
        assert longer[-3:-1] == turns[:2] and longer[: len(messages) - 1] == messages[:-1]
    with pytest.raises(ConfigError, match="context 'sys' is not known: choose one of plain, system, turn, passages"):
        in_context("sys", ["Who?"])


def test_a_target_stands_in_a_text_as_words_of_its_own() -> None:
    assert holds("It is C++ code", "c++") and holds("Ada, of course", " Ada ") and holds("Acme Inc. it is", "Acme Inc.")
    assert not holds("Adam", "Ada") and not holds("Acme Inc it is", "Acme Inc.")
    assert not holds("Yes, it is", "") and not holds("Yes, it is", " ") and not holds("", "")


def test_control_prompts() -> None:
    prompts = control_prompts()
    assert len(set(prompts)) == 256 and {*background_prompts(), *unrelated_prompts()} < set(prompts)


def test_texts_are_paragraphs_of_prose(tmp_path: Path) -> None:
    long = " ".join(f"word{i}" for i in range(200))
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text(f"= Heading =\n\n{long}\n\nshort\n\n{' '.join(['x'] * 40)}\n")
    lines.write_text(f'{{"text": "= A\u2028Heading ="}}\n\n{{"text": "{long}"}}\n')  # no line of JSON ends there
    assert [len(text.split()) for text in read_texts(plain)] == [160, 40]
    assert read_texts(plain, most=1) == read_texts(lines)
    for content, said in (("a b", "no paragraph of 40 words"), ('{"txt": 1}', "neither UTF-8 text nor JSONL")):
        lines.write_text(content if content[0] == "{" else "")
        with pytest.raises(ConfigError, match=said):
            read_texts(lines)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_texts(tmp_path / "none.txt")
