"""Calibration: the rule for tau; its shares are those of real lookups; writing tau changes nothing else."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memoir_index import hamming_radius
from memoir_retrieval import Edit, Editor, EditStore, Retriever, load_model, read_edits
from memoir_retrieval.background import unrelated_prompts
from memoir_retrieval.cli import main
from memoir_retrieval.edits.record import Probe
from memoir_retrieval.errors import ConfigError, ModelError, StoreError
from memoir_retrieval.evaluation.calibration import (
    calibrate_model,
    calibrate_store,
    unrelated_to,
    write_tau,
)
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.store import files
from memoir_retrieval.store.files import store_lock
from memoir_retrieval.store.threshold import MARGIN, least_tau

EXAMPLES = Path(__file__).parents[2] / "examples" / "zsre-100.jsonl"
UNRELATED = unrelated_prompts()[:12]


@pytest.mark.parametrize(("most", "tau"), [(48, 0.51), (49, 0.52), (0, 0.03), (96, 0.99), (97, 1.0), (99, 1.0)])
def test_the_suggested_tau_is_the_least_that_none_reaches_plus_the_margin(most: int, tau: float) -> None:
    assert least_tau(np.array([0, most, most // 2]), 100) == tau


@settings(deadline=None)
@given(st.integers(1, 5000), st.data())
def test_no_unrelated_prompt_reaches_tau_and_one_would_reach_a_lower_one(k: int, data: st.DataObject) -> None:
    shared = data.draw(st.lists(st.integers(0, k - 1), min_size=1, max_size=5))
    tau = least_tau(np.array(shared), k)

    def matching(threshold: float) -> int:
        return sum(2 * (k - bits) <= hamming_radius(threshold, k) for bits in shared)

    assert not matching(tau)
    least = round(tau - MARGIN, 2)
    if tau < 1:
        assert not matching(least)
        assert least <= 0.01 or matching(round(least - 0.01, 2))


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    return read_edits(EXAMPLES)[:3]


@pytest.fixture(scope="module")
def template(smollm2: BaseModel, edits: list[Edit], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration") / "store"
    with Editor(smollm2, folder, chat=False, tau=0.9) as editor:
        editor.add(edits)
    return folder


@pytest.fixture
def store(template: Path, tmp_path: Path) -> EditStore:
    return EditStore.open(shutil.copytree(template, tmp_path / "store"))


def test_the_shares_are_those_of_lookups_at_that_tau(smollm2: BaseModel, template: Path, edits: list[Edit]) -> None:
    store = EditStore.open(template)
    store = replace(store, manifest=msgspec.structs.replace(store.manifest, judge=""))
    rephrases = [(i, text) for i, edit in enumerate(edits) for text in edit.rephrases]
    # A rephrasing of the wrong edit is found by nobody; an edit's own prompt is no unrelated one.
    rephrases.append((0, edits[1].prompt))
    unrelated = [*UNRELATED, edits[2].rephrases[0]]
    calibration = calibrate_store(Retriever(store, smollm2), rephrases, unrelated)
    assert calibration.overlaps.edits == (1.0, 1.0, 1.0) and calibration.now.tau == 0.9
    assert calibration.suggested.unrelated_matched == 0 and calibration.nearest[0].prompt == edits[2].rephrases[0]
    assert calibration.nearest[0].edit == 2 and calibration.nearest[0].overlap == max(calibration.overlaps.unrelated)
    points = {point.tau: point for point in calibration.curve}
    for tau in (0.4, 0.46, 0.6, 0.75):
        retriever = Retriever(store, smollm2, tau=tau)
        right = [m is not None and m.id == own for m, (own, _) in
                 zip(retriever.lookup_batch([text for _, text in rephrases]), rephrases, strict=True)]  # fmt: skip
        matched = [m is not None for m in retriever.lookup_batch(unrelated)]
        assert points[tau].rephrases_found == round(np.mean(right), 5)
        assert points[tau].unrelated_matched == round(np.mean(matched), 5)
    assert 0 < points[0.46].unrelated_matched < points[0.4].unrelated_matched
    judged = Retriever(EditStore.open(template), smollm2, tau=0.4)
    matched = [match is not None for match in judged.lookup_batch(unrelated)]
    with_judge = {point.tau: point for point in calibrate_store(judged, rephrases, unrelated).curve}
    assert with_judge[0.4].unrelated_matched == round(np.mean(matched), 5) < points[0.4].unrelated_matched
    assert points[0.4].rephrases_found == 0.75 and calibration.curve[-1].tau == 1.0


def test_a_model_is_measured_as_its_store_would_be(smollm2: BaseModel, template: Path, edits: list[Edit]) -> None:
    rephrases = [(i, text) for i, edit in enumerate(edits) for text in edit.rephrases]
    of_store = calibrate_store(Retriever(EditStore.open(template), smollm2), rephrases, UNRELATED)
    settings = calibrate_model(smollm2, edits, UNRELATED, [15, 24], [438, 200], chat=False)
    by_name = {(s.layer, s.k): s for s in settings}
    assert set(by_name) == {(15, 438), (24, 438), (15, 200), (24, 200)}
    own = by_name[24, 438]
    assert (own.tau, own.rephrases_found) == (of_store.suggested.tau, of_store.suggested.rephrases_found)
    assert own.gap == pytest.approx(np.quantile(of_store.overlaps.rephrases, 0.05) - own.tau, abs=1e-3)
    assert by_name[15, 438].gap < own.gap
    assert settings == sorted(settings, key=lambda s: (s.rephrases_found, s.gap), reverse=True)


def test_what_one_edit_leaves_alone_and_another_asks_is_not_unrelated() -> None:
    edits = [
        Edit(prompt="Bordeaux is a twin city of", target="Seoul", rephrases=("Bordeaux has the twin",)),
        Edit(
            prompt="Porto is a twin city of",
            target="Tehran",
            locality=(Probe(prompt="Bordeaux  is a twin city of"), Probe(prompt="Bordeaux has the twin")),
            neighbourhood=(Probe(prompt="Nantes is a twin city of"),),
        ),
    ]
    assert unrelated_to(edits, edits)[len(unrelated_to(edits[:1], edits[:1])) :] == ["Nantes is a twin city of"]


def test_what_cannot_be_measured_is_refused(smollm2: BaseModel, template: Path, edits: list[Edit]) -> None:
    retriever = Retriever(EditStore.open(template), smollm2)
    with pytest.raises(ConfigError, match="has a rephrasing: name a FILE"):
        calibrate_store(retriever, [], UNRELATED)
    with pytest.raises(ConfigError, match="'' has no tokens to pool"):
        calibrate_store(retriever, [(0, "")], UNRELATED)
    with pytest.raises(ConfigError, match="has the same mask as edit 1 at k=438, so no tau keeps them apart"):
        calibrate_store(retriever, [(0, edits[0].rephrases[0])], [*UNRELATED, edits[1].prompt])
    with pytest.raises(ConfigError, match=r"has the same mask as edit 0 at k=1536.*choose a smaller k"):
        calibrate_model(smollm2, edits, UNRELATED[:1], [0], [1536], chat=False)
    with pytest.raises(ConfigError, match="k is 1537, but the layer has D=1536"):
        calibrate_model(smollm2, edits, UNRELATED[:1], [0], [1537], chat=False)
    with pytest.raises(ModelError, match="layer 30 does not exist: smollm2-135m has layers 0 to 29"):
        calibrate_model(smollm2, edits, UNRELATED, [30], [438], chat=False)
    with pytest.raises(ConfigError, match="add `rephrases` to its records"):
        calibrate_model(smollm2, [Edit(prompt="Who?", target="Me")], UNRELATED, [24], [438], chat=False)


def test_locality_probes_are_unrelated_prompts_too(edits: list[Edit]) -> None:
    prompts = unrelated_to(edits, [*edits, *edits])
    assert prompts[:100] == unrelated_prompts() and prompts[100:] == [p.prompt for e in edits for p in e.locality]


def test_the_command_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of some of the edits may name the question of another among what it leaves alone, and may have two targets
    for a prompt, of which one is stored."""
    edit, other = Edit(prompt="Who founded Aarhus?", target="Me"), Edit(prompt="Where is Pisa?", target="In Rome")
    with Editor(load_model(str(tiny)), tmp_path / "store") as editor:
        editor.add([edit, other])

    def calibrate(*arguments: str, command: str = "calibrate") -> str:
        with pytest.raises(SystemExit) as done:
            main([command, str(tmp_path / "store"), *arguments])
        shown = capsys.readouterr()
        assert done.value.code == 0, shown.err
        return shown.out

    record = {
        "prompt": edit.prompt,
        "target": edit.target,
        "rephrases": ["Aarhus, who founded it?"],
        "locality": [{"prompt": other.prompt}],
    }
    file = tmp_path / "some.jsonl"
    file.write_text(json.dumps(record | {"target": "You"}) + "\n" + json.dumps(record))  # the last was stored
    assert "tau 0.53: set by the store, with every change" in calibrate(str(file), "--write")
    assert EditStore.open(tmp_path / "store").manifest.threshold is not None
    assert "tau 0.6: chosen by whoever made the store" in calibrate(str(file), "--write", "--tau", "0.6")
    assert json.loads(calibrate("--write", "--tau", "0.7", "--json")) == {"tau": 0.7}
    assert EditStore.open(tmp_path / "store").manifest.tau == 0.7
    page, before = tmp_path / "page.html", EditStore.open(tmp_path / "store").manifest
    with pytest.raises(SystemExit) as stop:  # there would be nothing to draw
        main(["calibrate", str(tmp_path / "store"), "--write", "--html", str(page)])
    assert stop.value.code == 2 and "does nothing with --write where no edit of" in capsys.readouterr().err
    assert EditStore.open(tmp_path / "store").manifest == before and not page.exists()
    calibrate(str(file), "--write", "--tau", "0.7", "--html", str(page))
    assert page.exists()
    assert json.loads(calibrate(str(file), "--controls", "0", "--json", command="eval"))["reliability"] == 1


