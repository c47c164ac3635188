"""`memoir index info`: what a store's index holds and how it is searched."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
import numpy as np

from memoir_index import choose_plan
from memoir_index.scan import SMALL_BATCH
from memoir_retrieval.cli.common import describe_tau, echo, echo_json, json_option, store_argument
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.store.read import EditStore


@click.command("info")
@store_argument
@click.option("--tau", type=float, help="Least overlap that matches (default: the store's own).")
@json_option
def info(store: Path, tau: float | None, as_json: bool) -> None:
    """Show the size of a store's index, and how lookups at its tau are done.

    \b
    Example:
      memoir index info edits --json
    """
    opened = EditStore.open(store, check=False)
    manifest = opened.manifest
    tau = manifest.tau if tau is None else tau
    if not 0 < tau <= 1:
        raise ConfigError(f"tau is {tau}: choose 0 < tau <= 1 (this store was made with {manifest.tau})")
    masks, edits = len(opened.ids), len(set(opened.ids.tolist()))
    threshold = manifest.threshold if tau == manifest.tau else None
    # Lookups search the masks of edits that require nothing; of the others those alone whose words stand in a question.
    tied = [edit.id for edit in opened.edits if edit.requires]
    searched = masks - int(np.isin(opened.ids, tied).sum())
    plan = choose_plan(searched, manifest.d, manifest.k, tau)
    bytes_per_mask = manifest.d // 8 + 8 + plan.bits // 8  # code, edit id, sketch
    report = {
        "generation": manifest.generation,
        "edits": edits,
        "masks": masks,
        "masks_searched": searched,
        "additions": len(opened.additions),
        "d": manifest.d,
        "k": manifest.k,
        "tau": tau,
        "threshold": msgspec.to_builtins(threshold) | {"bound": threshold.bound} if threshold else None,
        "bytes_per_mask": bytes_per_mask,
        "bytes_per_edit": round(bytes_per_mask * masks / edits, 1) if edits else None,
        "plan": {"kind": plan.kind, "sketch_bits": plan.bits, "why": plan.why},
        "threads": {str(batch): "one" if batch <= SMALL_BATCH else "all" for batch in (1, 32)},
    }
    if as_json:
        echo_json(report)
        return
    echo(
        f"{store}, generation {manifest.generation}: {edits} edits, {masks} masks of {manifest.d} bits with "
        f"{manifest.k} ones"
    )
    if opened.additions:
        echo(f"additions: {len(opened.additions)} of {opened.tail.size} bytes, which a later write puts into the files")
    echo(f"memory: {bytes_per_mask} bytes per mask, {bytes_per_mask * masks / 2**20:.1f} MiB in all")
    what = "full scan" if plan.kind == "scan" else f"sketch of {plan.bits} bits, then whole masks"
    echo(f"lookup at tau {tau:g}: {what} ({plan.why})")
    if searched < masks:
        echo(f"{searched} masks are searched so; the others are of edits that require words, and wait for these")
    if tau == manifest.tau:
        echo(f"tau {tau:g}: {describe_tau(threshold)}")
    echo(f"threads: one for up to {SMALL_BATCH} queries at a time, all for more")
