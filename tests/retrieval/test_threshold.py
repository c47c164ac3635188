"""tau from the store itself: what it rests on, when it is set again, and when it is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from test_cli import run, write
from test_store import D, K, masks, stored_edit

from memoir_index import HammingIndex
from memoir_retrieval import Edit, Editor, EditStore, Training, load_model
from memoir_retrieval.background import reference_prompts
from memoir_retrieval.editing import open_store
from memoir_retrieval.edits.judge import shipped_judge
from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.errors import StoreError
from memoir_retrieval.evaluation.calibration import write_tau
from memoir_retrieval.store.additions import find_additions
from memoir_retrieval.store.manifest import read_manifest
from memoir_retrieval.store.remove import remove_edits
from memoir_retrieval.store.threshold import (
    FLOOR,
    MARGIN,
    MOST_MATCHED,
    References,
    Threshold,
    bits_needed,
    set_tau,
)
from memoir_retrieval.store.write import write_again

N = 200


def near_masks(shared: Sequence[int], code: np.ndarray) -> np.ndarray:
    """Masks with so many ones in common with another: uint8 [n, D/8]."""
    bits = np.unpackbits(code, bitorder="little")
    ones, others = np.flatnonzero(bits), np.flatnonzero(bits == 0)
    rows = np.zeros((len(shared), D), np.uint8)
    for row, n in zip(rows, shared, strict=True):
        row[ones[:n]] = 1
        row[others[: K - n]] = 1
    return np.packbits(rows, axis=1, bitorder="little")


def edit(number: int, prompt: str, **fields: Any) -> StoredEdit:
    return msgspec.structs.replace(stored_edit(number), prompt=prompt, rephrases=(), **fields)


def index_of(codes: np.ndarray) -> HammingIndex:
    return HammingIndex.from_codes(D, K, np.arange(len(codes)), codes)


EDIT = edit(0, "Who founded the town of Aarhus?")


def references(shared: Sequence[int], text: str = "how long does it take to boil egg {}") -> References:
    return References(near_masks(shared, masks(1, 1)[0]), tuple(text.format(i) for i in range(len(shared))))


def test_with_a_judge_tau_is_the_least_whose_bound_holds() -> None:
    """Not one of 200 passes the judge, so a tenth of them may be near: 20.1 of 201, over 201, is .0005."""
    high = bits_needed(0.75, K)
    for near, tau in ((0, FLOOR), (19, FLOOR), (20, 0.76), (N, 0.76)):
        some = references([high] * near + [0] * (N - near))
        measured, threshold = set_tau(index_of(masks(1, 1)), [EDIT], some, shipped_judge(), 0)
        assert measured == tau, near
        assert threshold == Threshold(N, near if tau == FLOOR else 0, 0)
        assert threshold.bound == (threshold.near + 1) / (N + 1) ** 2 <= MOST_MATCHED
        lower = round(measured - 0.01, 2)
        reach = sum(bits >= bits_needed(lower, K) for bits in [high] * near)
        assert measured == FLOOR or (reach + 1) / (N + 1) ** 2 > MOST_MATCHED, "no lower tau keeps to the bound"


def test_what_passes_the_judge_weighs_however_far_it_is() -> None:
    asking = "Who was the founder of the town of Aarhus?"
    assert shipped_judge().verdict(EDIT.prompt, asking).same
    far = references([bits_needed(0.6, K)] * 5 + [0] * (N - 5))
    passing = far._replace(texts=(*far.texts[:-30], *(f"{asking}{'?' * i}" for i in range(30))))
    tau, threshold = set_tau(index_of(masks(1, 1)), [EDIT], passing, shipped_judge(), 0)
    assert threshold.passed == 30 and threshold.near == 0
    assert threshold.bound == 31 / (N + 1) ** 2 and bits_needed(tau, K) > bits_needed(0.6, K)
    assert set_tau(index_of(masks(1, 1)), [EDIT], far, shipped_judge(), 0)[0] == FLOOR


def test_where_masks_decide_alone_none_reaches_tau() -> None:
    high = bits_needed(0.6, K)
    tau, threshold = set_tau(index_of(masks(1, 1)), [EDIT], references([high, 0, 1]), None, 0)
    assert threshold == Threshold(3, 0, None) and threshold.bound == 1 / 4
    assert bits_needed(round(tau - MARGIN, 2), K) > high >= bits_needed(round(tau - MARGIN - 0.01, 2), K)
    assert set_tau(index_of(masks(1, 1)), [EDIT], references([K]), None, 0)[0] == 1.0


def test_a_reference_that_is_an_edit_s_question_is_left_out() -> None:
    some = references([K, 0])._replace(texts=("WHO founded the town of Aarhus", "what is a fjord"))
    for judge in (None, shipped_judge()):
        assert set_tau(index_of(masks(1, 1)), [EDIT], some, judge, 0)[1].references == 1


def test_an_edit_whose_names_are_missing_does_not_act_on_a_reference() -> None:
    bound = edit(0, EDIT.prompt, requires=("Denmark",))
    some = references([bits_needed(0.7, K)] * 3)._replace(texts=(f"{EDIT.prompt} Really", "a", "b"))
    index = index_of(masks(1, 1))
    assert shipped_judge().verdict(EDIT.prompt, some.texts[0]).same
    assert [set_tau(index, [one_edit], some, shipped_judge(), 0)[1].passed for one_edit in (EDIT, bound)] == [1, 0]
    assert set_tau(index, [bound], some, None, 0) == set_tau(index, [EDIT], some, None, 0), "it is near all the same"


def test_a_store_without_edits_has_the_least_tau() -> None:
    assert set_tau(HammingIndex(D, K), [], references([0] * 3), shipped_judge(), 0) == (FLOOR, Threshold(3, 0, 0))


@pytest.fixture(scope="module")
def ruled(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the small model that sets its own tau, after one addition."""
    folder = tmp_path_factory.mktemp("ruled") / "store"
    with Editor(load_model(str(tiny)), folder, training=Training(max_steps=0, variants=0)) as editor:
        editor.add(
            [Edit(prompt=f"Who founded {name}?", target="Ada") for name in ("Aarhus", "Odense")], keep_failed=True
        )
        editor.add([Edit(prompt="Who founded Ribe?", target="Ada")], keep_failed=True)
    return folder


