"""`memoir index`: looking after a store and its index."""

from __future__ import annotations

import time
from pathlib import Path

import click
from rich.progress import Progress

from memoir_retrieval.cli.common import (
    echo,
    echo_json,
    json_option,
    notes,
    refuse_idle,
    store_argument,
    threads_option,
)
from memoir_retrieval.cli.index_info import info
from memoir_retrieval.cli.options import (
    FileOptions,
    ModelOptions,
    RayOptions,
    StoreSettings,
    TrainingOptions,
    context_masks_option,
    file_options,
    model_options,
    ray_options,
    require_subject_option,
    require_typed_subjects,
    store_settings_options,
)
from memoir_retrieval.edits.files import check_duplicates
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.store.manifest import MANIFEST
from memoir_retrieval.store.read import EditStore
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
@file_options
@click.option("--store", "-s", required=True, type=click.Path(path_type=Path), help="Folder of the new store.")
@click.option("--rephrases", is_flag=True, help="Give each edit the masks of its rephrasings too.")
@require_subject_option
@context_masks_option
@store_settings_options()
@ray_options
@model_options(required=True, dtype="Dtype of the server: float32 (default), bfloat16 or float16.")
@json_option
@threads_option
def build(
    files: tuple[Path, ...],
    source: FileOptions,
    store: Path,
    rephrases: bool,
    require_subject: bool,
    context_masks: int | None,
    settings: StoreSettings,
    ray: RayOptions,
    model: ModelOptions,
    as_json: bool,
) -> None:
    """Make the masks of many edits, without training them.

    The store can be looked up, calibrated and measured at once, before any time is spent on training. It cannot be
    served until `memoir edit` has trained the same edits into it. If the command is interrupted, repeat it: it goes on
    where it stopped. The same input gives the same bytes.


    \b
    Example:
      memoir index build corrections.jsonl --model smollm2-135m --store masks
      memoir index build a.jsonl b.jsonl --model smollm2-135m --store masks --ray auto --workers 8
    """
    ray.check()
    edits = check_duplicates([edit for file in files for edit in source.load(file, "refuse")])
    edits = require_typed_subjects(edits, " and ".join(map(str, files))) if require_subject else edits
    if (store / MANIFEST).exists():
        raise ConfigError(f"{store} is a store already: choose a new folder, or append with `memoir edit`")

    from memoir_retrieval.editing.build_masks import BuildProgress
    from memoir_retrieval.editing.build_masks import build as build_store
    from memoir_retrieval.editing.editor import Editor

    base = model.load(layer=settings.layer, place=settings.place)
    started = time.monotonic()
    now = BuildProgress(0, 0, 0)
    editor = Editor(
        base, store, **settings.for_editor(), training=TrainingOptions(context_masks=context_masks).fields()
    )
    with editor, Progress(console=notes, disable=as_json) as bar:
        compute = None
        if ray.address:
            from memoir_retrieval.editing.build_masks_ray import on_ray

            compute = on_ray(editor, ray.address, ray.workers, model.device)
        task = bar.add_task("masks", total=None)

        def tell(progress: BuildProgress) -> None:
            nonlocal now
            now = progress
            bar.update(task, completed=progress.done, total=progress.total)

        try:
            manifest = build_store(editor, edits, rephrases=rephrases, compute=compute, progress=tell)
        except KeyboardInterrupt:
            raise click.Abort(
                f"{now.done} of {now.total} masks are kept; run the same command again to go on"
            ) from None
    summary = {
        "store": str(store),
        "edits": len(edits),
        "masks": now.total,
        "resumed": now.resumed,
        "seconds": round(time.monotonic() - started, 2),
        "generation": manifest.generation,
    }
    if as_json:
        echo_json(summary)
        return
    echo(
        f"{store}: {now.total} masks of {len(edits)} edits in {summary['seconds']} s, {now.resumed} of them from an "
        f"earlier run. The edits are not trained yet: run `memoir edit FILE --store {store}`"
    )


@index.command("verify")
@store_argument
@click.option(
    "--masks", is_flag=True, help="Also make every mask again from its prompt, for which the model is loaded."
)
@model_options(dtype=None)
@json_option
@threads_option
def verify(store: Path, masks: bool, model: ModelOptions, as_json: bool) -> None:
    """Read every byte of a store again and report whatever is wrong, one line each.

    Digests, layout, the ones of every mask, ids, finite weights; with --masks (or --model) also whether the base model
    still gives each mask. The exit code is 1 if something differs.

    \b
    Example:
      memoir index verify edits
      memoir index verify edits --masks --json
    """
    if not masks and not model.model_name:
        refuse_idle("without the model", "add --masks, or leave it out", "device")

    from memoir_retrieval.store.verify import verify_masks, verify_store

    faults = verify_store(store)
    report: dict[str, object] = {"store": str(store), "differs": faults}
    summary = ""
    if not faults:
        opened = EditStore.open(store)
        manifest = opened.manifest
        report |= {"format": manifest.format, "generation": manifest.generation, "edits": len(opened.edits)}
        report |= {"masks": len(opened.codes), "leftovers": [path.name for path in leftovers(store)]}
        summary = f"generation {manifest.generation}, {len(opened.edits)} edits, {len(opened.codes)} masks"
        if masks or model.model_name:
            base = model.load(manifest)
            with Progress(console=notes, disable=as_json) as bar:
                task = bar.add_task("masks", total=len(opened.edits))
                faults += verify_masks(opened, base, progress=lambda done: bar.update(task, completed=done))
            summary += ", made again"
    if as_json:
        echo_json(report)
    else:
        for fault in faults:
            echo(fault)
        echo(f"{store}: {len(faults)} differences" if faults else f"{store}: sound; {summary}")
    click.get_current_context().exit(1 if faults else 0)
