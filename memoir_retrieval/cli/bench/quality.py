"""`memoir bench quality`: edit a data set, measure it and report it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click
import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from memoir_retrieval.cli.common import (
    echo_json,
    json_option,
    notes,
    require_subject_option,
    tables,
    threads_option,
    training_option,
    training_settings,
)
from memoir_retrieval.cli.evaluate import flat
from memoir_retrieval.cli.report import PAGE
from memoir_retrieval.edits.files import FORMATS, check_duplicates, limit_distinct_subjects, read_edits
from memoir_retrieval.edits.requires import require_subjects
from memoir_retrieval.evaluation.contexts import CONTEXTS
from memoir_retrieval.evaluation.datasets import TEXT, data_file
from memoir_retrieval.evaluation.texts import read_texts
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
@click.option("--distinct", is_flag=True, help="Only the first edit of each subject.")
@click.option("--model", "-m", default="smollm2-135m", show_default=True, help="Folder, embedded model or Hub id.")
@click.option("--chat/--no-chat", default=False, help="Ask through the chat template, or raw as published (default).")
@click.option(
    "--context",
    type=click.Choice([*CONTEXTS, "all"]),
    help="Where the edits are asked (default: all with --chat, else plain); see `memoir eval`.",
)
@click.option(
    "--data",
    "folder",
    type=click.Path(path_type=Path),
    envvar="MEMOIR_DATA",
    default="data",
    show_default=True,
    help="Folder of the published data sets; the variable MEMOIR_DATA names it, too.",
)
@click.option(
    "--format", "file_format", type=click.Choice(list(FORMATS)), help="Format of the file (default: detected)."
)
@require_subject_option
@click.option("--layer", type=int, help="Block whose FFN projection is edited (default: the preset's).")
@click.option("--k", type=int, help="Ones in every mask (default: the preset's).")
@click.option("--tau", type=float, help="Least overlap that matches, in (0, 1] (default: the preset's).")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the permutation and of training.")
@training_option
@click.option(
    "--side-by-side", type=click.IntRange(min=1), metavar="N", help="Memories trained at a time; see `memoir edit`."
)
@click.option(
    "--every", type=click.IntRange(min=1), default=1, show_default=True, help="Train all edits, but ask every Nth only."
)
@click.option("--controls", type=click.IntRange(0, 256), default=256, show_default=True, help="See `memoir eval`.")
@click.option(
    "--text", "text_file", type=click.Path(path_type=Path), help="Unrelated text (default: WikiText in --data)."
)
@click.option("--device", default="cpu", show_default=True, help="Where the model runs, such as cuda.")
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16 or float16.")
@json_option
@threads_option
def bench_quality(
    data: str,
    out: Path,
    count: int | None,
    distinct: bool,
    model: str,
    chat: bool,
    context: str | None,
    folder: Path,
    file_format: str | None,
    require_subject: bool,
    layer: int | None,
    k: int | None,
    tau: float | None,
    seed: int,
    training: tuple[str, ...],
    side_by_side: int | None,
    every: int,
    controls: int,
    text_file: Path | None,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Edit one after another what DATA, a file or a data set's name, has to correct; ask on the way and at the end.

    The folder --out gets the store, run.json with every figure, and report.html with the pictures. An interrupted run
    goes on with the same command.

    \b
    Names: zsre, zsre-train, zsre-knowedit, selfcheckgpt, temporal, counterfact, counterfact-neighbours, wikifactdiff,
    mquake, wiki-recent, wiki-counterfact, hallueditbench.

    \b
    Example:
      memoir bench quality zsre --edits 100 --out run
      memoir bench quality corrections.jsonl --chat --out run --json
    """
    edits = check_duplicates(read_edits(data_file(data, folder), file_format, note=notes.print), "first")
    edits = limit_distinct_subjects(edits, len(edits))[:count] if distinct else edits[:count]
    edits = require_subjects(edits) if require_subject else edits
    if text_file is None and (folder / TEXT).is_file():
        text_file = folder / TEXT
    texts = read_texts(text_file) if text_file else []

    from memoir_retrieval.editing.editor import Editor
    from memoir_retrieval.evaluation.quality_run import run_quality
    from memoir_retrieval.evaluation.report import run_page
    from memoir_retrieval.model.base import load_model
    from memoir_retrieval.store.settings import Settings

    chosen = training_settings(training)
    Settings.given(training=chosen)  # refused before the model is loaded
    notes.print(f"loading {model}")
    base = load_model(model, layer=layer, dtype=dtype, device=device)
    editor = Editor(base, out / "store", chat=chat, k=k, tau=tau, seed=seed, training=chosen)
    out.mkdir(parents=True, exist_ok=True)
    with Progress(*COLUMNS, console=notes, disable=as_json) as bar:
        task = bar.add_task("", total=len(edits), loss=float("nan"))
        run = run_quality(
            editor,
            edits,
            out,
            command=shlex.join(["memoir", *sys.argv[1:]]),
            data=data,
            context=context or ("all" if chat else "plain"),
            controls=controls,
            texts=texts,
            side_by_side=side_by_side,
            every=every,
            tell=notes.print,
            progress=lambda told: bar.update(task, advance=1, loss=told.edit.loss if told.edit else float("nan")),
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
