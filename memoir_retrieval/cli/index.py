"""`memoir index`: looking after a store and its index."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress

from memoir_retrieval.cli.common import (
    context_masks_option,
    echo,
    echo_json,
    edit_file_options,
    json_option,
    load_edits,
    model_option,
    notes,
    require_subject_option,
    store_argument,
    threads_option,
)
from memoir_retrieval.cli.index_info import info
from memoir_retrieval.edits.files import check_duplicates
from memoir_retrieval.edits.requires import require_subjects
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.store.read import MANIFEST, EditStore
from memoir_retrieval.store.write import leftovers

__all__ = ["index"]


@click.group()
def index() -> None:
    """Build and check the index of a store.

    \b
    Example:
      memoir index verify edits
    """


index.add_command(info)


@index.command("build")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@edit_file_options
@click.option("--store", "-s", required=True, type=click.Path(path_type=Path), help="Folder of the new store.")
@click.option("--model", "-m", required=True, help="Folder, embedded model or Hub id.")
@click.option("--chat/--no-chat", default=True, help="Ask prompts through the chat template (default), or raw.")
@click.option("--rephrases", is_flag=True, help="Give each edit the masks of its rephrasings too.")
@context_masks_option
@click.option("--layer", type=int, help="Block whose FFN projection is edited (default: the preset's).")
@click.option("--k", type=int, help="Ones in every mask (default: the preset's).")
@click.option("--tau", type=float, help="Least overlap that matches (default: the preset's).")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the permutation.")
@click.option("--dtype", default="float32", show_default=True, help="What the server will run in, such as bfloat16.")
@click.option("--device", default="cpu", show_default=True, help="Where the model runs, such as cuda.")
@click.option("--ray", "address", help="Ray cluster that makes the masks: its address, `auto` or `local`.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Processes on the cluster.")
@require_subject_option
@json_option
@threads_option
def build(
    files: tuple[Path, ...],
    file_format: str | None,
    limit: int | None,
    store: Path,
    model: str,
    rephrases: bool,
    layer: int | None,
    dtype: str,
    device: str,
    address: str | None,
    workers: int,
    context_masks: int | None,
    require_subject: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Make the masks of many edits, without training them.

    The store can be looked up, calibrated and measured at once, before any time is spent on training; it cannot be
    served until `memoir edit` has trained the same edits into it. Interrupted, the same command goes on where it
    stopped. The same input gives the same bytes.

    \b
    Example:
      memoir index build corrections.jsonl --model smollm2-135m --store masks
      memoir index build a.jsonl b.jsonl --model smollm2-135m --store masks --ray auto --workers 8
    """
    edits = check_duplicates([edit for file in files for edit in load_edits(file, file_format, limit, "refuse")])
    edits = require_subjects(edits) if require_subject else edits
    if (store / MANIFEST).exists():
        raise ConfigError(f"{store} is a store already: choose a new folder, or append with `memoir edit`")

    from memoir_retrieval.editing.build_masks import BuildProgress
    from memoir_retrieval.editing.build_masks import build as build_store
    from memoir_retrieval.editing.editor import Editor
    from memoir_retrieval.model.base import load_model
    from memoir_retrieval.store.settings import Training

    notes.print(f"loading {model}")
    base = load_model(model, layer=layer, dtype=dtype, device=device)
    started = time.monotonic()
    at = BuildProgress(0, 0, 0)
    training = Training() if context_masks is None else Training(context_masks=context_masks)
    with Editor(base, store, training=training, **settings) as editor, Progress(console=notes, disable=as_json) as bar:
        compute = None
        if address:
            from memoir_retrieval.editing.build_masks_ray import on_ray

            compute = on_ray(editor, address, workers, device)
        task = bar.add_task("masks", total=None)

        def tell(progress: BuildProgress) -> None:
            nonlocal at
            at = progress
            bar.update(task, completed=progress.done, total=progress.total)

        try:
            made = build_store(editor, edits, rephrases=rephrases, compute=compute, progress=tell)
        except KeyboardInterrupt:
            raise click.Abort(f"{at.done} of {at.total} masks are kept; the same command goes on from there") from None
    found = {"store": str(store), "edits": len(edits), "masks": at.total, "resumed": at.resumed,
             "seconds": round(time.monotonic() - started, 2), "generation": made.generation}  # fmt: skip
    if as_json:
        echo_json(found)
        return
    echo(
        f"{store}: {at.total} masks of {len(edits)} edits in {found['seconds']} s, {at.resumed} of them made before. "
        f"Not trained: `memoir edit FILE --store {store}` does that"
    )


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
    from memoir_retrieval.store.verify import verify_masks, verify_store

    faults = verify_store(store)
    found: dict[str, object] = {"store": str(store), "differs": faults}
    summary = ""
    if not faults:
        opened = EditStore.open(store)
        made = opened.manifest
        found |= {"format": made.format, "generation": made.generation, "edits": len(opened.edits)}
        found |= {"masks": len(opened.codes), "leftovers": [path.name for path in leftovers(store)]}
        summary = f"generation {made.generation}, {len(opened.edits)} edits, {len(opened.codes)} masks"
        if masks or model:
            from memoir_retrieval.model.base import load_model

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
            echo(fault)
        echo(f"{store}: {len(faults)} differences" if faults else f"{store}: sound; {summary}")
    click.get_current_context().exit(1 if faults else 0)
