"""`memoir edit`: train a file of edits into a store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from memoir_retrieval.cli.common import describe_tau, echo, echo_json, json_option, notes, threads_option
from memoir_retrieval.cli.options import (
    FileOptions,
    ModelOptions,
    RayOptions,
    StoreSettings,
    TrainingOptions,
    file_options,
    model_options,
    ray_options,
    require_subject_option,
    require_typed_subjects,
    store_settings_options,
    training_options,
)
from memoir_retrieval.edits.record import edit_time
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.store.manifest import MANIFEST
from memoir_retrieval.store.read import EditStore
from memoir_retrieval.store.settings import require_made_with
from memoir_retrieval.store.write import sweep_if_free

if TYPE_CHECKING:
    from memoir_retrieval.editing.conflicts import Conflict
    from memoir_retrieval.editing.editor import Editor
    from memoir_retrieval.editing.outcome import Progress as EditProgress
    from memoir_retrieval.edits.record import Edit, StoredEdit

__all__ = ["edit", "train"]


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@file_options
@click.option("--store", "-s", required=True, type=click.Path(path_type=Path), help="Folder of the store; made if new.")
@click.option(
    "--on-conflict",
    type=click.Choice(["refuse", "first", "last", "both"]),
    default="refuse",
    show_default=True,
    help="What to do with a question that is stored with another target: refuse the edit, keep the first, replace it "
    "by the last, or keep both (if their words differ).",
)
@click.option("--rephrase-masks", is_flag=True, help="Train the file's rephrasings too, each with a mask of its own.")
@require_subject_option
@click.option("--keep-failed", is_flag=True, help="Store edits that fail the audit as well.")
@store_settings_options()
@training_options
@ray_options
@model_options(dtype="float32, bfloat16 or float16 (default: the store's own, or float32).")
@json_option
@threads_option
def edit(
    file: Path,
    source: FileOptions,
    store: Path,
    on_conflict: Any,
    rephrase_masks: bool,
    require_subject: bool,
    keep_failed: bool,
    settings: StoreSettings,
    training: TrainingOptions,
    ray: RayOptions,
    model: ModelOptions,
    as_json: bool,
) -> None:
    """Train the edits of FILE into a store: one after another or, where they need several memories, side by side.

    Each edit is checked before it is stored. If the model has not learnt it, or if it would overwrite others, it is
    trained again. If that fails too, it is reported and not stored. The same goes for an edit whose question is stored
    in other words with another target. The exit code is 1 if any edit was left out that way.


    Edits that the store has already are skipped. So an interrupted run goes on where it stopped, and of a longer file
    only the new edits are trained.

    With --ray the memories are divided among the workers of a cluster, which train at the same time. The store is the
    one that the same --side-by-side gives without --ray, up to rounding. By default every worker has one memory.


    \b
    Example:
      memoir edit corrections.jsonl --model smollm2-135m --store edits
      memoir edit corrections.jsonl --model smollm2-135m --store edits --ray auto --workers 8
    """
    ray.check()
    edits = source.load(file, "refuse" if on_conflict == "both" else on_conflict)
    edits = require_typed_subjects(edits, str(file)) if require_subject else edits
    # The editor checks all of it, so that a large store is hashed once.
    manifest = EditStore.open(store, check=False).manifest if (store / MANIFEST).exists() else None
    # What can be refused is refused before the model is loaded, which takes long.
    edit_time()
    chosen = settings.to_settings(training, dtype=model.dtype)
    if manifest:
        require_made_with(manifest, chosen, store)
    elif model.model_name is None:
        raise ConfigError(f"store {store} is new, so it needs a model: add --model NAME, such as smollm2-135m")

    from memoir_retrieval.editing.editor import Editor
    from memoir_retrieval.question.thinking import described

    base = model.load(manifest, layer=settings.layer, place=settings.place)
    started = time.monotonic()
    trainer, side_by_side = None, training.side_by_side
    if ray.address:
        from memoir_retrieval.editing.trainer_ray import on_ray

        trainer, side_by_side = on_ray(ray.address, ray.workers, model.device), side_by_side or ray.workers
    editor = Editor(base, store, **settings.for_editor(), training=chosen.training, trainer=trainer)
    with editor:
        if editor.manifest.chat and (thinking := described(base.tokenizer)):
            notes.print(f"{base.name}: {thinking}")
        first, fresh = editor.manifest.next_id, editor.generation == 0
        try:
            train(
                editor,
                edits,
                on_conflict,
                rephrase_masks=rephrase_masks,
                keep_failed=keep_failed,
                side_by_side=side_by_side,
                quiet=as_json,
            )
        except KeyboardInterrupt:
            # The editor was to commit what it has trained, which may have been interrupted, too.
            there = EditStore.open(store, check=False).edits if (store / MANIFEST).exists() else ()
            kept = sum(edit.id >= first for edit in there)
            raise click.Abort(f"{kept} new edits are kept in {store}; run the same command again to go on") from None
    complete = _tell(editor, store, on_conflict, fresh, time.monotonic() - started, as_json)
    del editor  # it maps masks that have been replaced
    if (store / MANIFEST).exists():
        sweep_if_free(store)
    if not complete:
        raise SystemExit(1)


# From about here on thresholds that suit small stores let unrelated prompts through (docs/measurements/many-edits.md).
MANY = 500
_REFUSED = {"refuse": "choose with --on-conflict", "first": "left out"}
_STORED = {"last": "replaced it", "both": "stored beside it"}


def _tell(editor: Editor, store: Path, on_conflict: Conflict, fresh: bool, seconds: float, as_json: bool) -> bool:
    """Print what became of the edits; `fresh`: of a new store. Returns whether all are in the store that should be."""
    outcome = editor.outcome
    new = len({edit.id for edit in outcome.stored}.intersection(edit.id for edit in editor.edits))
    opened = EditStore.open(store, check=False) if (store / MANIFEST).exists() else None
    manifest = opened.manifest if opened else None
    size = opened.size if opened else 0
    kept = {(edit.prompt, edit.target) for edit in editor.edits}
    refused = [(failure.prompt, failure.target) for failure in outcome.failed]
    refused += [(conflict.prompt, conflict.target) for conflict in outcome.conflicting]
    summary = {
        "stored": new,
        "skipped": outcome.skipped,
        "retried": outcome.retried,
        "renewed": outcome.renewed,
        "failed": [
            {"prompt": failure.prompt, "target": failure.target, "reason": failure.reason} for failure in outcome.failed
        ],
        "conflicting": [
            {
                "prompt": conflict.prompt,
                "target": conflict.target,
                "edit": conflict.stored.id,
                "overlap": conflict.overlap,
            }
            for conflict in outcome.conflicting
        ],
        "seconds": round(seconds, 2),
        "seconds_per_edit": round(seconds / new, 3) if new else None,
        "generation": manifest.generation if manifest else 0,
        "memories": len(editor.memories),
        "store": str(store),
        "tau": manifest.tau if manifest else None,
        "bound": manifest.threshold.bound if manifest and manifest.threshold else None,
        "bytes": size,
    }
    if as_json:
        echo_json(summary)
    else:
        for failed in outcome.failed:
            echo(f"failed: {failed.prompt!r} -> {failed.target!r}: {failed.reason}", err=True)
        stored = {(edit.prompt, edit.target) for edit in outcome.stored}
        for conflict in outcome.conflicting:
            became = _REFUSED.get(on_conflict) or (
                _STORED[on_conflict] if (conflict.prompt, conflict.target) in stored else "not stored"
            )
            echo(f"conflicting: {conflict.fact}: {became}", err=True)
        if outcome.renewed:
            echo(f"{len(outcome.renewed)} edits that later ones had overwritten were trained again")
        speed = f", {summary['seconds_per_edit']} s per edit" if new else ""
        echo(
            f"{store}: {new} edits stored, {outcome.skipped} were there already, {outcome.retried} retried, "
            f"{len(outcome.failed)} failed, {len(outcome.conflicting)} conflicting ({seconds:.0f} s{speed}); "
            f"generation {summary['generation']}, {size / 1e6:.2f} MB"
        )
        if opened and fresh and opened.manifest.span.candidates and not len(opened.tasks):
            notes.print(
                f"{store} knows tasks, such as a translation, by words alone: `memoir calibrate {store} --tasks "
                f"--write` has it use the activations of {opened.manifest.model}, too"
            )
        if manifest and manifest.threshold:
            echo(f"tau {manifest.tau:g}: {describe_tau(manifest.threshold)}")
        elif len(editor.edits) >= MANY:
            notes.print(
                f"{len(editor.edits)} edits: the more there are, the likelier an unrelated prompt matches one; measure "
                f"whether tau {editor.manifest.tau:g} still holds with `memoir calibrate {store}`"
            )
    return kept.issuperset(refused)


def train(
    editor: Editor,
    edits: Sequence[Edit],
    on_conflict: Conflict = "refuse",
    *,
    rephrase_masks: bool = False,
    keep_failed: bool = False,
    side_by_side: int | None = None,
    quiet: bool = False,
) -> list[StoredEdit]:
    """`Editor.add` with a progress bar: edits per second, the last edit's loss, time left.

    editor: which is open.
    edits, on_conflict, rephrase_masks, keep_failed, side_by_side: see `Editor.add`.
    quiet: whether the bar is left out.
    """
    columns = (
        TextColumn("editing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=notes, disable=quiet) as bar:
        task = bar.add_task("", total=len(edits), speed="")

        def tell(p: EditProgress) -> None:
            loss = f"  loss {p.edit.loss:.3f}" if p.edit else ""
            bar.update(task, completed=p.done, total=p.total, speed=f"{p.done / p.seconds:.2f} edits/s{loss}")

        new = editor.add(
            edits,
            on_conflict=on_conflict,
            rephrase_masks=rephrase_masks,
            keep_failed=keep_failed,
            side_by_side=side_by_side,
            progress=tell,
        )
        bar.update(task, completed=len(edits), total=len(edits))  # those that were there already included
        return new
