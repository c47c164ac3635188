"""`memoir calibrate`: measure tau on a store, or layer and k on a model, instead of guessing them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from memoir_retrieval.cli.common import (
    describe_tau,
    echo_json,
    json_option,
    notes,
    refuse_idle,
    require_place,
    tables,
    threads_option,
)
from memoir_retrieval.cli.options import FileOptions, ModelOptions, file_options, model_options, place_option
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.model.places import Place
from memoir_retrieval.store.files import publish
from memoir_retrieval.store.read import EditStore
from memoir_retrieval.store.write import sweep_if_free

if TYPE_CHECKING:
    from memoir_retrieval.edits.record import Edit
    from memoir_retrieval.evaluation.calibration import Calibration, Overlaps, Setting
    from memoir_retrieval.model.base import BaseModel

__all__ = ["calibrate"]

BIN = 0.05
BAR = 12


class _Numbers(click.ParamType):
    """Whole numbers with commas between them: "20,22,24"."""

    name = "N,N,..."

    def convert(self, value: str, param: Any, ctx: Any) -> list[int]:
        try:
            return [int(part) for part in value.split(",")]
        except ValueError:
            return self.fail(f"{value!r} is not a list of whole numbers: write for example 20,24", param, ctx)


@click.command()
@click.argument("paths", metavar="[DIR] [FILE]", nargs=-1, type=click.Path(path_type=Path))
@file_options
@model_options(dtype="Without DIR: float32 (default), bfloat16 or float16, as the model will be edited.")
@click.option("--layers", type=_Numbers(), help="Without DIR: blocks to compare (default: each tenth of the depth).")
@place_option
@click.option("--ks", type=_Numbers(), help="Without DIR: sizes of masks to compare (default: the preset's, and half).")
@click.option("--chat/--no-chat", default=None, help="Without DIR: ask through the chat template (default), or raw.")
@click.option("--html", type=click.Path(path_type=Path), help="Write the pictures to this file, a page of its own.")
@click.option("--tau", type=float, help="With DIR and --write: fix tau at this value, until you calibrate again.")
@click.option(
    "--write",
    is_flag=True,
    help="Have the store set tau itself, now and with every change of its edits, and judge by this version.",
)
@click.option(
    "--tasks",
    is_flag=True,
    help="With DIR: learn from the model's activations which messages want something done with a question, such as a "
    "translation. This runs 7500 short messages: some minutes on two cores for a model as small as smollm2-135m, for "
    "which it comes with the library.",
)
@json_option
@threads_option
def calibrate(
    paths: tuple[Path, ...],
    source: FileOptions,
    model: ModelOptions,
    layers: list[int] | None,
    place: Place | None,
    ks: list[int] | None,
    chat: bool | None,
    html: Path | None,
    tau: float | None,
    write: bool,
    tasks: bool,
    as_json: bool,
) -> None:
    """Suggest tau for the store DIR; or without DIR, layer, k and tau for a model.

    Rephrasings come from FILE, or from the store; unrelated prompts are the locality probes of FILE and some that
    come with the library. For a store, tau is suggested by the store's own rule: the least at which the share of
    unrelated prompts that match is bounded by 0.0005. With --write the store keeps to it, and FILE's locality probes
    count from then on; of more than 2000 of them, 2000 that are drawn evenly.

    \b
    Example:
      memoir calibrate edits corrections.jsonl --write --html overlaps.html
      memoir calibrate edits --tau 0.6 --write
      memoir calibrate edits --tasks --write
      memoir calibrate --model smollm2-135m corrections.jsonl --layers 20,24,28
    """
    if html:
        require_place(html, "the page", "--html")
    if not 1 <= len(paths) <= 2:
        raise ConfigError(f"{len(paths)} paths are given: name a store DIR, a FILE of edits with --model, or both")
    # A lone path is FILE where it is a file, or is to be one since a model is measured.
    alone = len(paths) == 1 and (paths[0].is_file() or (model.model_name is not None and not paths[0].is_dir()))
    store = None if alone else paths[0]
    file = paths[-1] if alone or len(paths) == 2 else None
    if file is None:
        refuse_idle("without FILE", "add the file of edits after DIR, or leave it out", "file_format", "limit")
    stored = EditStore.open(store, check=False).edits if store and file else ()
    edits = source.load_stored(file, stored) if file else []
    if store is not None:
        for option, value in (
            ("--layers", layers),
            ("--place", place),
            ("--ks", ks),
            ("--chat", chat),
            ("--dtype", model.dtype),
        ):
            if value is not None:
                raise ConfigError(f"{option} cannot be set for store {store}, which keeps its own: leave it out")
        if tau is not None and not 0 < tau <= 1:
            raise ConfigError(f"tau is {tau}: choose 0 < tau <= 1")
        if tau is not None and not write:
            refuse_idle("without --write", "add --write, or leave it out", "tau")
        _calibrate_store(store, edits, model, html, tau, write, tasks, as_json)
        if write:
            sweep_if_free(store)  # what was measured mapped the files that were replaced
        return
    if tau is not None:
        raise ConfigError("--tau needs a store: memoir calibrate DIR --tau TAU --write")
    if tasks:
        raise ConfigError("--tasks needs a store: memoir calibrate DIR --tasks --write")
    if write:
        raise ConfigError("--write needs a store: memoir calibrate DIR --write")
    if model.model_name is None:
        raise ConfigError(f"{file} is a file: put the store before it, or add --model NAME to measure a model")
    _calibrate_model(model.load(place=place), edits, layers, ks, chat is not False, html, as_json)


def _calibrate_store(
    store: Path,
    edits: list[Edit],
    model: ModelOptions,
    html: Path | None,
    chosen: float | None,
    write: bool,
    tasks: bool,
    as_json: bool,
) -> None:
    opened = EditStore.open(store)

    from memoir_retrieval.editing.open_store import MOST_OWN, make_references
    from memoir_retrieval.evaluation.calibration import calibrate_store, unrelated_to, with_this_judge, write_tau
    from memoir_retrieval.evaluation.measure import stored_ids
    from memoir_retrieval.lookup.retriever import Retriever
    from memoir_retrieval.store.threshold import set_tau

    manifest = opened.manifest
    if edits:
        ids = stored_ids(opened.edits, edits)
        rephrases = [(i, text) for i, edit in zip(ids, edits, strict=True) for text in edit.rephrases]
    else:
        rephrases = [(edit.id, text) for edit in opened.edits for text in edit.rephrases]
    if write and not rephrases:
        refuse_idle(
            f"with --write where no edit of {store} has a rephrasing",
            "name a FILE of its edits with `rephrases`, or leave it out",
            "html",
        )
    unrelated = unrelated_to(opened.edits, edits)
    base = model.load(manifest)
    notes.print(f"measuring {len(opened.edits)} edits, {len(rephrases)} rephrasings, {len(unrelated)} other prompts")
    judged = with_this_judge(opened)
    if tasks:
        judged = with_this_judge(opened, _learn(judged, base))
    if judged.manifest.span.candidates and not len(judged.tasks):
        notes.print(
            f"{store} knows tasks, such as a translation, by words alone: --tasks has it use the activations of "
            f"{manifest.model}, too"
        )
    retriever = Retriever(judged, base)
    references = judged.references
    if edits or not references.texts:
        probes = [probe.prompt for edit in edits for probe in edit.locality]
        references = make_references(base, judged.manifest, retriever.fingerprint, probes)
        if (own := len(set(probes))) > MOST_OWN:
            notes.print(f"{own} locality prompts: {MOST_OWN} of them, evenly drawn, are the store's reference prompts")
    calibration = None
    if rephrases or not write:
        calibration = calibrate_store(retriever, rephrases, unrelated, references)
        tau, threshold = calibration.suggested.tau, calibration.threshold
    else:
        contexts = len(manifest.masked_contexts)
        tau, threshold = set_tau(retriever.index, judged.edits, references, retriever.judge, contexts)
    kept = tau if chosen is None else chosen
    if write:
        measured = replace(judged, manifest=manifest)
        if chosen is None:
            generation = write_tau(measured, tau, references, threshold).generation
        else:
            generation = write_tau(measured, chosen).generation
        notes.print(
            f"tau {kept:g} written to {store} as generation {generation}; a running server keeps {manifest.tau}"
        )
    if as_json:
        echo_json(msgspec.to_builtins(calibration) if calibration else {"tau": kept})
    else:
        _print(store, calibration, manifest.tau, tau, write)
        click.echo(f"tau {kept}: {describe_tau(threshold if chosen is None else None)}")
    if html and calibration:
        from memoir_retrieval.evaluation.report import calibration_page

        publish(html, calibration_page(calibration, str(store)).encode())
        notes.print(f"pictures written to {html}")


def _print(store: Path, calibration: Calibration | None, before: float, tau: float, write: bool) -> None:
    if calibration:
        _show_taus(calibration, store)
        _show_overlaps(calibration.overlaps)
        for near in calibration.nearest:
            click.echo(f"nearest unrelated: {near.overlap:.3f} {near.prompt!r} to edit {near.edit}")
    else:
        notes.print(f"no edit of {store} has a rephrasing, so only tau is set: name a FILE to measure it")
    click.echo(
        f"tau {tau} suggested, "
        + (f"{before} was the store's" if write else f"{before} is the store's; --write puts {tau} into it")
    )


def _learn(store: EditStore, base: BaseModel) -> NDArray[np.float32]:
    from memoir_retrieval.evaluation.train_tasks import learn_tasks

    if not store.manifest.span.candidates:
        raise ConfigError(
            f"--tasks needs a store that looks up parts of a message, and {store.path} does not, because its edits "
            "were "
            "not made in chats or act from a question's first token on: leave it out"
        )
    notes.print(f"learning tasks from the activations of {base.name}")
    learnt = learn_tasks(base, store.manifest.span)
    notes.print(
        f"learnt from {learnt.messages} messages; of messages held back it takes {learnt.caught:.0%} of those with a "
        f"task for tasks without help of words, and {learnt.lost:.1%} of those without one"
    )
    return learnt.tasks


def _show_taus(calibration: Calibration, store: Path) -> None:
    table = Table("tau", "rephrasings that find their edit", "unrelated that match", title=str(store))
    tau = calibration.suggested.tau
    around = {p.tau: p for p in calibration.curve if abs(p.tau - tau) < 0.085 and round(100 * (p.tau - tau)) % 2 == 0}
    for _, point in sorted((around | {calibration.now.tau: calibration.now, tau: calibration.suggested}).items()):
        label = " now" * (point.tau == calibration.now.tau) + " suggested" * (point.tau == tau)
        table.add_row(f"{point.tau:g}{label}", f"{point.rephrases_found:.3f}", f"{point.unrelated_matched:.3f}")
    tables.print(table)


def _show_overlaps(overlaps: Overlaps) -> None:
    """A histogram: for each bin of overlap, how many prompts of each kind; each kind has its own scale."""
    kinds = {"edits": overlaps.edits, "rephrasings": overlaps.rephrases, "unrelated": overlaps.unrelated}
    # 1.0 is the end of the last bin; the 1e-9 keeps .55 out of the bin below it
    bins = {k: [min(int(v / BIN + 1e-9), round(1 / BIN) - 1) for v in values] for k, values in kinds.items()}
    table = Table("overlap", *kinds)
    first = min(min(numbers) for numbers in bins.values())
    counts = {kind: np.bincount(numbers, minlength=round(1 / BIN)) for kind, numbers in bins.items()}
    for number in range(first, round(1 / BIN)):
        cells = [_bar(int(count[number]), int(count.max())) for count in counts.values()]
        table.add_row(f"{number * BIN:.2f}-{(number + 1) * BIN:.2f}", *cells)
    tables.print(table)


def _bar(count: int, largest: int) -> str:
    return f"{'█' * -(-BAR * count // largest)} {count}" if count else ""


def _calibrate_model(
    base: BaseModel,
    edits: list[Edit],
    layers: list[int] | None,
    ks: list[int] | None,
    chat: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    from memoir_retrieval.evaluation.calibration import calibrate_model, unrelated_to
    from memoir_retrieval.model.presets import preset_for

    preset = preset_for(base.model.config).at(base.place, base.d)
    blocks = len(base.blocks)
    layers = layers or sorted({blocks * tenth // 10 for tenth in range(2, 10)} | {preset.layer})
    settings = calibrate_model(base, edits, unrelated_to(edits, edits), layers, ks or [preset.k // 2, preset.k], chat)
    if as_json:
        echo_json(msgspec.to_builtins(settings))
    else:
        form = "chat" if chat else "raw"
        title = f"{len(edits)} edits on {base.name}, {form}"
        table = Table("layer", "k", "tau", "rephrasings found", "gap", title=title)
        for row in settings:
            table.add_row(str(row.layer), str(row.k), f"{row.tau:g}", f"{row.rephrases_found:.3f}", f"{row.gap:+.3f}")
        tables.print(table)
        click.echo(_advice(settings[0], base.place))
    if html:
        from memoir_retrieval.evaluation.report import settings_page

        publish(html, settings_page(settings, base.name).encode())
        notes.print(f"pictures written to {html}")


def _advice(best: Setting, place: Place) -> str:
    chosen = "" if place == "ffn" else f"--place {place} "
    return (
        f"best apart: {chosen}--layer {best.layer} --k {best.k}; `memoir edit` and `memoir eval` show whether edits "
        "also train well there. Leave out --tau: a new store sets it itself"
    )
