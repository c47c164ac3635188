"""A quality run writes down every figure and a page of its own; calibration draws the same pictures."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_cli import EDITS, refused, run, write
from test_edit_files import SETS, needs_sets

from memoir_retrieval.cli import main
from memoir_retrieval.edits.files import read_edits
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.evaluation import quality_run as quality
from memoir_retrieval.evaluation.calibration import Setting
from memoir_retrieval.evaluation.contexts import UNSEEN
from memoir_retrieval.evaluation.datasets import DATA_SETS, data_file
from memoir_retrieval.evaluation.quality_run import checkpoints, read_run
from memoir_retrieval.evaluation.report import settings_page
from memoir_retrieval.evaluation.report.charts import Series, histograms, lines

MORE = [*EDITS, *({"prompt": f"What is the number of door {n}?", "target": f"It is {n}"} for n in range(10))]


class Page(HTMLParser):
    """The tags of a page, with their attributes, and its text by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag  # every tag is closed, in order

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)


def checked(path: Path) -> Page:
    """A page that is whole and loads nothing."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert not re.search(r"https?:|//|@import|url\(|<script|<img|<link", text)
    assert "NaN" not in text and "nan" not in {attr for _, attrs in page.tags for attr in attrs.values()}
    return page


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 edits, asked in every context."""
    monkeypatch = pytest.MonkeyPatch()
    where = tmp_path_factory.mktemp("quality")
    write(where / "edits.jsonl", MORE)
    monkeypatch.setattr("sys.argv", ["memoir", "bench", "quality"])
    with pytest.raises(SystemExit) as done:
        main(["bench", "quality", str(where / "edits.jsonl"), "--model", str(tiny), "--out", str(where / "run"),
              "--chat", "--controls", "5", "--training", "variants=1", "--data", str(where)])  # fmt: skip
    monkeypatch.undo()
    assert done.value.code == 0
    return where / "run"


