"""`memoir remove` and `memoir compact`: taking edits out of a store, and erasing what they left in it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from memoir_retrieval.cli.common import echo, echo_json, json_option, notes, store_argument, threads_option
from memoir_retrieval.cli.options import ModelOptions, model_options
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.question.span import ActingToken
from memoir_retrieval.store.read import EditStore
from memoir_retrieval.store.write import leftovers, sweep_if_free

NEWEST: ActingToken = "last token before the answer"
"""From where the edits of new chat stores act."""


@click.command()
@store_argument
@click.argument("edit_ids", metavar="[ID]...", type=int, nargs=-1)
@click.option("--prompt", "prompts", multiple=True, help="Remove the edit of this prompt; may be repeated.")
@json_option
def remove(store: Path, edit_ids: tuple[int, ...], prompts: tuple[str, ...], as_json: bool) -> None:
    """Make edits unreachable.

    No prompt matches them any more, and their text is taken out of the store. What they changed in the residual memory
    stays there, out of reach, until `memoir compact` trains the remaining edits again.

    \b
    Example:
      memoir remove edits 3 7
      memoir remove edits --prompt "Who founded Aarhus?"
    """
    if not edit_ids and not prompts:
        raise ConfigError(f"name what to remove: an ID (`memoir list {store}` shows them) or --prompt TEXT")

    from memoir_retrieval.store.remove import find_prompts, remove_edits

    opened = EditStore.open(store, check=False)
    ids = list(dict.fromkeys([*edit_ids, *find_prompts(opened, prompts)]))
    removed = [opened.edit(edit_id) for edit_id in ids]
    del opened  # what it maps could not be removed
    manifest = remove_edits(store, ids)
    held = [path.name for path in leftovers(store)]
    if as_json:
        echo_json({"removed": ids, "generation": manifest.generation, "erased": False, "still_held": held})
        return
    for edit in removed:
        echo(f"removed edit {edit.id}: {edit.prompt}")
    echo(
        f"{store}: generation {manifest.generation}. Nothing matches removed edits, but the residual memory still "
        "holds "
        f"what was trained: `memoir compact {store}` erases it"
    )
    _tell(held)


@click.command()
@store_argument
@model_options(dtype=None)
@click.option(
    "--acts",
    type=click.Choice(["first", "last"]),
    help="From where an edit acts: a question's first token, or the last token before the answer (default: as the "
    "store was made).",
)
@json_option
@threads_option
def compact(store: Path, model: ModelOptions, acts: Literal["first", "last"] | None, as_json: bool) -> None:
    """Train the edits of a store again from nothing, so that removed ones leave no trace.

    Ids, settings and seed stay, and so does a tau that somebody has chosen. The store answers as before until the last
    edit is trained; if the command is interrupted, the store stays as it was. In stores of 0.1.0 edits act from a
    question's first token on. --acts last trains them to act from the last token before the answer; a chat store is
    then served and extended as a new one.

    \b
    Example:
      memoir compact edits
      memoir compact edits --acts last
    """
    manifest = EditStore.open(store, check=False).manifest

    from memoir_retrieval.editing.editor import Editor
    from memoir_retrieval.editing.editor import Progress as EditProgress

    base = model.load(manifest)
    started = time.monotonic()
    columns = (TextColumn("training again"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Editor(base, store) as editor, Progress(*columns, console=notes, disable=as_json) as bar:
        task = bar.add_task("", total=len(editor.edits))

        def tell(progress: EditProgress) -> None:
            bar.update(task, completed=progress.done)

        try:
            trained = editor.compact(progress=tell, acts=acts)
        except KeyboardInterrupt:
            now = EditStore.open(store, check=False).manifest
            state = "is unchanged" if now.generation == manifest.generation else "is compacted"
            raise click.Abort(f"{store} {state}, at generation {now.generation}") from None
    failed = editor.outcome.failed
    del editor
    held = sweep_if_free(store)
    now = EditStore.open(store, check=False).manifest
    if as_json:
        echo_json(
            {
                "edits": len(trained),
                "generation": now.generation,
                "acts": now.span.acting_token,
                "seconds": round(time.monotonic() - started, 2),
                "failed": [{"prompt": failure.prompt, "reason": failure.reason} for failure in failed],
                "erased": not held,
                "still_held": held,
            }
        )
        return
    echo(f"{store}: {len(trained)} edits trained again; generation {now.generation} holds nothing of any other")
    begin, before = now.span.acting_token, manifest.span.acting_token
    if begin != before:
        echo(f"they act from the {begin} on, no longer from the {before}")
    elif now.span.rule == "question" and now.chat and begin != NEWEST:
        echo(
            f"they act from the {begin} on, as before; `memoir compact {store} --acts last` makes them act from the "
            f"{NEWEST}, as in new stores"
        )
    for failure in failed:
        echo(f"not answered with its target: {failure.prompt!r}: {failure.reason}")
    _tell(held)


def _tell(held: list[str]) -> None:
    if held:
        echo(
            f"not deleted yet, because a reader or a writer uses them: {', '.join(held)}; the first write after it has "
            "closed them deletes them"
        )
