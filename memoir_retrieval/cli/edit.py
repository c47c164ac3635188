"""`memoir edit`: train a file of edits into a store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from memoir_retrieval.cli.common import (
    echo_json,
    edit_file,
    json_option,
    load_edits,
    model_option,
    notes,
    threads_option,
)
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.store import MANIFEST, EditStore, Manifest

if TYPE_CHECKING:
    from memoir_retrieval.edit import Edit, StoredEdit
    from memoir_retrieval.editor import Conflict, Editor
    from memoir_retrieval.editor import Progress as EditProgress

__all__ = ["edit", "train"]


@click.command()
@edit_file
@click.option("--store", "-s", required=True, type=click.Path(path_type=Path), help="Folder of the store; made if new.")
@model_option
@click.option("--chat/--no-chat", default=None, help="Ask prompts through the chat template (default), or raw.")
@click.option(
    "--on-conflict",
    type=click.Choice(["refuse", "first", "last"]),
    default="refuse",
    show_default=True,
    help="The same prompt with another target: refuse, keep the first, or let the last one win.",
)
@click.option("--layer", type=int, help="Block whose FFN projection is edited (default: the preset's).")
@click.option("--k", type=int, help="Ones in every mask (default: the preset's).")
@click.option("--tau", type=float, help="Least overlap that matches, in (0, 1] (default: the preset's).")
@click.option("--span", type=click.Choice(["question", "all"]), help="Which tokens are pooled (default: question).")
@click.option("--seed", type=int, help="Seed of the permutation and of training (default: 0).")
@click.option("--device", default="cpu", show_default=True, help="Where the model runs, such as cuda.")
@click.option("--dtype", help="float32, bfloat16 or float16 (default: the store's own, or float32).")
@json_option
@threads_option
def edit(
    file: Path,
    store: Path,
    model: str | None,
    file_format: str | None,
    limit: int | None,
    on_conflict: Any,
    device: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train the edits of FILE into a store, one after another.

    Edits that the store has already are skipped: an interrupted run goes on where it stopped, and a longer file
    is appended.

    \b
    Example:
      memoir edit corrections.jsonl --model smollm2-135m --store edits
    """
    edits = load_edits(file, file_format, limit, on_conflict)
    made = EditStore.open(store).manifest if (store / MANIFEST).exists() else None
    _agree(made, store, settings)
    name = model or (made.model if made else None)
    if name is None:
        raise ConfigError(f"store {store} is new, so it needs a model: add --model NAME, such as smollm2-135m")

    from memoir_retrieval.editor import Editor
    from memoir_retrieval.model import load_model

    layer = made.layer if made and settings["layer"] is None else settings["layer"]
    dtype = settings["dtype"] or (made.dtype if made else "float32")
    notes.print(f"loading {name}")
    base = load_model(name, layer=layer, dtype=dtype, device=device)
    started = time.monotonic()
    editor = Editor(
        base,
        store,
        chat=settings["chat"] is not False,
        rule=settings["span"] or "question",
        k=settings["k"],
        tau=settings["tau"],
        seed=settings["seed"] or 0,
    )
    with editor:
        held = editor.next_id
        try:
            new = train(editor, edits, on_conflict, quiet=as_json)
        except KeyboardInterrupt:
            kept = sum(stored.id >= held for stored in editor.edits)
            raise click.Abort(f"{kept} new edits are kept in {store}; the same command goes on from there") from None
    seconds = time.monotonic() - started
    found = EditStore.open(store).manifest if (store / MANIFEST).exists() else None
    size = sum(entry.size for entry in (found.memory, found.codes, found.edits)) if found else 0
    summary = {
        "stored": len(new),
        "skipped": len(edits) - len(new),
        "seconds": round(seconds, 2),
        "seconds_per_edit": round(seconds / len(new), 3) if new else None,
        "generation": found.generation if found else 0,
        "store": str(store),
        "bytes": size,
    }
    if as_json:
        echo_json(summary)
        return
    speed = f", {summary['seconds_per_edit']} s an edit" if new else ""
    click.echo(
        f"{store}: {len(new)} edits stored, {summary['skipped']} were there already "
        f"({seconds:.0f} s{speed}); generation {summary['generation']}, {size / 1e6:.2f} MB"
    )


def train(
    editor: Editor, edits: Sequence[Edit], on_conflict: Conflict = "refuse", quiet: bool = False
) -> list[StoredEdit]:
    """`Editor.add` with a progress bar: edits a second, the last edit's loss, time left."""
    columns = (
        TextColumn("editing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.2f} edits/s  loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=notes, disable=quiet) as bar:
        task = bar.add_task("", total=None, rate=0.0, loss=float("nan"))

        def tell(p: EditProgress) -> None:
            loss = p.edit.loss if p.edit else float("nan")
            bar.update(task, completed=p.done, total=p.total, rate=p.done / p.seconds, loss=loss)

        return editor.add(edits, on_conflict=on_conflict, progress=tell)


def _agree(made: Manifest | None, store: Path, settings: dict[str, Any]) -> None:
    """Refuse a setting that contradicts the store it is given for: it could only be ignored."""
    if made is None:
        return
    has = {
        "chat": made.chat,
        "layer": made.layer,
        "k": made.k,
        "tau": made.tau,
        "span": made.span.rule,
        "seed": made.seed,
        "dtype": made.dtype,
    }
    for name, value in has.items():
        if settings[name] is not None and settings[name] != value:
            option = {"chat": "--chat" if settings[name] else "--no-chat"}.get(name, f"--{name} {settings[name]}")
            raise ConfigError(
                f"store {store} was made with {name} {value}, not {settings[name]}: leave out {option}, or choose a "
                "new folder"
            )
