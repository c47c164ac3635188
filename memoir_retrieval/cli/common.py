"""What the commands share: options, and how they print."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

__all__ = ["echo_json", "json_option", "notes", "store_argument", "tables", "threads_option"]

F = TypeVar("F", bound=Callable[..., Any])

# Prompts and paths are shown as they are: "[/b]" in one of them is text, not markup.
notes = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
"""Progress and remarks: stderr, so that stdout holds the answer alone."""

tables = Console(highlight=False, markup=False, emoji=False)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")
store_argument = click.argument("store", metavar="DIR", type=click.Path(path_type=Path))


def echo_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, indent=1))


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