@pytest.fixture
def store(ruled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ruled, tmp_path / "store"))


def expected(store: EditStore) -> tuple[float, Threshold | None]:
    contexts = len(store.manifest.masked_contexts)
    return set_tau(store.index(), store.edits, store.references, shipped_judge(), contexts)


def state(store: EditStore) -> tuple[float, Threshold | None]:
    return store.manifest.tau, store.manifest.threshold


def test_tau_changes_with_the_edits_and_in_their_generation(tiny: Path, store: Path) -> None:
    opened = EditStore.open(store)
    assert len(opened.additions) == 1 and opened.references.texts == tuple(reference_prompts())
    assert state(opened) == expected(opened)
    first = read_manifest(store)
    assert find_additions(store, first) == 1 and (first.tau, first.threshold) == expected(_without(opened, [2]))
    remove_edits(store, [0, 1])
    now = EditStore.open(store)
    assert state(now) == expected(now) and now.manifest.generation == opened.manifest.generation + 1
    with Editor(load_model(str(tiny)), store) as editor:
        editor.compact()
        again = EditStore.open(store)
        assert state(again) == expected(again) == state(now)


def _without(store: EditStore, gone: Sequence[int]) -> EditStore:
    rows = ~np.isin(store.ids, gone)
    masks = store.masks._replace(codes=store.codes[rows], ids=store.ids[rows], memory_of=store.memory_of[rows])
    return replace(store, masks=masks, edits=tuple(e for e in store.edits if e.id not in gone), additions=())


def test_a_tau_that_somebody_chose_stays(tiny: Path, tmp_path: Path, store: Path) -> None:
    with Editor(load_model(str(tiny)), tmp_path / "own", tau=0.62, training=Training(max_steps=0)) as editor:
        editor.add([Edit(prompt="Who founded Aarhus?", target="Ada")], keep_failed=True)
        editor.add([Edit(prompt="Who founded Ribe?", target="Ada")], keep_failed=True)
    chosen = EditStore.open(tmp_path / "own")
    assert state(chosen) == (0.62, None) and chosen.references.texts == ()
    write_tau(EditStore.open(store), 0.7)
    remove_edits(store, [0])
    with Editor(load_model(str(tiny)), store) as editor:
        editor.add([Edit(prompt="Who founded Aarhus?", target="Ada")], keep_failed=True)
    assert state(EditStore.open(store)) == (0.7, None)


