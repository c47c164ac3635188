"""`memoir bench quality`: edit a data set, measure it and report it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click
import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from memoir_retrieval.cli.common import echo_json, json_option, notes, require_place, tables, threads_option
from memoir_retrieval.cli.evaluate import flat
from memoir_retrieval.cli.options import (
    MeasuringOptions,
    ModelOptions,
    StoreSettings,
    TrainingOptions,
    data_folder_option,
    measuring_options,
    model_options,
    require_subject_option,
    require_typed_subjects,
    store_settings_options,
    training_options,
)
from memoir_retrieval.cli.report import PAGE
from memoir_retrieval.edits.files import FORMATS, check_duplicates, limit_distinct_subjects, read_edits
from memoir_retrieval.evaluation.datasets import TEXT, data_file
from memoir_retrieval.store.files import publish

__all__ = ["bench_quality"]

COLUMNS = (
    TextColumn("editing"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("loss {task.fields[loss]:.3f}"),
    TimeRemainingColumn(),
)


@click.command("quality")
@click.argument("data", metavar="DATA")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the run; made if new.")
@click.option("--edits", "count", type=click.IntRange(min=1), help="Only the first N edits (default: all of them).")
@click.option(
    "--distinct", is_flag=True, help="Only the first edit of each subject, as --limit of other commands does."
)
@data_folder_option
@click.option(
    "--format", "file_format", type=click.Choice(list(FORMATS)), help="Format of the file (default: detected)."
)
@require_subject_option
@click.option(
    "--every", type=click.IntRange(min=1), default=1, show_default=True, help="Train all edits, but ask every Nth only."
)
@measuring_options(usual="all with --chat, else plain", text="WikiText in --data")
@store_settings_options(chat=False)
@training_options
@model_options(default="smollm2-135m", dtype="float32 (default), bfloat16 or float16.")
@json_option
@threads_option
def bench_quality(
    data: str,
    out: Path,
    count: int | None,
    distinct: bool,
    folder: Path,
    file_format: str | None,
    require_subject: bool,
    every: int,
    measuring: MeasuringOptions,
    settings: StoreSettings,
    training: TrainingOptions,
    model: ModelOptions,
    as_json: bool,
) -> None:
    """Train the edits of DATA, a file or a data set's name, one after another, and measure on the way and at the end.

    The folder --out then holds the store, run.json with every figure, and report.html with the pictures. If a run is
    interrupted, the same command goes on with it.


    \b
    Names: zsre, zsre-train, zsre-knowedit, selfcheckgpt, temporal, counterfact, counterfact-neighbours, wikifactdiff,
    mquake, wiki-recent, wiki-counterfact, hallueditbench, qaedit.

    \b
    Example:
      memoir bench quality zsre --edits 100 --out run
      memoir bench quality corrections.jsonl --chat --out run --json
    """
    require_place(out, "the run", "--out", folder=True)
    records = read_edits(data_file(data, folder), file_format, note=notes.print)
    edits = check_duplicates(records, "first", most=None if distinct else count)
    edits = limit_distinct_subjects(edits, count or len(edits)) if distinct else edits
    edits = require_typed_subjects(edits, data) if require_subject else edits
    texts = measuring.texts(folder / TEXT)

    from memoir_retrieval.editing.editor import Editor
    from memoir_retrieval.evaluation.quality_run import run_quality
    from memoir_retrieval.evaluation.report import run_page

    chosen = settings.to_settings(training)  # refused before the model is loaded
    base = model.load(layer=settings.layer, place=settings.place)
    editor = Editor(base, out / "store", **settings.for_editor(chat=False), training=chosen.training)
    out.mkdir(parents=True, exist_ok=True)
    with Progress(*COLUMNS, console=notes, disable=as_json) as bar:
        task = bar.add_task("", total=len(edits), loss=float("nan"))
        run = run_quality(
            editor,
            edits,
            out,
            command=shlex.join(["memoir", *sys.argv[1:]]),
            data=data,
            context=measuring.context or ("all" if settings.chat else "plain"),
            controls=measuring.controls,
            texts=texts,
            side_by_side=training.side_by_side,
            every=every,
            tell=notes.print,
            progress=lambda now: bar.update(task, advance=1, loss=now.edit.loss if now.edit else float("nan")),
        )
    publish(out / PAGE, run_page(run).encode())
    notes.print(f"written to {out / PAGE}")
    if as_json:
        echo_json(msgspec.to_builtins(run, str_keys=True))
        return
    table = Table("score", "value", title=f"{run.edits} edits of {data}")
    for name, score in flat(msgspec.to_builtins(run.report)).items():
        table.add_row(name, f"{score:.4f}" if isinstance(score, float) else str(score))
    tables.print(table)
