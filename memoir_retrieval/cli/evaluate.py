"""`memoir eval`: measure a store with the file that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec
from rich.table import Table

from memoir_retrieval.background import control_prompts
from memoir_retrieval.cli.common import (
    beside,
    echo_json,
    json_option,
    notes,
    refuse_idle,
    require_place,
    store_argument,
    tables,
    tau_option,
    threads_option,
)
from memoir_retrieval.cli.options import (
    FileOptions,
    MeasuringOptions,
    ModelOptions,
    file_options,
    measuring_options,
    model_options,
)
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.store.files import publish
from memoir_retrieval.store.read import EditStore


@click.command("eval")
@store_argument
@click.argument("file", type=click.Path(path_type=Path))
@file_options
@measuring_options(usual="plain")
@click.option(
    "--server",
    metavar="URL",
    help="Ask a running server, such as http://127.0.0.1:8000, with the API key in OPENAI_API_KEY.",
)
@model_options(dtype=None)
@tau_option
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the JSON (default: DIR.eval.json).")
@json_option
@threads_option
def eval_command(
    store: Path,
    file: Path,
    source: FileOptions,
    measuring: MeasuringOptions,
    server: str | None,
    model: ModelOptions,
    tau: float | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure reliability, generality, locality and exact answers of the edits of FILE.

    \b
    Example:
      memoir eval edits corrections.jsonl
      memoir eval edits corrections.jsonl --context all --text wikitext.jsonl --json
    """
    if server:
        refuse_idle("with --server", "leave it out, or --server", "device")
    if server and tau is not None:
        raise ConfigError(f"--tau {tau} cannot be set from here: with --server the store's own is used; leave it out")
    where = out or beside(store, ".eval.json")
    require_place(where, "the report", "--out")
    texts, context = measuring.texts(), measuring.context or "plain"
    opened = EditStore.open(store)
    edits = source.load_stored(file, opened.edits)

    from memoir_retrieval.evaluation.measure import AskableModel, evaluate

    answering: AskableModel
    if server:
        from memoir_retrieval.client.server_model import ServerModel

        answering = ServerModel(server, opened, model.model_name)
        threshold = opened.manifest.tau
    else:
        from memoir_retrieval.lookup.reference import EditedModel

        answering = EditedModel.open(store, model.model_name, tau=tau, device=model.device)
        threshold = answering.retriever.tau
    notes.print(f"asking {len(edits)} edits, their rephrasings and unrelated prompts ({context})")
    report = evaluate(
        answering,
        opened.edits,
        edits,
        tau=threshold,
        context=context,
        controls=control_prompts()[: measuring.controls],
        texts=texts,
    )
    figures = msgspec.to_builtins(report)
    if as_json:
        echo_json(figures)
    else:
        table = Table("score", "value", title=f"{report.edits} edits of {store}, asked {context}")
        for name, score in flat(figures).items():
            table.add_row(name, f"{score:.4f}" if isinstance(score, float) else str(score))
        tables.print(table)
    publish(where, msgspec.json.format(msgspec.json.encode(figures), indent=1) + b"\n")
    notes.print(f"written to {where}")


def flat(figures: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Every score by its dotted name, without those that there was nothing to measure on."""
    scores: dict[str, Any] = {}
    for key, value in figures.items():
        if isinstance(value, dict):
            scores |= flat(value, f"{before}{key}.")
        elif value is not None:
            scores[before + key] = value
    return scores
