"""Write docs/reference/cli.md from `memoir --help` of every command. `--check` only compares.

python docs/make_cli_reference.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from memoir_retrieval.cli import cli

PAGE = Path(__file__).parent / "reference" / "cli.md"
WIDTH = 110
INTRODUCTION = """\
# Command line

<!-- Written by `python docs/make_cli_reference.py`: change the help texts in memoir_retrieval/cli/ instead. -->

**Exit codes:** 0 done; 1 the answer is no (`doctor`, `verify`, `index verify`), or `edit` has left edits out; 2 bad
input or environment, with one line that says what; 70 an error of the program itself, with its traceback; 130
interrupted, by Ctrl-C or SIGTERM; 141 whoever read the output has gone.

Answers go to stdout, progress and remarks to stderr, so `--json` can be piped. `memoir --debug COMMAND` shows the
traceback of an error.
"""


def pages(command: click.Command, context: click.Context) -> Iterator[str]:
    yield f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from pages(inner, click.Context(inner, context, name, **inner.context_settings))


def reference() -> str:
    """The whole page. Help is folded at a fixed width, whatever the terminal."""
    width = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    context = click.Context(cli, info_name="memoir", **{**cli.context_settings, **width})
    lines = "\n".join([INTRODUCTION, *pages(cli, context)]).splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def main() -> None:
    text = reference()
    if sys.argv[1:] == ["--check"]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE} is not what --help says: run `python docs/make_cli_reference.py`")
        return
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
