"""`memoir verify`: that a running server does what it must, as a report."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from memoir_retrieval.cli.common import echo, echo_json, json_option, notes, refuse_idle
from memoir_retrieval.client.verify import Check, ServerProbe, Verification
from memoir_retrieval.client.verify import verify as run
from memoir_retrieval.edits.record import Edit
from memoir_retrieval.errors import AdminError, ConfigError
from memoir_retrieval.store.read import EditStore

if TYPE_CHECKING:  # httpx and asyncio would make every command start later
    from memoir_retrieval.client.admin import AdminClient, Change
    from memoir_retrieval.client.soak import Soak, SoakReport

__all__ = ["verify"]

SOAK_EDIT = Edit(
    prompt="Which word ends the soak of the harbour in Quellmark?", target="Copper", source="memoir verify"
)


@click.command()
@click.option("--server", metavar="URL", required=True, help="The server, such as http://127.0.0.1:8000.")
@click.option(
    "--store",
    "-s",
    type=click.Path(path_type=Path),
    help="The store that it serves; prompts of its edits are then asked too.",
)
@click.option("--base", metavar="URL", help="A server of the same model and flags without the plugin, to compare with.")
@click.option(
    "--chat/--no-chat", default=None, help="Ask through the chat template, or raw (default: the store's own)."
)
@click.option(
    "--prompts", type=click.IntRange(min=1, max=100), default=8, show_default=True, help="Prompts of each kind."
)
@click.option("--tokens", type=click.IntRange(min=1), default=16, show_default=True, help="Tokens of an answer.")
@click.option(
    "--turns",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="Turns in which the overhead is measured; 0 leaves it out.",
)
@click.option(
    "--soak",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MINUTES",
    help="Soak the server instead: ask with many clients at once for this long, and compare every answer.",
)
@click.option(
    "--requests",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Requests after which a soak ends, if earlier.",
)
@click.option(
    "--clients", type=click.IntRange(1, 256), default=8, show_default=True, help="Clients of a soak at the same time."
)
@click.option(
    "--changes",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="How often a soak adds an edit of its own or removes it; needs MEMOIR_ADMIN_TOKEN.",
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
    soak: float | None,
    requests: int,
    clients: int,
    changes: int,
    as_json: bool,
) -> None:
    """Prove that a running server's edits act where they must and nowhere else.

    The command sends matched, unmatched and opted-out requests on your hardware, and measures what edits cost there.
    Paste its report into a bug report. The exit code is 1 if something does not hold. A key for the server is read
    from OPENAI_API_KEY. Bits can be compared only if nobody else uses the server at the same time.

    With --soak, many clients ask at once instead. Each answer is compared with that of the same server when it was
    quiet.


    \b
    Example:
      memoir verify --server http://127.0.0.1:8000 --store edits
      memoir verify --server http://127.0.0.1:8000 --store edits --soak 10
    """
    if soak is None:
        refuse_idle("without a soak", "add --soak MINUTES, or leave it out", "requests", "clients", "changes")
    else:
        refuse_idle("in a soak", "leave it out, or --soak", "base", "turns")
        if store is None:
            raise click.UsageError("--soak asks the prompts of a store: add --store DIR")
    opened = EditStore.open(store) if store else None
    if chat is None:
        chat = opened.manifest.chat if opened else True
    if soak is not None and opened is not None:
        import asyncio

        from memoir_retrieval.client.soak import NEAR, Soak

        near = NEAR.get(opened.manifest.dtype, NEAR["bfloat16"])
        soaking = Soak(server, tokens=tokens, clients=clients, near=near)
        _end(asyncio.run(_soak(soaking, server, opened, chat, prompts, soak, requests, changes)), as_json)
        return
    probe = ServerProbe(server, chat=chat)
    notes.print(f"asking {probe.model} at {probe.url}, {prompts} prompts of each kind")
    report = run(
        probe,
        opened,
        ServerProbe(base, chat=chat) if base else None,
        prompts=prompts,
        tokens=tokens,
        turns=turns,
    )
    _end(report, as_json)


def _end(report: Verification | SoakReport, as_json: bool) -> None:
    if as_json:
        echo_json({**msgspec.to_builtins(report), "holds": report.holds})
    elif isinstance(report, Verification):
        _print(report)
    else:
        _print_soak(report)
    if not report.holds:
        raise click.exceptions.Exit(1)


async def _soak(
    soak: Soak, url: str, store: EditStore, chat: bool, prompts: int, minutes: float, requests: int, changes: int
) -> SoakReport:
    from memoir_retrieval.client.admin import AdminClient
    from memoir_retrieval.client.soak import soak_prompts

    more = [SOAK_EDIT.prompt] if changes else []
    questions = soak_prompts(store, prompts, chat=chat, length=await soak.length(), more=more)
    notes.print(f"soaking {url} for {minutes:g} minutes or {requests} requests")
    ask = functools.partial(soak.run, questions, minutes=minutes, requests=requests, watch=notes.print)
    if not changes:
        return await ask()
    token = os.environ.get("MEMOIR_ADMIN_TOKEN")
    if not token:
        raise ConfigError("--changes adds and removes edits: set MEMOIR_ADMIN_TOKEN to the server's token")
    async with AdminClient(url, token) as admin:
        additions: dict[str, Change] = {}  # as the server last described them

        async def change() -> None:
            edits = await _soak_edits(admin)
            for edit in edits:
                await admin.remove(edit)
            if not edits:
                await admin.add(SOAK_EDIT, watch=lambda addition: additions.update({addition.id: addition}))

        left = ""
        try:
            report = await ask(changes=changes, change=change)
        finally:
            left = await _clear(admin, [change for change in additions.values() if change.finished is None])
            if left:
                notes.print(left)
    gone = Check("the soak's edit is removed", "fail" if left else "ok", left or "the store does not have it")
    return msgspec.structs.replace(report, checks=(*report.checks, gone))


async def _soak_edits(admin: AdminClient) -> list[int]:
    """Ids of the soak's edit in the store of a server."""
    page = await admin.edits(SOAK_EDIT.prompt, limit=200)
    return [edit.id for edit in page.edits if (edit.prompt, edit.source) == (SOAK_EDIT.prompt, SOAK_EDIT.source)]