def test_a_written_tau_is_a_new_generation_and_nothing_else(
    store: EditStore, smollm2: BaseModel, edits: list[Edit]
) -> None:
    before = {kind: (store.path / getattr(store.manifest, kind).name).read_bytes() for kind in KINDS}
    write_tau(store, 0.47)
    now = EditStore.open(store.path)
    assert (now.manifest.tau, now.manifest.generation) == (0.47, store.manifest.generation + 1)
    assert {kind: (store.path / getattr(now.manifest, kind).name).read_bytes() for kind in KINDS} == before
    changed = {name for name in now.manifest.__struct_fields__
               if getattr(now.manifest, name) != getattr(store.manifest, name)}  # fmt: skip
    assert changed == {"tau", "generation", "sha256"}  # the files are those of the generation before
    assert Retriever(store, smollm2).lookup(edits[0].prompt) is not None  # opened before, it serves on
    with Editor(smollm2, store.path) as editor:
        assert editor.manifest.tau == 0.47 and editor.add(edits) == []


KINDS = ("memory", "codes", "edits")


def test_a_tau_measured_on_another_generation_is_not_written(store: EditStore) -> None:
    write_tau(store, 0.47)
    measured = store.manifest.generation
    said = f"went from generation {measured} to {measured + 1} while it was measured: run the same command"
    with pytest.raises(StoreError, match=said):
        write_tau(store, 0.6)
    assert EditStore.open(store.path).manifest.tau == 0.47


def test_a_tau_that_cannot_be_written_leaves_the_store(store: EditStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with store_lock(store.path), pytest.raises(StoreError, match="being written by another process"):
        write_tau(store, 0.47)
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StoreError, match="no space left"):
        write_tau(store, 0.47)
    assert EditStore.open(store.path).manifest == store.manifest
