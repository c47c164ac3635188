"""`memoir verify`: that a running server does what it must, as a report."""

from __future__ import annotations

import os
from pathlib import Path

import click
import msgspec

from memoir_retrieval.cli.common import echo, echo_json, json_option, notes
from memoir_retrieval.client.verify import ServerProbe, Verification
from memoir_retrieval.client.verify import verify as run
from memoir_retrieval.store.read import EditStore

__all__ = ["verify"]


@click.command()
@click.option("--server", metavar="URL", required=True, help="The server, such as http://127.0.0.1:8000.")
@click.option("--store", "-s", type=click.Path(path_type=Path), help="The store it serves; what matches is asked too.")
@click.option("--base", metavar="URL", help="A server of the same model and flags without the plugin, to compare with.")
@click.option(
    "--chat/--no-chat", default=None, help="Ask through the chat template, or raw (default: the store's own)."
)
@click.option("--prompts", type=click.IntRange(min=1, max=100), default=8, show_default=True, help="Of each kind.")
@click.option("--tokens", type=click.IntRange(min=1), default=16, show_default=True, help="Length of an answer.")
@click.option(
    "--turns", type=click.IntRange(min=0), default=5, show_default=True, help="Of the overhead; 0: not measured."
)
@json_option
def verify(
    server: str,
    store: Path | None,
    base: str | None,
    chat: bool | None,
    prompts: int,
    tokens: int,
    turns: int,
    as_json: bool,
) -> None:
    """Prove that a running server's edits act where they must and nowhere else.

    Asks it matched, unmatched and opted-out requests on your hardware and measures what edits cost there. The report is
    made to be pasted into a bug report. Exit code 1 where something does not hold. A key for the server
    is read from OPENAI_API_KEY. For exact bits nobody else should ask the server meanwhile.

    \b
    Example:
      memoir verify --server http://127.0.0.1:8000 --store edits
    """
    opened = EditStore.open(store) if store else None
    if chat is None:
        chat = opened.manifest.chat if opened else True
    key = os.environ.get("OPENAI_API_KEY") or "none"
    probe = ServerProbe(server, chat=chat, api_key=key)
    notes.print(f"asking {probe.model} at {probe.url}, {prompts} prompts of each kind")
    report = run(
        probe,
        opened,
        ServerProbe(base, chat=chat, api_key=key) if base else None,
        prompts=prompts,
        tokens=tokens,
        turns=turns,
    )
    if as_json:
        echo_json({**msgspec.to_builtins(report), "holds": report.holds})
    else:
        _print(report)
    if not report.holds:
        raise click.exceptions.Exit(1)


def _print(report: Verification) -> None:
    echo(f"memoir verify: {report.model} at {report.server}, vLLM {report.vllm}, generation {report.generation}")
    echo(f"asked by: {report.client}")
    for check in report.checks:
        echo(f"{check.state:4s}  {check.name}: {check.detail}")
    for cost in report.overhead:
        turns = " ".join(f"{turn:.3f}" for turn in cost.turns)
        echo(f"time  {cost.kind} over opted out: {cost.ratio:.3f} (turns {turns}; {cost.opted_out_s:.2f} s a batch)")
    failed = sum(check.state == "fail" for check in report.checks)
    skipped = sum(check.state == "skip" for check in report.checks)
    echo(f"{'holds' if report.holds else 'DOES NOT HOLD'}: {failed} failed, {skipped} not looked at")
