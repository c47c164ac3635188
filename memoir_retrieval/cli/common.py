"""What the commands share: options, and how they print."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import regex
from click.core import ParameterSource
from rich.console import Console
from rich.text import Text

from memoir_retrieval.errors import ConfigError

if TYPE_CHECKING:
    from memoir_retrieval.store.threshold import Threshold

__all__ = [
    "beside",
    "describe_tau",
    "echo",
    "echo_json",
    "json_option",
    "model_option",
    "notes",
    "printable",
    "refuse_idle",
    "require_place",
    "run_benchmark",
    "store_argument",
    "tables",
    "tau_option",
    "threads_option",
]

R = TypeVar("R")

# Everything that a terminal obeys or shows out of order; the joiners of scripts and emoji are no such signs.
_UNPRINTABLE = regex.compile(r"(?V1)[[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]--[\u200c\u200d]]")


def printable(text: str, *, lines: bool = False) -> str:
    """A text with its control characters and marks of direction written out as JSON does, such as \\u001b.

    A store may come from anybody: a stored text must not move the cursor, colour or hide what else is printed.

    text: any text.
    lines: whether it may have several lines; else a line feed is written out too.
    """

    def written_out(match: regex.Match[str]) -> str:
        if match[0] == "\n":
            return "\n" if lines else "\\n"
        units = match[0].encode("utf-16-be", "surrogatepass")
        return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))

    return _UNPRINTABLE.sub(written_out, text)


class SafeConsole(Console):
    """Prints every text that it is given, those in cells and titles too, as `printable` gives it."""

    def render_str(self, text: str, **options: Any) -> Text:
        """See `rich.console.Console`."""
        return super().render_str(printable(text, lines=True), **options)

    def on_broken_pipe(self) -> None:
        """Let `main` end the command; rich would, as if the answer were no."""
        raise BrokenPipeError


# Prompts and paths are shown as they are: "[/b]" in one of them is text, not markup.
notes = SafeConsole(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
"""Progress and remarks: stderr, so that stdout holds the answer alone."""

tables = SafeConsole(highlight=False, markup=False, emoji=False)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")
store_argument = click.argument("store", metavar="DIR", type=click.Path(path_type=Path))


def echo(text: str, *, err: bool = False) -> None:
    """Print one line in which stored texts may stand, as `printable` gives it.

    text: the line, without its end.
    err: to stderr.
    """
    click.echo(printable(text), err=err)


def echo_json(value: Any) -> None:
    """Print JSON, which stays JSON: what is not printable stands in texts alone, and is escaped there.

    value: what `json.dumps` takes.
    """
    click.echo(printable(json.dumps(value, ensure_ascii=False, indent=1), lines=True))


def refuse_idle(where: str, cure: str, *names: str) -> None:
    """Refuse an option that was typed and would do nothing.

    where: it would, such as "without --soak".
    cure: what to type instead.
    names: of the command's parameters that would.

    Raises click.UsageError.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in names and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            value = context.params[name]
            typed = f"{parameter.opts[0]} {value}"
            if isinstance(value, bool):
                typed = parameter.opts[0] if value else parameter.secondary_opts[0]
            raise click.UsageError(f"{typed} does nothing {where}: {cure}")


def require_place(path: Path, what: str, option: str, *, folder: bool = False) -> None:
    """Refuse a place that cannot be written, before the minutes that it takes to have something to write there.

    path: where it is to be.
    what: of it, such as "the report".
    option: which names the place.
    folder: it is a folder, made if new; else a file in one that is there.

    Raises ConfigError.
    """
    parent = path.parent
    if folder:
        parent = next(above for above in (path, *path.absolute().parents) if os.path.lexists(above))
    elif path.is_dir():
        raise ConfigError(f"{what} cannot be written: {path} is a folder; choose another {option}")
    elif os.path.lexists(path) and not path.is_file():  # a rename would put a file in the place of /dev/null
        raise ConfigError(f"{what} cannot be written: {path} is no regular file; choose another {option}")
    if not parent.is_dir():
        raise ConfigError(f"{what} cannot be written: {parent} is not a folder; choose another {option}")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"{what} cannot be written: you may not write into {parent}; choose another {option}")


def beside(folder: Path, ending: str) -> Path:
    """The path beside a folder that has its name and an ending.

    folder: any; "." and ".." have names too.
    ending: such as ".eval.json".
    """
    named = folder if folder.name.strip(".") else Path(os.path.abspath(folder))
    return named.with_name(named.name + ending)


def run_benchmark(module: str, settings: Mapping[str, Any], environment: Mapping[str, str]) -> Any:
    """Run `python -m MODULE SETTINGS.json`, which starts engines. Returns the JSON that it prints last.

    module: its dotted name.
    settings: the content of the file.
    environment: of the process.

    Raises ConfigError where it stops; its own messages have gone to stderr.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(settings, file)
        file.flush()
        command = [sys.executable, "-m", module, file.name]
        process = subprocess.run(command, env=dict(environment), stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        raise ConfigError(f"the benchmark stopped with exit code {process.returncode}: its messages are above")
    return json.loads(process.stdout.splitlines()[-1])


model_option = click.option("--model", "-m", help="Folder, embedded model or Hub id (default: the store's own).")


def describe_tau(threshold: Threshold | None) -> str:
    """What a store's tau rests on, in words.

    threshold: of its manifest.
    """
    if threshold is None:
        return "chosen by whoever made the store"
    judged = "" if threshold.passed is None else f", the judge takes {threshold.passed} for an edit's question"
    return (
        f"set by the store, with every change, from {threshold.references} reference prompts: {threshold.near} are "
        f"near{judged}; of others like them at most {threshold.bound:.2g} match"
    )


tau_option = click.option("--tau", type=float, help="Least overlap that matches (default: the store's own).")


def threads_option(command: Callable[..., R]) -> Callable[..., R]:
    """`--threads N`, applied before the command runs.

    command: which gets the option.
    """

    @click.option("--threads", type=click.IntRange(min=1), help="CPU threads (default: torch's choice).")
    @functools.wraps(command)
    def run(*args: Any, threads: int | None, **kwargs: Any) -> R:
        if threads:
            import torch

            torch.set_num_threads(threads)
        return command(*args, **kwargs)

    return run
