"""The command line `memoir`. One module a group of commands; torch and vLLM are imported by the commands that need
them, so that `--help`, `list` and `show` answer at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from memoir_retrieval.cli.bench import bench
from memoir_retrieval.cli.calibrate import calibrate
from memoir_retrieval.cli.common import echo
from memoir_retrieval.cli.cures import message
from memoir_retrieval.cli.demo import demo
from memoir_retrieval.cli.doctor import doctor
from memoir_retrieval.cli.edit import edit
from memoir_retrieval.cli.evaluate import eval_command
from memoir_retrieval.cli.hub import pull, push
from memoir_retrieval.cli.index import index
from memoir_retrieval.cli.inspect import list_command, lookup, show
from memoir_retrieval.cli.model import model
from memoir_retrieval.cli.remove import compact, remove
from memoir_retrieval.cli.report import report
from memoir_retrieval.cli.serve import serve
from memoir_retrieval.cli.verify import verify
from memoir_retrieval.errors import MemoirError
from memoir_retrieval.store.manifest import library_version

__all__ = ["cli", "main"]

UNEXPECTED, READER_LEFT = 70, 141
"""Exit codes, as of sysexits.h, and as of a program that SIGPIPE has ended."""


class Commands(click.Group):
    """All commands. Where nobody reads on, click would exit with the code that means "the answer is no"."""

    def make_context(self, *args: Any, **how: Any) -> click.Context:
        """See `click.Group`. It writes the help and the version."""
        with _read_on():
            return super().make_context(*args, **how)

    def invoke(self, ctx: click.Context) -> Any:
        """See `click.Group`."""
        with _read_on():
            return super().invoke(ctx)


@contextmanager
def _read_on() -> Iterator[None]:
    """Within the context a reader that has gone ends the command with a code of its own."""
    try:
        yield
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # what is left in the buffer goes nowhere, without a message
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.exceptions.Exit(READER_LEFT) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(library_version(), package_name="memoir-retrieval")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Correct a served language model without retraining it.

    \b
    Example:
      memoir model get smollm2-135m
      memoir edit corrections.jsonl --model smollm2-135m --store edits
      memoir serve smollm2-135m --store edits
    """


for command in (
    model,
    edit,
    list_command,
    show,
    lookup,
    remove,
    compact,
    index,
    eval_command,
    calibrate,
    serve,
    demo,
    bench,
    doctor,
    report,
    verify,
    push,
    pull,
):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Entry point.

    arguments: what is typed behind `memoir`; None takes those of the process.
    Exit code 0: done; 1: the answer is no; 2: bad input or environment; 70: an error that no command expects; 130:
        interrupted; 141: whoever read the output has gone.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with _ended_as_interrupted():
            # Outside standalone mode click returns the exit code of `Exit` instead of raising it.
            code = cli.main(arguments, prog_name="memoir", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as help_wanted:
        click.echo(help_wanted.format_message(), err=True)
        sys.exit(2)
    except (MemoirError, OSError, ImportError, click.ClickException) as error:
        if "--debug" in arguments:
            traceback.print_exc()
            sys.exit(2)
        if isinstance(error, click.ClickException):
            text = error.format_message()
        else:
            text = message(error) if isinstance(error, MemoirError) else str(error)
        if isinstance(error, ImportError):
            text += "; `memoir doctor` says what is missing"
        echo(f"memoir: {' '.join(text.split())}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort) as stop:
        click.echo(f"memoir: interrupted: {str(stop) or 'no file is half written'}", err=True)
        sys.exit(130)
    except Exception:
        traceback.print_exc()
        sys.exit(UNEXPECTED)
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _ended_as_interrupted() -> Iterator[None]:
    """Within the context SIGTERM, by which containers, schedulers and services end a process, is as good as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # no other may set what a signal does
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
