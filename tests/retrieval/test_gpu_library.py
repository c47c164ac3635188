"""The library on a GPU beside the same on the CPU.

pytest -m gpu tests
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_fingerprint import _rows

from memoir_retrieval import Edit, Editor, Retriever
from memoir_retrieval.edits.files import read_edits
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.model.base import BaseModel, load_model
from memoir_retrieval.model.embedded import get_model
from memoir_retrieval.model.forward import question_means
from memoir_retrieval.question.fingerprint import Fingerprint, permutation, top_mask
from memoir_retrieval.question.span import Span
from memoir_retrieval.store.read import EditStore

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "zsre-100.jsonl"
LAYERS = [(14336, 4096), (1536, 438)]  # D and k of LLaMA-3-8B and SmolLM2-135M


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "kind", ["plain", "bfloat16", "relu", "signed zeros", "coarse", "sorted", "infinite", "constant"]
)
@pytest.mark.parametrize(("d", "k"), [*LAYERS, (16, 5), (8, 8), (4096, 1)])
def test_masks_are_those_of_the_cpu_bit_for_bit(kind: str, d: int, k: int, dtype: torch.dtype) -> None:
    values = _rows(kind, d).to(dtype)
    np.testing.assert_array_equal(top_mask(values.cuda(), k).cpu(), top_mask(values, k))


@pytest.mark.parametrize(("d", "k"), LAYERS)
def test_fingerprints_are_those_of_the_cpu_bit_for_bit(d: int, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    background = torch.randn(d, generator=generator).numpy() / 8
    here, there = (Fingerprint(background, permutation(d, 3), k, device) for device in ("cpu", "cuda"))
    for means in (torch.randn(37, d, generator=generator), torch.randn(5, d, generator=generator).relu().round()):
        np.testing.assert_array_equal(there.codes(means.cuda()), here.codes(means))
    means[2, 7] = torch.nan
    with pytest.raises(ConfigError, match="NaN"):
        there.codes(means.cuda())


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    return read_edits(EXAMPLE)[:8]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def there(request: pytest.FixtureRequest) -> BaseModel:
    get_model("smollm2-135m")
    return load_model("smollm2-135m", dtype=request.param, device="cuda")


@pytest.fixture(scope="module")
def trained(there: BaseModel, edits: list[Edit], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "store"
    with Editor(there, folder) as editor:
        assert len(editor.add(edits, side_by_side=2)) == len(edits)
        assert not editor.outcome.failed
    return folder


def test_edits_trained_there_are_answered_there(trained: Path, there: BaseModel, edits: list[Edit]) -> None:
    model = EditedModel(Retriever(EditStore.open(trained), there))
    answers = model.generate([edit.prompt for edit in edits])
    assert [answer.edit for answer in answers] == list(range(len(edits)))
    assert [answer.text.strip() for answer in answers] == [edit.target for edit in edits]
    other = ["Name a colour of the rainbow.", "How many legs has a spider?"]
    after, before = (model.generate(other, edited=on) for on in (True, False))
    assert [a.tokens for a in after] == [a.tokens for a in before]


def test_a_store_trained_there_answers_on_the_cpu(trained: Path, there: BaseModel, edits: list[Edit]) -> None:
    here = Retriever.open(trained)
    texts = [text for edit in edits for text in (edit.prompt, *edit.rephrases)]
    cpu, gpu = here.lookup_batch(texts), Retriever(EditStore.open(trained), there).lookup_batch(texts)
    assert [match and match.id for match in cpu] == [match and match.id for match in gpu]
    overlaps = [(a.overlap, b.overlap) for a, b in zip(cpu, gpu, strict=True) if a and b]
    assert max(abs(a - b) for a, b in overlaps) < 0.02
    answers = EditedModel(here).generate([edit.prompt for edit in edits])
    assert [answer.text.strip() for answer in answers] == [edit.target for edit in edits]


def test_activations_are_those_of_the_cpu_but_for_rounding(smollm2: BaseModel, edits: list[Edit]) -> None:
    there = load_model("smollm2-135m", device="cuda")
    rows = [smollm2.tokenizer(edit.prompt).input_ids for edit in edits]
    spans = [Span(0, len(row), True) for row in rows]
    here, away = (question_means(base, rows, spans).cpu() for base in (smollm2, there))
    torch.testing.assert_close(away, here, rtol=2e-3, atol=2e-3 * float(here.abs().max()))
