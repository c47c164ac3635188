"""`memoir bench latency`: what a client waits for, in percentiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from memoir_retrieval.background import background_prompts
from memoir_retrieval.cli.bench.bench_store import BenchStore
from memoir_retrieval.cli.common import (
    echo_json,
    json_option,
    model_option,
    notes,
    require_place,
    run_benchmark,
    store_argument,
)
from memoir_retrieval.store.files import publish


def _counts(_context: click.Context, _option: click.Parameter, text: str) -> list[int]:
    counts = [int(number) for number in text.split(",") if number.strip().isdigit()]
    if not counts or len(counts) != len(text.split(",")) or min(counts) < 1:
        raise click.BadParameter(f"{text!r} is not a list of counts: write for example 100,10000")
    return counts


@click.command("latency")
@store_argument
@model_option
@click.option(
    "--edits",
    callback=_counts,
    default="100,10000,100000",
    show_default=True,
    help="Edits of each store; random masks fill it up.",
)
@click.option("--concurrent", callback=_counts, default="1,8,32", show_default=True, help="Requests at a time.")
@click.option("--requests", type=click.IntRange(min=2), default=16, show_default=True, help="Fewest requests per turn.")
@click.option("--tokens", type=click.IntRange(min=2), default=16, show_default=True, help="New tokens per request.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Turns of each kind.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write charts to this HTML file.")
@json_option
def bench_latency(
    store: Path,
    model: str | None,
    edits: list[int],
    concurrent: list[int],
    requests: int,
    tokens: int,
    rounds: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure the time to the first token, between tokens and of the lookup: median, 95th and 99th percentile.

    It is measured without the plugin, and with it for requests that match nothing, that match an edit, and that were
    asked before.

    \b
    Example:
      memoir bench latency edits --edits 100,100000 --concurrent 1,32 --plot latency.html
    """
    if plot is not None:
        require_place(plot, "the page", "--plot")
    bench = BenchStore(store, model)
    most = max(*concurrent, requests)
    settings = {
        **bench.settings,
        "unmatched": bench.rows(background_prompts()[:most]),
        "matched": bench.rows([edit.prompt for edit in list(bench.store.edits)[: min(most, *edits)]]),
        "edits": edits,
        "concurrent": concurrent,
        "requests": requests,
        "tokens": tokens,
        "rounds": rounds,
    }
    result = run_benchmark("memoir_vllm.bench.latency", settings, bench.environment)
    if as_json:
        echo_json(result)
    else:
        _print(result["rows"])
    if plot is not None:
        from memoir_retrieval.evaluation.report.page import latency_page  # it imports torch

        publish(plot, latency_page(result["rows"], bench.model).encode())
        notes.print(f"charts written to {plot}")


def _print(rows: list[dict[str, Any]]) -> None:
    click.echo(f"{'':15}{'':11}{'edits':>8}{'at a time':>11}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}")
    for row in rows:
        what = row["what"].replace("_", " ")
        counts = f"{row['edits']:>8}{row['concurrent']:>11}"
        click.echo(f"{what:15}{row['kind']:11}{counts}{row['p50']:>10.2f}{row['p95']:>10.2f}{row['p99']:>10.2f}")