@pytest.fixture(scope="module")
def store(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two edits."""
    where = tmp_path_factory.mktemp("made")
    file = write(where / "edits.jsonl", EDITS)
    with pytest.raises(SystemExit):
        main(["edit", str(file), "--model", str(tiny), "--store", str(where / "store"), "--json"])
    return where / "store"


def test_a_run_has_every_figure(folder: Path) -> None:
    result = json.loads((folder / "run.json").read_text())
    assert result["edits"] == result["stored"] == 12 and len(result["per_edit"]) == 12 and len(result["seconds"]) == 12
    assert [c["edits"] for c in result["checkpoints"]] == [10, 12]
    assert result["checkpoints"][-1]["reliability"] == result["report"]["reliability"]
    assert result["settings"]["seed"] == 0 and result["settings"]["training"]["variants"] == 1
    assert result["command"].startswith("memoir ") and result["library"] and result["started"].endswith("Z")
    assert list(result["report"]["contexts"]) == list(UNSEEN)
    generated = result["report"]["generated"]  # what matches nothing is answered as before
    assert generated["prompts"] == 5 and generated["identical"] >= 1 - generated["matched"]
    assert result["edit_seconds"] > 0
    # The rule that set the store's tau suggests it, too, not the masks of all unrelated prompts.
    assert result["calibration"]["threshold"] and result["calibration"]["suggested"] == result["calibration"]["now"]
    assert read_run(folder).report.match.edits_right == result["report"]["match"]["edits_right"] == 1.0


def test_a_run_keeps_its_figures_where_no_threshold_can_be_measured(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("an unrelated prompt has the very mask of an edit")

    monkeypatch.setattr(quality, "calibrate_store", refuse)
    file = write(tmp_path / "edits.jsonl", EDITS)
    code, _, err = run(capsys, "bench", "quality", file, "--model", tiny, "--out", tmp_path / "run", "--controls", "0",
                       "--data", tmp_path)  # fmt: skip
    assert code == 0 and "tau was not measured: an unrelated prompt has the very mask" in err
    figures = read_run(tmp_path / "run")
    assert figures.calibration is None and figures.report.edits == figures.stored == 2
    assert (tmp_path / "run" / "report.html").exists()


def test_the_report_shows_the_pictures_and_loads_nothing(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    drawn = (folder / "report.html").read_bytes()
    page = checked(folder / "report.html")
    titles = ["Overlap", "What a tau does", "Accuracy against number of edits", "Accuracy by age of the edit",
              "Time per edit"]  # fmt: skip
    assert [title for title in page.text["h2"] if title in titles] == titles
    assert sum(tag == "svg" for tag, _ in page.tags) == len(titles)
    report = read_run(folder).report
    shares = [f"{scores.match.edits_right:.3f}" for scores in (report, *report.contexts.values())]
    cells = page.text["td"]
    assert cells[cells.index("edits found") + 1 :][:4] == shares
    (folder / "report.html").unlink()
    code, out, _ = run(capsys, "report", folder, "--no-open")
    assert code == 0 and out.strip() == str((folder / "report.html").resolve())
    assert (folder / "report.html").read_bytes() == drawn


def test_a_finished_run_is_kept(capsys: pytest.CaptureFixture[str], folder: Path, tiny: Path) -> None:
    file = folder.parent / "edits.jsonl"
    refused(capsys, folder / "store", "holds a finished run: choose another --out", "bench", "quality", file,
            "--model", tiny, "--out", folder)  # fmt: skip


def test_an_interrupted_run_goes_on(capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "edits.jsonl", MORE[:3])
    command = ["bench", "quality", file, "--model", tiny, "--out", tmp_path / "run", "--controls", "0", "--json",
               "--data", tmp_path]  # fmt: skip
    run(capsys, *command, "--edits", "1")
    (tmp_path / "run" / "run.json").unlink()
    code, out, _ = run(capsys, *command)
    figures = json.loads(out)
    assert code == 0 and list(figures["seconds"]) == ["1", "2"] and figures["edits"] == 3
    assert figures["report"]["generated"] is None and figures["report"]["context"] == "plain"
    checked(tmp_path / "run" / "report.html")


def test_a_run_that_was_cut_off_keeps_its_checkpoints(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "edits.jsonl", [e | {"rephrases": [e["prompt"] + "?"]} for e in MORE])
    command = ["bench", "quality", file, "--model", tiny, "--out", tmp_path / "run", "--controls", "0", "--json",
               "--data", tmp_path, "--every", "3"]  # fmt: skip

    def cut_off(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(quality, "measure", cut_off)
        assert run(capsys, *command)[0] == 130
    left = json.loads((tmp_path / "run" / "passed.json").read_text())
    assert [c["edits"] for c in left["checkpoints"]] == [10, 12] and len(left["seconds"]) == 12
    left["checkpoints"][0]["reliability"] = 0.125  # what is known is not asked again of a store that has grown since
    (tmp_path / "run" / "passed.json").write_text(json.dumps(left))
    other = write(tmp_path / "other.jsonl", MORE[1:])
    refused(capsys, tmp_path / "run" / "store", "holds an interrupted run of other edits", "bench", "quality", other,
            "--model", tiny, "--out", tmp_path / "run", "--data", tmp_path)  # fmt: skip
    code, out, _ = run(capsys, *command)
    figures = json.loads(out)
    assert code == 0 and [c["edits"] for c in figures["checkpoints"]] == [10, 12]
    assert figures["checkpoints"][0]["reliability"] == 0.125 and len(figures["seconds"]) == 12
    assert (figures["edits"], figures["stored"], figures["every"], figures["report"]["edits"]) == (12, 12, 3, 4)
    assert [edit["id"] for edit in figures["per_edit"]] == [0, 3, 6, 9]
    assert not (tmp_path / "run" / "passed.json").exists()
    page = checked(tmp_path / "run" / "report.html")
    assert any("one of 3 asked" in text for text in page.text["p"])


def test_a_run_that_passed_no_checkpoint_is_of_its_edits_too(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = write(tmp_path / "edits.jsonl", MORE[:2]), write(tmp_path / "other.jsonl", MORE[1:3])
    command = ["--model", tiny, "--out", tmp_path / "run", "--controls", "0", "--json", "--data", tmp_path]

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(quality, "asked_back", cut_off)
        assert run(capsys, "bench", "quality", file, *command)[0] == 130
    assert not (tmp_path / "run" / "passed.json").exists()
    refused(capsys, tmp_path / "run" / "store", "holds a run of other edits .1 of them", "bench",
            "quality", other, *command)  # fmt: skip
    code, out, _ = run(capsys, "bench", "quality", file, *command)
    assert code == 0 and json.loads(out)["edits"] == 2


def test_what_a_run_cannot_do_is_said_before_it_starts(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "edits.jsonl", MORE)
    begin = ("bench", "quality", file, "--out", tmp_path / "run")
    refused(capsys, store, "no setting has that name; choose one of contexts", *begin, "--training", "steps=3")
    refused(
        capsys,
        store,
        "training variants=many is out of range: choose a whole number of 0 or more",
        *begin,
        "--training",
        "variants=many",
    )
    refused(capsys, store, "choose one of zsre", "bench", "quality", "zsr", "--out", tmp_path / "run")
    refused(capsys, store, "--data or MEMOIR_DATA", "bench", "quality", "zsre", "--out", tmp_path, "--data", tmp_path)
    refused(capsys, store, "holds no run", "report", tmp_path)
    (tmp_path / "run.json").write_text("{}")
    refused(capsys, store, "is not a run of this version", "report", tmp_path)
    assert not (tmp_path / "run").exists()


def test_calibration_draws_its_overlaps(capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "edits.jsonl", EDITS)
    code, _, _ = run(capsys, "calibrate", store, file, "--html", tmp_path / "page.html")
    page = checked(tmp_path / "page.html")
    assert code == 0 and sum(tag == "svg" for tag, _ in page.tags) == 2
    counts = [int(match[1]) for text in page.text["text"] if (match := re.fullmatch(r".+ \((\d+)\)", text))]
    assert counts == [2, 1, 101]  # edits, rephrasings, unrelated prompts
    refused(capsys, store, "choose another --html", "calibrate", store, file, "--html", tmp_path / "no" / "page.html")


def test_calibration_draws_layers(capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "edits.jsonl", EDITS)
    code, _, _ = run(capsys, "calibrate", "--model", tiny, file, "--layers", "0,1", "--ks", "8,16", "--html",
                     tmp_path / "page.html")  # fmt: skip
    page = checked(tmp_path / "page.html")
    assert code == 0 and sum(tag == "polyline" for tag, _ in page.tags) == 2  # a line for each k
    assert len([cell for cell in page.text["td"] if cell in ("8", "16")]) == 4


def test_sizes_that_are_not_drawn_are_said_to_be() -> None:
    settings = [Setting(layer, k, 0.5, 0.9, 0.1) for layer in (0, 1) for k in range(8, 14)]
    page = settings_page(settings, "m")
    assert page.count("<polyline") == 4 and "The 4 largest k of 6; the table has them all." in page
    assert "largest k" not in settings_page([setting for setting in settings if setting.k < 12], "m")


def test_bars_hold_every_value() -> None:
    page = Page(histograms({"some": [0.5, 0.51, 0.7, 1.0, 1.0]}, {"tau": 0.55}))
    titles = page.text["title"]
    assert titles == ["0.50 to 0.52: 2", "0.70 to 0.72: 1", "0.98 to 1.00: 2"]
    assert "tau 0.55" in page.text["text"]


def test_lines_lie_inside_their_frame() -> None:
    for log_x in (False, True):
        page = Page(lines([Series("a", [(1, 0.2), (10, 1.0), (1000, 0.6)], 1)], x_name="x", y_name="y", log_x=log_x))
        box = [float(n) for tag, attrs in page.tags if tag == "svg" for n in str(attrs["viewbox"]).split()]
        spots = [(float(str(a["cx"])), float(str(a["cy"]))) for tag, a in page.tags if tag == "circle"]
        assert len(spots) == 3 and all(0 < x < box[2] and 0 < y < box[3] for x, y in spots)
        assert spots[1][1] < spots[2][1] < spots[0][1]  # more is higher
    assert "circle" in lines([Series("one", [(5, 0.0)], 1)], x_name="x", y_name="y")  # a single point is no error


def test_checkpoints() -> None:
    assert checkpoints(5) == [5] and checkpoints(10) == [10] and checkpoints(1000) == [10, 30, 100, 300, 1000]


@needs_sets
def test_every_data_set_has_its_file() -> None:
    for name in DATA_SETS:
        assert len(read_edits(data_file(name, SETS))) >= 75
    with pytest.raises(ConfigError, match="'nq' is neither a file nor a data set"):
        data_file("nq", SETS)
