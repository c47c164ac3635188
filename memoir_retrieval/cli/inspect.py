"""`memoir list`, `show` and `lookup`: what a store holds, and what a prompt would match."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.table import Table

from memoir_retrieval.cli.common import (
    echo,
    echo_json,
    json_option,
    model_option,
    printable,
    store_argument,
    tables,
    tau_option,
    threads_option,
)
from memoir_retrieval.edits.formats import chat_messages
from memoir_retrieval.errors import ConfigError, EditFileError
from memoir_retrieval.store.read import EditStore

if TYPE_CHECKING:
    from memoir_retrieval.lookup.retriever import Part
    from memoir_retrieval.question.prompts import Message


# A table is laid out as a whole before any of it is printed: above so many edits they are printed as they are read.
LONG = 2000


@click.command("list")
@store_argument
@json_option
def list_command(store: Path, as_json: bool) -> None:
    """List the edits of a store.

    \b
    Example:
      memoir list edits --json
    """
    opened = EditStore.open(store, check=False)
    if as_json:
        echo_json([msgspec.to_builtins(edit) for edit in opened.edits])
        return
    title = f"{store}: {len(opened.edits)} edits of {opened.manifest.model}"
    if len(opened.edits) > LONG:
        echo(title)
        for edit in opened.edits:
            echo(f"{edit.id}: {edit.prompt} -> {edit.target} (loss {edit.loss:.3f})")
        return
    table = Table("id", "prompt", "target", "loss", title=title)
    for edit in opened.edits:
        table.add_row(str(edit.id), edit.prompt, edit.target, f"{edit.loss:.3f}")
    tables.print(table)


@click.command()
@store_argument
@click.argument("edit_id", metavar="ID", type=int)
@json_option
def show(store: Path, edit_id: int, as_json: bool) -> None:
    """Show everything a store knows of one edit.

    \b
    Example:
      memoir show edits 3
    """
    edit = msgspec.to_builtins(EditStore.open(store, check=False).edit(edit_id))
    if as_json:
        echo_json(edit)
        return
    for key, value in edit.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        # Further lines are indented, so that none of them can be taken for a key.
        first, *others = printable(text, lines=True).split("\n")
        click.echo("\n".join([f"{key:10s} {first}", *(f"{'':10s} {line}" for line in others)]))


@click.command()
@store_argument
@click.argument("prompt", required=False)
@click.option(
    "--messages",
    type=click.Path(path_type=Path),
    help="JSON file with chat messages, or a request's body with them, instead of PROMPT.",
)
@model_option
@tau_option
@click.option("--why", is_flag=True, help="Show which parts of the message are looked up, and what decides.")
@json_option
@threads_option
def lookup(
    store: Path,
    prompt: str | None,
    messages: Path | None,
    model: str | None,
    tau: float | None,
    why: bool,
    as_json: bool,
) -> None:
    """Show which edit a prompt matches, without generating.

    \b
    Example:
      memoir lookup edits "Which university did Watts Humphrey attend?"
      memoir lookup edits --why "Hi! Which university did Watts Humphrey attend? Thanks."
    """
    if (prompt is None) == (messages is None):
        raise ConfigError("give either a PROMPT or --messages FILE")
    question: Any = prompt if messages is None else _messages(messages)

    from memoir_retrieval.lookup.retriever import Retriever

    retriever = Retriever.open(store, model, tau=tau)
    # How far the nearest edit was is what one wants to know of a prompt that matches none.
    match, nearest = retriever.decide_batch([question])[0]
    best = match or nearest
    second = best.runner_up if best else None
    parts = retriever.parts(question) if why else []
    vetoed = nearest if nearest and retriever.was_vetoed(match, nearest) else None
    if as_json:
        answer: dict[str, Any] = {
            "edit": match.id if match else None,
            "nearest": nearest.id if nearest else None,
            "overlap": round(best.overlap, 4) if best else 0.0,
            "tau": retriever.tau,
            "prompt": match.edit.prompt if match else None,
            "target": match.edit.target if match else None,
            "passed_over": {"edit": vetoed.id, "overlap": round(vetoed.overlap, 4), "requires": vetoed.edit.requires}
            if vetoed
            else None,
            "runner_up": {"edit": second[0], "overlap": round(second[1], 4)} if second else None,
        }
        if why:
            answer["parts"] = [_part(part) for part in parts]
        echo_json(answer)
        return
    if match:
        echo(f"edit {match.id}, overlap {match.overlap:.3f} (tau {retriever.tau}): {match.edit.prompt}")
        echo(f"  -> {match.edit.target}")
    else:
        echo(f"no edit matches (tau {retriever.tau}): the base model answers")
        if nearest:
            echo(f"  nearest: edit {nearest.id}, overlap {nearest.overlap:.3f}: {nearest.edit.prompt}")
    if vetoed:
        required = json.dumps(vetoed.edit.requires, ensure_ascii=False)
        reason = f"which requires {required}" if vetoed.edit.requires else "whose words ask for something else"
        echo(f"  passed over: edit {vetoed.id}, overlap {vetoed.overlap:.3f}, {reason}")
    if second:
        echo(f"  next best: edit {second[0]}, overlap {second[1]:.3f}")
    for part in parts:
        state = "decides" if part.decides and match else "matches" if part.match is not None else "looked up"
        near = f"nearest edit {part.nearest}, overlap {part.overlap:.3f}{_reason(part)}"
        echo(f"  {state}, {part.kind}: {near}: {part.text.strip()}")


def _part(part: Part) -> dict[str, Any]:
    verdict = part.verdict._asdict() if part.verdict else None
    return {**part._asdict(), "overlap": round(part.overlap, 4), "verdict": verdict}


def _reason(part: Part) -> str:
    """What decided about a part that was judged, in brackets."""
    verdict = part.verdict
    if verdict is None:
        return ""
    if verdict.same or verdict.part in ("task", "relation"):
        reason = f"something else is asked for: {verdict.task}" if verdict.task else verdict.part
    else:
        words = [f"{sign}{word}" for sign, terms in (("-", verdict.lacking), ("+", verdict.added)) for word, _ in terms]
        reason = " ".join(words[:6]) or verdict.part
    return f" ({'same question' if verdict.same else 'another question'}: {reason})"


def _messages(path: Path) -> list[Message]:
    def wrong(why: str) -> ConfigError:
        return ConfigError(f'{path} holds no chat messages ({why}): write [{{"role": ..., "content": ...}}]')

    try:
        body = msgspec.json.decode(path.read_bytes())
        messages = body.get("messages") if isinstance(body, dict) else body
        if not isinstance(messages, list) or not messages:
            raise wrong("it is empty" if messages == [] else "it has no list of them")
        return list(chat_messages("messages", messages))
    except OSError as error:
        raise wrong(error.strerror or "cannot be read") from None
    except (msgspec.DecodeError, UnicodeDecodeError, EditFileError) as error:
        raise wrong(str(error)) from None
