"""The HTML page of a run or of a calibration: one file that asks the network for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from memoir_retrieval.evaluation.calibration import Calibration, Setting
from memoir_retrieval.evaluation.methods_run import ChangedShares, CurvePoint, MethodScores
from memoir_retrieval.evaluation.quality_run import Run
from memoir_retrieval.evaluation.report.charts import Series, bars, histograms, lines
from memoir_retrieval.evaluation.routing_data import PARTS
from memoir_retrieval.evaluation.routing_run import RoutingRun, Row
from memoir_retrieval.evaluation.scores import Scores

__all__ = [
    "METHOD_FIGURES",
    "calibration_page",
    "latency_page",
    "method_figures",
    "methods_page",
    "routing_page",
    "run_page",
    "settings_page",
    "shares_cell",
]

AGES = 10
"""Bars of the picture of forgetting."""
DRAWN = 4
"""Lines of the picture of layers: the page has so many colours."""
SHOWN = 100
"""Edits listed at most."""
SHOWN_LETTERS = 300
"""Of a message that got the wrong edit."""
METHOD_FIGURES = ("rel", "gen", "loc", "avg", "exact", "contains")
"""What a method answers, in the columns of a table."""

STYLE = """
:root{--page:#fff;--ink:#1b1f24;--dim:#667;--rule:#d9dce1;--c1:#2563a8;--c2:#d9822b;--c3:#6b8e4e;--c4:#8a5a9e}
@media(prefers-color-scheme:dark){:root{--page:#16191d;--ink:#e6e8eb;--dim:#9aa3ad;--rule:#343a41;--c1:#6aa5e8;
--c2:#e9a35b;--c3:#98bd79;--c4:#bd90d1}}
body{background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif;max-width:780px;margin:2em auto;
padding:0 1em}h1{font-size:1.5em}h2{font-size:1.1em;margin:2.2em 0 .3em}p,code{color:var(--dim)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}td,th{padding:.25em .6em .25em 0;
text-align:left;border-bottom:1px solid var(--rule);vertical-align:top}th{font-weight:600}.wide{overflow-x:auto}
svg{width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:var(--dim)}.grid{stroke:var(--rule)}
.axis{stroke:var(--dim)}.mark{stroke:var(--ink);stroke-dasharray:4 3}polyline{fill:none;stroke-width:2}
.c1{fill:var(--c1)}.c2{fill:var(--c2)}.c3{fill:var(--c3)}.c4{fill:var(--c4)}.s1{stroke:var(--c1)}.s2{stroke:var(--c2)}
.s3{stroke:var(--c3)}.s4{stroke:var(--c4)}
"""


def run_page(run: Run) -> str:
    """The report of a quality run.

    run: as it was written.
    """
    report = run.report
    share = "all" if run.every == 1 else f"one of {run.every}"
    parts = [
        f"<h1>{run.edits} edits of {escape(Path(run.data).name)} on {escape(Path(run.model).name)}</h1>",
        f"<p>Trained one after another, {run.stored} stored, {share} asked after the last. {escape(run.started)}, "
        "memoir-retrieval "
        f"{escape(run.library)}.<br><code>{escape(run.command)}</code></p>",
        _section("Scores", _scores([report, *report.contexts.values()])),
        _section("Beyond the edited questions", _further(run)),
    ]
    if run.calibration:
        parts += _overlaps(run.calibration)
    if len(run.checkpoints) > 1:
        series = [
            Series("reliability", [(c.edits, c.reliability) for c in run.checkpoints], 1),
            Series("own edit found", [(c.edits, c.found) for c in run.checkpoints], 2),
        ]
        low = _below(value for line in series for _, value in line.points)
        picture = lines(series, x_name="edits so far", y_name="share", y_range=(low, 1.0), log_x=True)
        parts.append(_section("Accuracy against number of edits", picture, "All edits so far, asked during the run."))
    parts.append(_section("Accuracy by age of the edit", _ages(run), _AGES_NOTE))
    if run.seconds:
        series = [Series("seconds", [(i + 1, taken) for i, taken in sorted(run.seconds.items())], 1, dots=True)]
        note = f"Median {run.edit_seconds:g} s per edit, checkpoints of the store included."
        parts.append(_section("Time per edit", lines(series, x_name="edit", y_name="seconds"), note))
    parts.append(_section("Edits that are not answered exactly", _failed(run)))
    parts.append(_section("Settings", _table([("setting", "value"), *_flat(run.settings)])))
    return _page(f"{run.edits} edits of {Path(run.data).name}", parts)


def calibration_page(calibration: Calibration, store: str) -> str:
    """The report of `memoir calibrate DIR`.

    calibration: of the store.
    store: its folder.
    """
    rows = [
        ("prompt", "nearest edit", "overlap"),
        *((n.prompt, n.edit, f"{n.overlap:.3f}") for n in calibration.nearest),
    ]
    parts = [f"<h1>Overlaps of {escape(store)}</h1>", *_overlaps(calibration)]
    parts.append(_section("Unrelated prompts nearest to an edit", _table(rows)))
    return _page(f"Overlaps of {store}", parts)


def settings_page(settings: Sequence[Setting], model: str) -> str:
    """The report of `memoir calibrate --model`: layers and sizes of masks.

    settings: the best first.
    model: its name.
    """
    ks = sorted({setting.k for setting in settings}, reverse=True)
    series = [
        Series(f"k {k}", sorted((float(s.layer), s.rephrases_found) for s in settings if s.k == k), colour)
        for colour, k in enumerate(ks, 1)
    ]
    rows: list[Sequence[Any]] = [("layer", "k", "tau", "rephrasings found", "gap")]
    rows += [(s.layer, s.k, f"{s.tau:g}", f"{s.rephrases_found:.3f}", f"{s.gap:+.3f}") for s in settings]
    note = f"The {DRAWN} largest k of {len(ks)}; the table has them all." if len(ks) > DRAWN else ""
    picture = lines(series[:DRAWN], x_name="layer", y_name="rephrasings found at the suggested tau", y_range=(0.0, 1.0))
    parts = [f"<h1>Layers of {escape(model)}</h1>", _section("Where edits stand apart", picture, note)]
    return _page(f"Layers of {model}", [*parts, _section("Best first", _table(rows))])


def routing_page(run: RoutingRun) -> str:
    """The report of `memoir bench routing`.

    run: as it was written.
    """
    of = f"{run.settings['edits']} edits of {Path(run.model).name}"
    stored = f", {run.stored[0]} of {run.stored[1]} edits of the help page stored" if run.stored else ""
    parts = [
        f"<h1>Which edit a message gets: {escape(of)}</h1>",
        f"<p>{sum(row.asked for row in run.rows)} messages in {run.seconds:g} s{stored}. {escape(run.started)}, "
        f"memoir-retrieval {escape(run.library)}.<br><code>{escape(run.command)}</code></p>",
    ]
    wanted = [row for row in run.rows if row.found is not None]
    for kind in dict.fromkeys(row.kind for row in wanted):
        picture = _shares([row for row in wanted if row.kind == kind], lambda row: row.found)
        parts.append(_section(f"Own edit found: {kind}", picture, "More is better."))
    unwanted = [row for row in run.rows if row.found is None]
    for kind in dict.fromkeys(row.kind for row in unwanted):
        picture = _shares([row for row in unwanted if row.kind == kind], lambda row: row.other)
        parts.append(_section(f"An edit acts where none may: {kind}", picture, "Less is better."))
    columns = ("set", "kind", "name", "part", "edits", "asked", "found", "other", "exact", "answered", "lost")
    rows = [["" if (value := _cell(row, c)) is None else value for c in columns] for row in run.rows]
    parts.append(_section("All figures", _table([columns, *rows])))
    slips = [
        (row.name, slip.message[:SHOWN_LETTERS], "none" if slip.edit is None else slip.edit, slip.overlap)
        for row in run.rows
        for slip in row.slips
    ]
    if slips:
        head = ("row", "message", "edit", "overlap")
        parts.append(_section("Messages that got the wrong edit, or none", _table([head, *slips])))
    parts.append(_section("Settings", _table([("setting", "value"), *_flat(run.settings)])))
    return _page("Which edit a message gets", parts)


def _cell(row: Row, column: str) -> Any:
    value = getattr(row, column)
    return ", ".join(f"{reason} {n}" for reason, n in value.items()) if isinstance(value, dict) else value


def _shares(rows: Sequence[Row], share: Callable[[Row], float | None]) -> str:
    """A bar for each part of what has one name in one set."""
    several = len({row.set for row in rows}) > 1
    sizes = {name: len({row.edits for row in rows if row.set == name}) for name in {row.set for row in rows}}
    by_name: dict[str, list[float | None]] = {}
    for row in rows:
        name = f"{row.set}: {row.name}" if several else row.name
        name += f" ({row.edits} edits)" if sizes[row.set] > 1 else ""
        by_name.setdefault(name, [None] * len(PARTS))[PARTS.index(row.part)] = share(row)
    return bars(by_name, PARTS)


_AGES_NOTE = "Left the newest edits, right the oldest, which most later ones may have overwritten."


def methods_page(results: Sequence[MethodScores], data: str, model: str) -> str:
    """The report of `memoir bench methods`: what each method answers after the last edit, and on the way there.

    results: of the methods.
    data, model: their names.
    """
    title = f"{results[0].edits} edits of {Path(data).name} on {Path(model).name}"
    shares = {
        scores.method: (scores.exact.edits, scores.exact.rephrases, _kept(scores.changed), scores.average)
        for scores in results
    }
    columns = ("edits", "rephrasings", "unrelated kept", "avg")
    parts = [f"<h1>{escape(title)}</h1>", _section("After the last edit", bars(shares, columns), _METHODS_NOTE)]
    for scores in results:
        points = [*scores.curve, scores]
        if len(points) > 1:
            at = scores.diverged
            note = f"Unrelated text was ten times as unlikely from edit {at} on." if at else ""
            parts.append(_section(scores.method, _course(points), note))
    rows = [
        [scores.method, point.edits, *method_figures(point), f"{point.perplexity:.3g}"]
        for scores in results
        for point in (*scores.curve, scores)
    ]
    parts.append(_section("All figures", _table([["method", "edits", *METHOD_FIGURES, "perplexity"], *rows])))
    return _page("Methods", parts)


_METHODS_NOTE = (
    "Free answers that are the target, of edits and of their rephrasings; free answers to unrelated questions that are "
    "the base model's; the mean of the teacher-forced scores. More is better."
)


def _kept(changed: ChangedShares) -> float | None:
    share = changed.controls if changed.questions is None else changed.questions
    return None if share is None else 1 - share


def _course(points: Sequence[CurvePoint]) -> str:
    """A method's shares over the number of edits."""
    shares: dict[str, list[float | None]] = {
        "exact edits": [point.exact.edits for point in points],
        "exact rephrasings": [point.exact.rephrases for point in points],
        "reliability": [point.reliability for point in points],
        "locality": [point.locality for point in points],
    }
    series = [
        Series(name, [(p.edits, y) for p, y in zip(points, values, strict=True) if y is not None], colour)
        for colour, (name, values) in enumerate(shares.items(), 1)
    ]
    drawn = [line for line in series if line.points]
    return lines(drawn, x_name="edits", y_name="share", y_range=(0.0, 1.0), log_x=True)


def method_figures(point: CurvePoint) -> list[str]:
    """The cells of `METHOD_FIGURES`. Free answers are those to edits / to their rephrasings.

    point: what a method answered.
    """
    teacher = (point.reliability, point.generality, point.locality, point.average)
    free = (shares_cell(both.edits, both.rephrases) for both in (point.exact, point.contains))
    return [*map(shares_cell, teacher), *free]


def shares_cell(*shares: float | None) -> str:
    """Shares in one cell of a table, with a slash between.

    shares: None for what is not known.
    """
    return " / ".join("" if share is None else f"{share:.3f}" for share in shares)


def latency_page(rows: Sequence[dict[str, Any]], model: str) -> str:
    """Charts of what `memoir bench latency` prints, medians over the size of the store, and all its rows.

    rows: as it prints them.
    model: its name.
    """
    parts = [f"<h1>Latency of {escape(Path(model).name)} served with edits</h1>"]
    names = {"first_token": "Time to the first token", "between_tokens": "Between tokens", "lookup": "Lookup alone"}
    for what, title in names.items():
        for at_a_time in sorted({row["concurrent"] for row in rows}):
            by_kind: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                if (row["what"], row["concurrent"]) == (what, at_a_time):
                    by_kind.setdefault(row["kind"], []).append((row["edits"], row["p50"]))
            series = [Series(kind, points, colour) for colour, (kind, points) in enumerate(by_kind.items(), 1)]
            if series:
                picture = lines(series, x_name="stored edits", y_name="milliseconds, median", log_x=True)
                parts.append(_section(f"{title}, {at_a_time} at a time", picture))
    columns = ("what", "kind", "edits", "concurrent", "p50", "p95", "p99", "samples")
    parts.append(
        _section("All figures in milliseconds", _table([columns, *([row[c] for c in columns] for row in rows)]))
    )
    return _page("Latency", parts)


def _overlaps(calibration: Calibration) -> list[str]:
    kinds = {
        "edits": calibration.overlaps.edits,
        "rephrasings": calibration.overlaps.rephrases,
        "unrelated prompts": calibration.overlaps.unrelated,
    }
    now, suggested = calibration.now, calibration.suggested
    marks = {"tau": now.tau}
    if suggested.tau != now.tau:
        marks["suggested"] = suggested.tau
    note = (
        "Edits and rephrasings with their own edit's mask, unrelated prompts with the mask nearest to them. At tau "
        f"{now.tau:g} {now.rephrases_found:.3f} of the rephrasings find their edit and "
        f"{now.unrelated_matched:.3f} of the unrelated prompts match one; suggested is {suggested.tau:g} "
        f"({suggested.rephrases_found:.3f} and {suggested.unrelated_matched:.3f})."
    )
    curve = [
        Series("rephrasings found", [(p.tau, p.rephrases_found) for p in calibration.curve], 2),
        Series("unrelated matched", [(p.tau, p.unrelated_matched) for p in calibration.curve], 3),
    ]
    return [
        _section("Overlap", histograms(kinds, marks), note),
        _section("What a tau does", lines(curve, x_name="tau", y_name="share", y_range=(0.0, 1.0), marks=marks)),
    ]


def _scores(contexts: Sequence[Scores]) -> str:
    """A column for each context."""
    rows: list[Sequence[Any]] = [("score", *(s.context.replace("all", "plain") for s in contexts))]
    names = {
        "reliability": lambda s: s.reliability,
        "generality": lambda s: s.generality,
        "locality": lambda s: s.locality,
        "neighbourhood unchanged": lambda s: s.neighbourhood,
        "exact answers, edits": lambda s: s.exact_match.edits,
        "exact answers, rephrasings": lambda s: s.exact_match.rephrases,
        "edits found": lambda s: s.match.edits_right,
        "rephrasings found": lambda s: s.match.rephrases_right,
        "unrelated that match": lambda s: s.match.false_rate if s.locality is not None else None,
        "unrelated answered as before": lambda s: s.generated and s.generated.identical,
        "perplexity of the targets": lambda s: s.perplexity,
    }
    for name, read in names.items():
        values = [read(s) for s in contexts]
        if any(value is not None for value in values):
            rows.append((name, *("" if value is None else f"{value:.3f}" for value in values)))
    return _table(rows)


def _further(run: Run) -> str:
    report = run.report
    measured = {"portability": report.portability, "other words": report.ood, "unrelated text": report.text}
    rows = [
        (name, what, f"{value:.4g}" if isinstance(value, float) else value)
        for name, scores in measured.items()
        if scores
        for what, value in msgspec.structs.asdict(scores).items()
    ]
    return _table([("measured on", "what", "value"), *rows]) if rows else "<p>Nothing in the file to measure.</p>"


def _ages(run: Run) -> str:
    newest = run.per_edit[::-1]
    bins = min(AGES, len(newest))
    edges = [len(newest) * i // bins for i in range(bins + 1)]
    groups = [newest[a:b] for a, b in pairwise(edges)]
    middle = [run.every * (a + b - 1) / 2 for a, b in pairwise(edges)]
    series = [
        Series("reliability", [(x, fmean(o.reliability for o in g)) for x, g in zip(middle, groups, strict=True)], 1),
        Series("exact answers", [(x, fmean(o.exact for o in g)) for x, g in zip(middle, groups, strict=True)], 4),
    ]
    low = _below(value for line in series for _, value in line.points)
    return lines(series, x_name="edits made after it", y_name="share", y_range=(low, 1.0))


def _failed(run: Run) -> str:
    failed = [o for o in run.per_edit if not o.exact]
    if not failed:
        return "<p>None.</p>"
    rows = [("edit", "found", "reliability", "perplexity of the target")]
    rows += [
        (
            str(o.id) if o.id >= 0 else "not stored",
            "yes" if o.found else "no",
            f"{o.reliability:.3f}",
            str(o.perplexity),
        )
        for o in failed[:SHOWN]
    ]
    more = f"<p>The first {SHOWN} of {len(failed)}; run.json has them all.</p>" if len(failed) > SHOWN else ""
    return _table(rows) + more


def _below(values: Iterable[float]) -> float:
    """Where the axis of a share begins: a tenth below the smallest value that is shown."""
    return max(0.0, int(min(values) * 10 - 1) / 10)


def _flat(settings: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in settings.items():
        rows += _flat(value, f"{before}{key}.") if isinstance(value, dict) else [(before + key, value)]
    return rows


def _section(title: str, content: str, note: str = "") -> str:
    return f"<h2>{escape(title)}</h2>" + (f"<p>{escape(note)}</p>" if note else "") + content


def _table(rows: Sequence[Sequence[Any]]) -> str:
    head, *body = rows
    cells = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    lines_ = "".join("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in body)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{lines_}</tbody></table></div>'


def _page(title: str, parts: Sequence[str]) -> str:
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{"".join(parts)}</body></html>'
    )
