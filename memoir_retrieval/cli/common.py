"""What the commands share: options, and how they print."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import regex
from rich.console import Console
from rich.text import Text

from memoir_retrieval.edits.files import FORMATS, Keep, check_duplicates, limit_distinct_subjects, read_edits
from memoir_retrieval.edits.record import Edit
from memoir_retrieval.errors import ConfigError

__all__ = [
    "context_masks_option",
    "echo",
    "echo_json",
    "edit_file",
    "edit_file_options",
    "json_option",
    "load_edits",
    "model_option",
    "notes",
    "printable",
    "require_subject_option",
    "run_benchmark",
    "store_argument",
    "tables",
    "tau_option",
    "threads_option",
    "training_option",
    "training_settings",
]

F = TypeVar("F", bound=Callable[..., Any])

# Everything that a terminal obeys or shows out of order; the joiners of scripts and emoji are no such signs.
_UNPRINTABLE = regex.compile(r"(?V1)[[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]--[\u200c\u200d]]")


def printable(text: str, *, lines: bool = False) -> str:
    """A text with its control characters and marks of direction written out as JSON does, such as \\u001b.

    A store may come from anybody: a stored text must not move the cursor, colour or hide what else is printed.

    text: any text.
    lines: whether it may have several lines; else a line feed is written out too.
    """

    def written_out(found: regex.Match[str]) -> str:
        if found[0] == "\n":
            return "\n" if lines else "\\n"
        units = found[0].encode("utf-16-be", "surrogatepass")
        return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))

    return _UNPRINTABLE.sub(written_out, text)


class SafeConsole(Console):
    """Prints every text that it is given, those in cells and titles too, as `printable` gives it."""

    def render_str(self, text: str, **options: Any) -> Text:
        """See `rich.console.Console`."""
        return super().render_str(printable(text, lines=True), **options)


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


def run_benchmark(module: str, settings: Mapping[str, Any], environment: Mapping[str, str]) -> Any:
    """Run `python -m MODULE SETTINGS.json`, which starts engines. Returns the JSON that it prints last.

    Raises ConfigError where it stops; its own messages have gone to stderr.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(settings, file)
        file.flush()
        command = [sys.executable, "-m", module, file.name]
        done = subprocess.run(command, env=dict(environment), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"the benchmark stopped with exit code {done.returncode}: its messages are above")
    return json.loads(done.stdout.splitlines()[-1])


model_option = click.option("--model", "-m", help="Folder, embedded model or Hub id (default: the store's own).")
context_masks_option = click.option(
    "--context-masks",
    type=click.IntRange(0, 1),
    metavar="N",
    help="Masks of each question after an earlier turn: found more often in chats, for twice the index (default: 1; "
    "0 for raw prompts).",
)
require_subject_option = click.option(
    "--require-subject", is_flag=True, help="Edits with a subject act only on questions in which it stands."
)
training_option = click.option(
    "--training",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of training, such as variants=16: more wordings are made up, so that rephrasings are answered "
    "better, in more time.",
)
tau_option = click.option("--tau", type=float, help="Least overlap that matches (default: the store's own).")


def training_settings(texts: Sequence[str], context_masks: int | None = None) -> dict[str, int | float | str]:
    """The fields of `Training` that --training, as NAME=VALUE each, and --context-masks give; the library judges them.

    Raises ConfigError for what is no NAME=VALUE.
    """
    settings: dict[str, int | float | str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--training {text}: write NAME=VALUE such as contexts=3")
        settings[name] = _number(value)
    return settings if context_masks is None else settings | {"context_masks": context_masks}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def edit_file(command: F) -> F:
    """The argument FILE and the options `load_edits` takes."""
    return click.argument("file", type=click.Path(path_type=Path))(edit_file_options(command))


def edit_file_options(command: F) -> F:
    """The options `load_edits` takes."""
    for option in (
        click.option("--limit", type=click.IntRange(min=1), help="Only the first N records with distinct subjects."),
        click.option(
            "--format", "file_format", type=click.Choice(list(FORMATS)), help="Format of FILE (default: detected)."
        ),
    ):
        command = option(command)
    return command


def load_edits(file: Path, file_format: str | None, limit: int | None, keep: Keep) -> list[Edit]:
    """The edits of a file, each prompt once. Raises EditFileError."""
    edits = check_duplicates(read_edits(file, file_format, note=notes.print), keep)
    return limit_distinct_subjects(edits, limit) if limit else edits


def threads_option(command: F) -> F:
    """`--threads N`, applied before the command runs."""

    @click.option("--threads", type=click.IntRange(min=1), help="CPU threads (default: torch's choice).")
    @functools.wraps(command)
    def run(*args: Any, threads: int | None, **kwargs: Any) -> Any:
        if threads:
            import torch

            torch.set_num_threads(threads)
        return command(*args, **kwargs)

    return run  # type: ignore[return-value]
