"""`memoir bench serve`: what the plugin costs, as ratios of neighbouring turns in one run."""

from __future__ import annotations

from pathlib import Path

import click

from memoir_retrieval.background import background_prompts
from memoir_retrieval.cli.bench.bench_store import BenchStore
from memoir_retrieval.cli.common import echo_json, json_option, model_option, notes, run_benchmark, store_argument
from memoir_retrieval.question.prompts import Message

__all__ = ["bench_serve"]


@click.command("serve")
@store_argument
@model_option
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Requests at a time.")
@click.option("--tokens", type=click.IntRange(min=1), default=64, show_default=True, help="New tokens per request.")
@click.option("--pairs", type=click.IntRange(min=1), default=7, show_default=True, help="Turns of each engine.")
@click.option("--compiled", is_flag=True, help="Let vLLM compile the model (default: eager).")
@click.option(
    "--lora",
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="LoRA adapter that both engines take: its requests are measured, too, and only tokens per second.",
)
@click.option(
    "--drafts",
    type=click.IntRange(min=1),
    help="Tokens of an n-gram draft: both engines speculate, and only tokens per second are measured.",
)
@json_option
def bench_serve(
    store: Path,
    model: str | None,
    batch: int,
    tokens: int,
    pairs: int,
    compiled: bool,
    lora: Path | None,
    drafts: int | None,
    as_json: bool,
) -> None:
    """Compare tokens per second with and without the plugin, where nothing matches and where everything does.

    \b
    Example:
      memoir bench serve edits --json
    """
    bench = BenchStore(store, model)
    edits = [edit.prompt for edit in list(bench.store.edits)[:batch]]
    long = [_behind_a_long_system_message(edit) for edit in edits] if bench.store.manifest.chat else []
    settings = {
        **bench.settings,
        "unmatched": bench.rows(background_prompts()[:batch]),
        "matched": bench.rows(edits),
        "cached": bench.rows(long),
        "batch": batch,
        "tokens": tokens,
        "pairs": pairs,
        "eager": not compiled,
        "adapter": None if lora is None else str(lora.resolve()),
        "drafts": drafts,
    }
    result = run_benchmark("memoir_vllm.bench.serve", settings, bench.environment)
    if as_json:
        echo_json(result)
        return
    for kind in ("unmatched", "matched", *(["adapter"] if lora else [])):
        notes.print(f"{kind}, milliseconds per step: {result[f'{kind}_step_ms']}")
        speeds = result[f"{kind}_tokens_per_s"]
        notes.print(f"{kind}: {speeds['plugin']} tokens/s with the plugin, {speeds['no_plugin']} without")
        click.echo(f"{kind}_ratio {result[f'{kind}_ratio']:.3f}")
    for key in (
        "ttft_ratio_inline",
        "ttft_ratio_cached",
        "ttft_ratio_long",
        "step_overhead_ms",
        "vs_research_ratio",
    ):
        if key in result:
            click.echo(f"{key} {result[key]:.3f}")


def _behind_a_long_system_message(question: str) -> list[Message]:
    """Some 1000 tokens of plain text before a question."""
    text = " ".join(background_prompts())
    system = f"You are the assistant of an archive. Its index of questions: {text}"
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]
