"""`memoir demo`: the whole path once, from a file of edits to answers over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from threading import Event
from typing import NamedTuple
from urllib.request import ProxyHandler, build_opener

import click
from rich.table import Table

from memoir_retrieval.cli.common import beside, notes, tables, threads_option
from memoir_retrieval.cli.edit import train
from memoir_retrieval.cli.serve import server_command
from memoir_retrieval.edits.files import read_edits
from memoir_retrieval.edits.record import Edit, prompt_key
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.model.base import identify, resolve
from memoir_retrieval.model.embedded import get_model
from memoir_retrieval.store.manifest import MANIFEST
from memoir_retrieval.store.read import EditStore

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = "smollm2-135m"
START_TIMEOUT = 600.0
SHOWN = 80  # characters of an answer in the table; answers are compared whole


class DemoAnswer(NamedTuple):
    """A question, what the model says without and with edits, and what it should say, if anything."""

    kind: str
    question: str
    before: str
    after: str
    edit: int | None
    overlap: float
    target: str | None


@click.command()
@click.option("--file", type=click.Path(path_type=Path), default=EXAMPLES / "zsre-100.jsonl", help="The edits.")
@click.option(
    "--store", "-s", type=click.Path(path_type=Path), default=Path(".memoir/demo"), show_default=True, help="The store."
)
@click.option("--edits", "count", type=click.IntRange(min=1), default=100, show_default=True, help="How many edits.")
@click.option(
    "--show", type=click.IntRange(min=1), default=6, show_default=True, help="Questions of each kind to print."
)
@click.option("--port", type=int, help="Port of the server (default: a free one).")
@click.option("--keep", is_flag=True, help="Leave the server up until Ctrl-C, to ask it more.")
@threads_option
def demo(file: Path, store: Path, count: int, show: int, port: int | None, keep: bool) -> None:
    """Edit the embedded model with 100 published edits, serve it with vLLM, and ask it before and after.

    What is still valid is kept: a second run only starts the server and asks.

    \b
    Example:
      memoir demo
    """
    if not file.is_file():
        raise ConfigError(f"{file} is not there: the examples come with the source; give --file EDITS.jsonl")
    if find_spec("openai") is None:  # said now, not after the minutes that editing takes
        raise ConfigError("the demo asks with openai, which is not installed: pip install 'memoir-retrieval[eval]'")
    get_model(MODEL, lambda line: notes.print(f"demo: {line}"))
    edits = read_edits(file)[:count]
    _edit(edits, store)
    unrelated = [probe.prompt for edit in edits for probe in edit.locality]
    questions: list[tuple[str, str, str | None]] = [("edited", e.prompt, e.target) for e in edits]
    questions += [("rephrased", e.rephrases[0], e.target) for e in edits if e.rephrases]
    questions += [("unrelated", question, None) for question in _unrelated(EXAMPLES / "unrelated.jsonl") + unrelated]
    notes.print("demo: starting the vLLM server (about a minute)")
    with _server(store, port or _free_port()) as url:
        notes.print(f"demo: asking {len(questions)} questions at {url}, each with and without edits")
        _print(_ask(url, questions), show)
        if keep:
            notes.print(f"demo: the server stays at {url}, model {MODEL}; Ctrl-C stops it")
            with suppress(KeyboardInterrupt):
                Event().wait()
        else:
            notes.print(f"demo: to ask it yourself: memoir serve {MODEL} --store {store}")


def _edit(edits: Sequence[Edit], store: Path) -> None:
    stored = set()
    if (store / MANIFEST).exists():
        opened = EditStore.open(store)
        opened.require(identify(resolve(MODEL), opened.manifest.module), MODEL)
        if not opened.manifest.chat:
            raise ConfigError(f"store {store} was made with --no-chat, the demo chats: choose another --store")
        stored = {(prompt_key(edit.prompt), edit.target) for edit in opened.edits}
    missing = [edit for edit in edits if (prompt_key(edit.prompt), edit.target) not in stored]
    if not missing:
        notes.print(f"demo: {store} holds the {len(edits)} edits already")
        return
    notes.print(f"demo: training {len(missing)} edits into {store} (one or two seconds each)")
    from memoir_retrieval.editing.editor import Editor
    from memoir_retrieval.model.base import load_model

    with Editor(load_model(MODEL), store) as editor:
        train(editor, missing)


def _unrelated(path: Path) -> list[str]:
    if not path.is_file():  # it comes with the source; the unrelated questions of --file do as well
        return []
    return [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _server(store: Path, port: int) -> Iterator[str]:
    """A server of our own on the loopback interface, stopped at the end whatever happens."""
    flags = ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048", "--enforce-eager"]
    command, environment = server_command(MODEL, store, flags)
    log = beside(store, "-server.log")
    with open(log, "wb") as out:
        # A session of its own: Ctrl-C reaches the server once, from here, and vLLM's workers share its group.
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        with notes.status("waiting for the server"):
            _wait_until_healthy(process, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):  # whatever is left of the server and its workers
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Raises ConfigError with the end of the log where the server stops or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT
    direct = build_opener(ProxyHandler({}))  # past the proxies of the environment
    while process.poll() is None and time.monotonic() < deadline:
        try:
            direct.open(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except OSError:  # URLError is one
            time.sleep(1)
    tail = log.read_text(errors="replace").splitlines()[-5:]
    why = f"exit code {process.returncode}" if process.poll() is not None else f"no answer within {START_TIMEOUT:.0f} s"
    raise ConfigError(f"the server did not start ({why}), its log {log} ends: {' | '.join(tail)}")


def _ask(url: str, questions: Sequence[tuple[str, str, str | None]]) -> list[DemoAnswer]:
    from memoir_retrieval.client.server import Server

    server = Server(url, retries=2)

    def row(entry: tuple[str, str, str | None]) -> DemoAnswer:
        kind, question, target = entry
        before, after = (server.ask(question, chat=True, tokens=48, off=off) for off in (True, False))
        overlap = after.decision.overlap if after.decision else 0.0
        return DemoAnswer(kind, question, before.text.strip(), after.text.strip(), after.edit, overlap, target)

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(row, questions))


def _print(rows: Sequence[DemoAnswer], show: int) -> None:
    table = Table("", "question", "before", "after", "edit", "overlap")
    for kind in ("edited", "rephrased", "unrelated"):
        for row in [r for r in rows if r.kind == kind][:show]:
            edit = "-" if row.edit is None else str(row.edit)
            before, after = (shorten(text, SHOWN, placeholder=" ...") for text in (row.before, row.after))
            table.add_row(kind, row.question, before, after, edit, f"{row.overlap:.2f}")
        table.add_section()
    tables.print(table)
    for kind in ("edited", "rephrased"):
        of = [row for row in rows if row.kind == kind]
        # As `evaluate` does: published targets may begin with a blank, answers are stripped.
        right = sum(row.after == (row.target or "").strip() for row in of)
        was = sum(row.before == (row.target or "").strip() for row in of)
        click.echo(f"{kind}: {right} of {len(of)} answers are the target, {was} were before")
    unrelated = [row for row in rows if row.kind == "unrelated"]
    same = sum(row.after == row.before for row in unrelated)
    matched = sum(row.edit is not None for row in unrelated)
    click.echo(f"unrelated: {same} of {len(unrelated)} answers are unchanged, {matched} matched an edit")