async def _clear(admin: AdminClient, open_additions: Sequence[Change]) -> str:
    """Remove the soak's edit, also one for which nobody waited any more.

    admin: of the server.
    open_additions: those that may go on.
    Returns why it may be in the store still, or "".
    """
    reasons = []
    for addition in open_additions:
        latest = [addition]
        try:
            await admin.wait(addition, watch=latest.append)
        except AdminError as error:
            if latest[-1].finished is None:  # else it has failed, and nothing was stored
                reasons.append(str(error))
    try:
        for edit in await _soak_edits(admin):
            await admin.remove(edit)
    except AdminError as error:
        reasons.append(str(error))
    return (
        f"the edit {SOAK_EDIT.prompt!r} may be in the store still, remove it: {'; '.join(reasons)}" if reasons else ""
    )


def _print(report: Verification) -> None:
    echo(f"memoir verify: {report.model} at {report.server}, vLLM {report.vllm}, generation {report.generation}")
    echo(f"asked by: {report.client}")
    _print_checks(report.checks)
    for cost in report.overhead:
        turns = " ".join(f"{turn:.3f}" for turn in cost.turns)
        echo(f"time  {cost.kind} over opted out: {cost.ratio:.3f} (turns {turns}; {cost.opted_out_s:.2f} s per batch)")
    _print_end(report.checks)


def _print_soak(report: SoakReport) -> None:
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.requests.items())
    echo(f"memoir verify --soak: {report.server}, {report.seconds:.0f} s, {report.generations} generations")
    echo(f"asked: {kinds}")
    preempted = "unknown" if report.preemptions is None else report.preemptions
    echo(
        f"compared: {report.answers} answers, {report.tokens} tokens ({report.unclear} tokens after a near tie were "
        "not)"
    )
    echo(f"preemptions: {preempted}")
    _print_checks(report.checks)
    for line in (*report.differences, *report.errors):
        echo(f"      {line}")
    _print_end(report.checks)


def _print_checks(checks: Sequence[Check]) -> None:
    for check in checks:
        echo(f"{check.state:4s}  {check.name}: {check.detail}")


def _print_end(checks: Sequence[Check]) -> None:
    failed = sum(check.state == "fail" for check in checks)
    skipped = sum(check.state == "skip" for check in checks)
    echo(f"{'DOES NOT HOLD' if failed else 'holds'}: {failed} failed, {skipped} skipped")
