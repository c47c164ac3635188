"""`memoir index`: looking after a store and its index."""

from __future__ import annotations

from pathlib import Path

import click
from rich.progress import Progress

from memoir_retrieval.cli.common import echo_json, json_option, model_option, notes, store_argument, threads_option
from memoir_retrieval.store import EditStore, leftovers

__all__ = ["index"]


@click.group()
def index() -> None:
    """Build and check the index of a store.

    \b
    Example:
      memoir index verify edits
    """


@index.command("verify")
@store_argument
@click.option("--masks", is_flag=True, help="Also make every mask again from its prompt, which takes the model.")
@model_option
@json_option
@threads_option
def verify(store: Path, masks: bool, model: str | None, as_json: bool) -> None:
    """Read every byte of a store again and say what is not as it should be, one line each.

    Digests, layout, the ones of every mask, ids, finite weights; with --masks (or --model) also whether the base model
    still gives each mask. Exit code 1 where something differs.

    \b
    Example:
      memoir index verify edits
      memoir index verify edits --masks --json
    """
    from memoir_retrieval.verify_store import verify_masks, verify_store

    faults = verify_store(store)
    found: dict[str, object] = {"store": str(store), "differs": faults}
    summary = ""
    if not faults:
        opened = EditStore.open(store)
        made = opened.manifest
        found |= {"format": made.format, "generation": made.generation, "edits": len(opened.edits)}
        found |= {"masks": len(opened.codes), "leftovers": [path.name for path in leftovers(store, made)]}
        summary = f"generation {made.generation}, {len(opened.edits)} edits, {len(opened.codes)} masks"
        if masks or model:
            from memoir_retrieval.model import load_model

            notes.print(f"loading {model or made.model}")
            base = load_model(model or made.model, layer=made.layer, dtype=made.dtype)
            with Progress(console=notes, disable=as_json) as bar:
                task = bar.add_task("masks", total=len(opened.edits))
                faults += verify_masks(opened, base, progress=lambda done: bar.update(task, completed=done))
            summary += ", made again"
    if as_json:
        echo_json(found)
    else:
        for fault in faults:
            click.echo(fault)
        click.echo(f"{store}: {len(faults)} differences" if faults else f"{store}: sound; {summary}")
    click.get_current_context().exit(1 if faults else 0)