def test_another_judge_keeps_nobody_from_removing(store: Path) -> None:
    opened = EditStore.open(store)
    write_again(store, opened, generation=opened.manifest.generation + 1, judge="0-" + "0" * 16)
    remove_edits(store, [0])
    assert state(EditStore.open(store)) == state(opened), "fewer edits match no more prompts"


@pytest.mark.parametrize("damage", ["no references", "no threshold", "ones", "count"])
def test_damage_is_named(store: Path, damage: str) -> None:
    opened = EditStore.open(store)
    codes, texts = opened.references
    wrong = codes.copy()
    wrong[3] ^= 1
    changes: dict[str, Any] = {
        "no references": {"references": References(np.empty((0, 0), np.uint8), ())},
        "no threshold": {"threshold": None},
        "ones": {"references": References(wrong, texts)},
        "count": {"references": References(codes[:-1], texts)},
    }[damage]
    write_again(store, opened, generation=opened.manifest.generation + 1, **changes)
    said = {
        "no references": "holds 0 reference prompts, the manifest says that 256 of them set tau",
        "no threshold": "holds 256 reference prompts, the manifest says that somebody has chosen tau",
        "ones": "the mask of reference prompt 3 has not k=18 ones",
        "count": "255 masks of 256 reference prompts",
    }[damage]
    with pytest.raises(StoreError, match=said):
        EditStore.open(store)


def test_commands_say_what_tau_rests_on(
    capsys: pytest.CaptureFixture[str], tiny: Path, store: Path, tmp_path: Path
) -> None:
    manifest = EditStore.open(store).manifest
    assert manifest.threshold
    code, out, _ = run(capsys, "index", "info", store)
    assert code == 0 and f"tau {manifest.tau:g}: set by the store" in out and "256 reference prompts" in out
    code, out, _ = run(capsys, "index", "info", store, "--json")
    assert json.loads(out)["threshold"] == {"references": 256, "near": manifest.threshold.near, "passed": 0} | {
        "bound": manifest.threshold.bound
    }
    code, _, err = run(capsys, "calibrate", store, "--tau", "0.6", "--write")
    assert code == 0 and "tau 0.6 written" in err and state(EditStore.open(store)) == (0.6, None)
    code, out, _ = run(capsys, "index", "info", store)
    assert "tau 0.6: chosen by whoever made the store" in out
    code, _, err = run(capsys, "calibrate", store, "--write")
    assert code == 0 and state(EditStore.open(store)) == (manifest.tau, manifest.threshold)
    file = write(tmp_path / "more.jsonl", [{"prompt": "Who founded Viborg?", "target": "Ada"}])
    code, out, _ = run(capsys, "edit", file, "--store", store, "--keep-failed", "--json")
    summary, now = json.loads(out), EditStore.open(store).manifest
    assert now.threshold and (summary["tau"], summary["bound"]) == (now.tau, now.threshold.bound)
    code, _, err = run(capsys, "calibrate", store, "--tau", "0.6")
    assert code == 2 and "--write" in err


def test_of_many_locality_prompts_some_are_drawn(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them would be compared with the edits at every commit."""
    monkeypatch.setattr(open_store, "MOST_OWN", 3)
    probes = [{"prompt": f"how tall is giraffe {n}"} for n in range(7)]
    edit = EditStore.open(store).edits[0]
    record = {"prompt": edit.prompt, "target": edit.target, "locality": probes}
    file = write(tmp_path / "probes.jsonl", [record])
    code, _, err = run(capsys, "calibrate", store, file, "--write")
    assert code == 0 and "7 locality prompts: 3 of them, evenly drawn, are the store's reference prompts" in err
    own = tuple(probes[number]["prompt"] for number in (0, 2, 4))
    assert EditStore.open(store).references.texts == (*reference_prompts(), *own)
