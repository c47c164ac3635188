"""`memoir bench routing`: which edit messages get as people write them."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.table import Table

from memoir_retrieval.cli.common import (
    echo_json,
    json_option,
    model_option,
    notes,
    refuse_idle,
    require_place,
    tables,
    tau_option,
    threads_option,
)
from memoir_retrieval.cli.demo import EXAMPLES, MODEL
from memoir_retrieval.cli.options import data_folder_option
from memoir_retrieval.edits.files import read_edits
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.store.files import publish

if TYPE_CHECKING:
    from memoir_retrieval.evaluation.routing_run import RoutingRun

__all__ = ["bench_routing"]

PAGE = "routing.html"
SETS = ("edits", "siblings", "opposites", "faq", "knowedit", "hallueditbench", "qaedit", "counterfact", "unrelated")
OWN = ("edits", "siblings", "opposites", "faq", "unrelated")


@click.command("routing")
@click.argument("store", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--edits",
    "file",
    type=click.Path(path_type=Path),
    default=EXAMPLES / "zsre-100.jsonl",
    help="Without DIR: the edits to train (default: a hundred of ZsRE).",
)
@model_option
@click.option("--chat/--no-chat", default=True, help="Without DIR: train and ask through the chat template, or raw.")
@tau_option
@click.option(
    "--candidates/--no-candidates",
    default=None,
    help="Look up parts of each message too, or the message alone (default: as the store says).",
)
@click.option(
    "--set",
    "chosen",
    multiple=True,
    type=click.Choice(SETS),
    help="What to ask; may be repeated (default: all that --data has, except counterfact).",
)
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    help="Ask rows of this kind or name only, such as rephrasings; may be repeated (default: all rows).",
)
@click.option(
    "--first",
    multiple=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="Ask edits and unrelated prompts of the first N edits of DIR only, at the tau that a store of these sets if "
    "DIR sets its own; may be repeated (default: all edits).",
)
@click.option("--about", type=click.IntRange(min=1), metavar="N", help="Ask about the first N edits only.")
@click.option("--part", type=click.Choice(["tune", "report"]), help="Ask this half only (default: both).")
@data_folder_option
@click.option(
    "--most", type=click.IntRange(min=2), default=500, show_default=True, help="Most edits of each published set."
)
@click.option(
    "--each",
    type=click.IntRange(min=0),
    default=25,
    show_default=True,
    help="Most questions of a row; 0 asks all of them, which takes an hour of one core.",
)
@click.option(
    "--unrelated", type=click.IntRange(min=1), default=3000, show_default=True, help="Most unrelated prompts."
)
@click.option(
    "--answers",
    type=click.Choice(["none", "some", "all"]),
    default="some",
    show_default=True,
    help="Messages whose free answers are read too: none, plain questions, chats and other questions, or all.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the figures and a page of pictures.")
@json_option
@threads_option
def bench_routing(
    store: Path | None,
    file: Path,
    model: str | None,
    chat: bool,
    tau: float | None,
    candidates: bool | None,
    chosen: tuple[str, ...],
    only: tuple[str, ...],
    first: tuple[int, ...],
    about: int | None,
    part: Any,
    folder: Path,
    most: int,
    each: int,
    unrelated: int,
    answers: Any,
    out: Path | None,
    as_json: bool,
) -> None:
    """Ask a store what people write: does a message get the edit that it asks for, and no other?

    DIR is a store of `memoir edit`; without one, a hundred edits are trained first (with --out it is kept there). Every
    form of a message, relation and record belongs to one half, `tune` or `report`: tune a lookup on the first and quote
    figures of the second.

    \b
    Example:
      memoir bench routing edits --out routing
      memoir bench routing edits --set edits --part tune --answers none --json
    """
    if store is not None:
        refuse_idle("for a store that is there", "leave it out, or DIR", "file", "chat")
    if out is not None:
        require_place(out, "the run", "--out", folder=True)

    from memoir_retrieval.editing.editor import Editor
    from memoir_retrieval.evaluation.quality_run import refuse_others
    from memoir_retrieval.evaluation.report import routing_page
    from memoir_retrieval.evaluation.routing_data import PUBLISHED
    from memoir_retrieval.evaluation.routing_run import RESULT, check_sets, run_routing, with_candidates
    from memoir_retrieval.lookup.retriever import Retriever
    from memoir_retrieval.model.base import load_model

    there = [name for name, (path, _) in PUBLISHED.items() if (folder / path).is_file() and name != "counterfact"]
    sets = chosen or tuple(name for name in SETS if name in (*OWN, *there))
    check_sets(sets, folder)
    with tempfile.TemporaryDirectory() as temporary:
        if store is None:
            if not file.is_file():
                raise ConfigError(
                    f"{file} is not there: the examples come with the source; give --edits FILE, or a store"
                )
            store = (out or Path(temporary)) / "store"
            notes.print(f"training {file}")
            base = load_model(model or MODEL)
            with Editor(base, store, chat=chat, tau=tau) as editor:
                edits = read_edits(file)
                refuse_others(store, editor.edits, edits)
                editor.add(edits)
        retriever = Retriever.open(store, model, tau=tau)
        if candidates is not None:
            retriever = with_candidates(retriever, candidates)
        run = run_routing(
            retriever,
            sets=sets,
            part=part,
            data=folder,
            most=most,
            each=each or None,
            prompts=unrelated,
            answers=answers,
            only=only,
            first=first,
            keep_tau=tau is not None,
            about=about,
            command=shlex.join(["memoir", *sys.argv[1:]]),
            tell=notes.print,
        )
    if as_json:
        echo_json(msgspec.to_builtins(run))
    else:
        tables.print(_table(run, sizes=len(first) > 1))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        publish(out / RESULT, msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n")
        publish(out / PAGE, routing_page(run).encode())
        notes.print(f"written to {out / PAGE}")


def _table(run: RoutingRun, sizes: bool) -> Table:
    """The rows of a run. sizes: whether they differ in how many edits were stored."""
    losses = any(row.lost for row in run.rows)
    names = ("set", "kind", "question", "part", *["edits"][:sizes], "asked", "found", "other", "exact", "answered")
    table = Table(*names, *["lost"][:losses])
    for row in run.rows:
        shares = (row.found, row.other, row.exact, row.answered)
        cells = ("" if share is None else f"{share:.3f}" for share in shares)
        lost = ", ".join(f"{reason} {n}" for reason, n in (row.lost or {}).items())
        size = [str(row.edits)][:sizes]
        table.add_row(row.set, row.kind, row.name, row.part, *size, str(row.asked), *cells, *[lost][:losses])
    return table
