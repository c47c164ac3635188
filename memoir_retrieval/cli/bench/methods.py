"""`memoir bench methods`: other editing methods on the same edits."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.table import Table

from memoir_retrieval.cli.common import echo_json, json_option, notes, require_place, tables, threads_option
from memoir_retrieval.cli.options import ModelOptions, data_folder_option, model_options
from memoir_retrieval.edits.files import FORMATS, check_duplicates, read_edits
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.evaluation.datasets import STATISTICS, data_file
from memoir_retrieval.evaluation.methods import LOCATED, METHODS, check_methods
from memoir_retrieval.store.files import publish

if TYPE_CHECKING:
    from memoir_retrieval.evaluation.methods_run import MethodScores

__all__ = ["bench_methods"]

TABLE, PAGE = "methods.md", "methods.html"


@click.command("methods")
@click.argument("data", metavar="DATA")
@click.option("--edits", "count", type=click.IntRange(min=1), default=30, show_default=True, help="The first N edits.")
@click.option(
    "--method",
    "names",
    multiple=True,
    type=click.Choice(list(METHODS)),
    help="What to compare; may be repeated (default: everything).",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the run; methods that have scores in it are not run again, and its table and page have all.",
)
@click.option(
    "--end-token/--no-end-token",
    "end",
    default=True,
    help="Train the token that ends an answer too, or the target alone, as most papers do (memoir always trains it).",
)
@click.option(
    "--alone", is_flag=True, help="Make each edit alone, on the unedited model; scores are means over the edits."
)
@click.option(
    "--controls",
    type=click.IntRange(0, 256),
    default=64,
    show_default=True,
    help="Unrelated prompts of each kind whose free answers are compared with the base model's.",
)
@data_folder_option
@click.option(
    "--format", "file_format", type=click.Choice(list(FORMATS)), help="Format of the file (default: detected)."
)
@model_options(default="smollm2-135m", dtype=None)
@json_option
@threads_option
def bench_methods(
    data: str,
    count: int,
    names: tuple[str, ...],
    out: Path | None,
    end: bool,
    alone: bool,
    controls: int,
    folder: Path,
    file_format: str | None,
    model: ModelOptions,
    as_json: bool,
) -> None:
    """Compare methods: each makes the edits of DATA, a file or a data set's name, and is then asked them all.

    rel, gen, loc and avg are teacher-forced, as papers measure. exact and contains are shares of free answers, which
    end where the model ends them, of the edits and of their rephrasings. changed is the share of unrelated prompts
    whose free answer changed, of the edits' unrelated questions and of the library's prompts. perplexity is that of
    prompts of the library, as a multiple of the base model's, and names the edit at which it was seen above 10. Stores
    set tau by the library's prompts, so memoir and reading may do better on them than elsewhere. Prompts are raw, the
    model is in float32. The page in the folder of --out has pictures, also of what methods answer after the first 1,
    10, 100 ... edits.

    \b
    Example:
      memoir bench methods examples/zsre-100.jsonl --edits 30 --method memoir --method ft --method grace
      memoir bench methods zsre --edits 100 --out methods
    """
    if out is not None:
        require_place(out, "the run", "--out", folder=True)
    edits = check_duplicates(read_edits(data_file(data, folder), file_format, note=notes.print), "first", most=count)
    if not edits:
        raise ConfigError(f"{data} has no edits: give a file that has some")
    if len(edits) < count:
        notes.print(f"{data} has only {len(edits)} edits with distinct prompts")

    from memoir_retrieval.background import background_prompts
    from memoir_retrieval.evaluation.methods.located import texts_needed
    from memoir_retrieval.evaluation.methods_run import known_scores, method_file, run_method, unedited_answers
    from memoir_retrieval.evaluation.report import METHOD_FIGURES, methods_page
    from memoir_retrieval.evaluation.texts import read_texts

    base = model.load()
    corpus = folder / STATISTICS
    texts = read_texts(corpus, most=texts_needed(base)) if corpus.is_file() else background_prompts()
    known: dict[Hashable, Any] = {}
    check_methods((name for name in names or METHODS if not (out and method_file(out, name).exists())), base)
    if set(names or METHODS) & set(LOCATED):
        from memoir_retrieval.evaluation.methods.located import corpus as corpus_of

        known["corpus"] = corpus_of(base, texts)
    answers = cache(lambda: unedited_answers(base, edits, controls, alone=alone, folder=out))
    if out:
        out.mkdir(parents=True, exist_ok=True)
    results: list[MethodScores] = []
    head = ("method", *METHOD_FIGURES, "changed", "perplexity", "s/edit", "MB/edit")
    for name in names or METHODS:
        results.append(
            run_method(
                name,
                base,
                edits,
                answers,
                end=end,
                alone=alone,
                controls=controls,
                texts=texts,
                known=known,
                folder=out,
                tell=notes.print,
            )
        )
        if out:  # after each method: the next may fail
            there = known_scores(out, results[0].data)
            lines = [head, ["---"] * len(head), *map(_cells, there)]
            publish(out / TABLE, "".join(f"| {' | '.join(line)} |\n" for line in lines).encode())
            publish(out / PAGE, methods_page(there, data, base.name).encode())
    if out:
        notes.print(f"written to {out / TABLE} and {out / PAGE}")
    if as_json:
        echo_json(msgspec.to_builtins(results))
        return
    table = Table(*head, title=f"{len(edits)} edits of {data}")
    for result in results:
        table.add_row(*_cells(result))
    tables.print(table)


def _cells(scores: MethodScores) -> list[str]:
    from memoir_retrieval.evaluation.report import method_figures, shares_cell

    changed = shares_cell(scores.changed.questions, scores.changed.controls) if scores.controls else ""
    at = f" (edit {scores.diverged})" if scores.diverged else ""
    cost = (f"{scores.perplexity:.3g}{at}", f"{scores.edit_seconds:.2f}", f"{scores.edit_megabytes:.3f}")
    return [scores.method, *method_figures(scores), changed, *cost]
