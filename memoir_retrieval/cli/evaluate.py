"""`memoir eval`: measure a store with the file that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec
from rich.table import Table

from memoir_retrieval.background import control_prompts
from memoir_retrieval.cli.common import (
    echo_json,
    edit_file,
    json_option,
    load_edits,
    model_option,
    notes,
    store_argument,
    tables,
    tau_option,
    threads_option,
)
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.evaluation.contexts import CONTEXTS
from memoir_retrieval.evaluation.texts import read_texts
from memoir_retrieval.store.files import publish
from memoir_retrieval.store.read import EditStore


@click.command("eval")
@store_argument
@edit_file
@click.option(
    "--context",
    type=click.Choice([*CONTEXTS, "all"]),
    default="plain",
    show_default=True,
    help="Ask alone, under a long system prompt, as third turn, after passages in a system message, or in all of "
    "these; inline: after passages in the user's own. None is used in training.",
)
@click.option(
    "--controls",
    type=click.IntRange(0, 256),
    default=256,
    show_default=True,
    help="Unrelated prompts whose free answers are compared with the unedited model's.",
)
@click.option(
    "--text", "text_file", type=click.Path(path_type=Path), help="Text or JSONL whose perplexity is compared."
)
@click.option("--server", metavar="URL", help="Ask a running server, such as http://127.0.0.1:8000.")
@model_option
@tau_option
@click.option("--device", default="cpu", show_default=True, help="Where the model runs, such as cuda.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the JSON (default: DIR.eval.json).")
@json_option
@threads_option
def eval_command(
    store: Path,
    file: Path,
    file_format: str | None,
    limit: int | None,
    context: str,
    controls: int,
    text_file: Path | None,
    server: str | None,
    model: str | None,
    tau: float | None,
    device: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure reliability, generality, locality and exact answers of the edits of FILE.

    \b
    Example:
      memoir eval edits corrections.jsonl
      memoir eval edits corrections.jsonl --context all --text wikitext.jsonl --json
    """
    if server and tau is not None:
        raise ConfigError(f"--tau {tau} cannot be set from here: with --server the store's own is used; leave it out")
    where = out or store.with_name(store.resolve().name + ".eval.json")
    if not where.parent.is_dir():  # said now, not after the minutes that measuring takes
        raise ConfigError(f"the report cannot be written: {where.parent} is no folder; choose another --out")
    edits = load_edits(file, file_format, limit, "first")
    texts = read_texts(text_file) if text_file else []
    opened = EditStore.open(store)

    from memoir_retrieval.evaluation.measure import AskableModel, evaluate

    asked: AskableModel
    if server:
        from memoir_retrieval.client.server_model import ServerModel

        asked = ServerModel(server, opened, model)
        threshold = opened.manifest.tau
    else:
        from memoir_retrieval.lookup.reference import EditedModel

        asked = EditedModel.open(store, model, tau=tau, device=device)
        threshold = asked.retriever.tau
    notes.print(f"asking {len(edits)} edits, their rephrasings and unrelated prompts ({context})")
    report = evaluate(
        asked,
        opened.edits,
        edits,
        tau=threshold,
        context=context,
        controls=control_prompts()[:controls],
        texts=texts,
    )
    told = msgspec.to_builtins(report)
    publish(where, msgspec.json.format(msgspec.json.encode(told), indent=1) + b"\n")
    notes.print(f"written to {where}")
    if as_json:
        echo_json(told)
        return
    table = Table("score", "value", title=f"{report.edits} edits of {store}, asked {context}")
    for name, score in flat(told).items():
        table.add_row(name, f"{score:.4f}" if isinstance(score, float) else str(score))
    tables.print(table)


def flat(told: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Every score by its dotted name, without those that there was nothing to measure on."""
    scores: dict[str, Any] = {}
    for key, value in told.items():
        if isinstance(value, dict):
            scores |= flat(value, f"{before}{key}.")
        elif value is not None:
            scores[before + key] = value
    return scores
