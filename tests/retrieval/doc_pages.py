"""What the documentation's fenced blocks hold: commands, the lines they are said to print, code in other languages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import click

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")])


class Line(NamedTuple):
    """One command of a page and the lines that it is said to print. text: as a shell would read it."""

    page: Path
    number: int
    words: list[str]
    text: str
    prints: list[str]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.number}"

    @property
    def program(self) -> str:
        return self.call[0].removeprefix(".venv/bin/")

    @property
    def arguments(self) -> list[str]:
        return self.call[1:]

    @property
    def call(self) -> list[str]:
        """Without the variables that are set for it."""
        first = next(i for i, word in enumerate(self.words) if not re.fullmatch(r"[A-Z_]+=.*", word))
        return self.words[first:]


def blocks(page: Path, language: str) -> list[tuple[int, list[str]]]:
    """First line number and lines of each fenced block of a language."""
    fenced: list[tuple[int, list[str]]] = []
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            inside = not inside and line.strip() == f"```{language}"
            if inside:
                fenced.append((number + 1, []))
                indent = len(line) - len(line.lstrip())
        elif inside:
            fenced[-1][1].append(line[indent:])
    return fenced


def command_lines(page: Path) -> list[Line]:
    """Commands joined by && are lines of their own."""
    lines: list[Line] = []
    for first, block in blocks(page, "console"):
        waiting = ""
        for number, text in enumerate(block, first):
            if waiting or text.startswith("$ "):
                waiting += text.removeprefix("$ ") if not waiting else text
                if waiting.endswith("\\"):
                    waiting = waiting[:-1]
                    continue
                words, whole, waiting = shlex.split(waiting, comments=True), waiting, ""
                while words:
                    end = words.index("&&") if "&&" in words else len(words)
                    lines.append(Line(page, number, words[:end], whole, []))
                    words = words[end + 1 :]
            else:
                assert lines and lines[-1].number >= first, f"{page}:{number}: output without a command"
                lines[-1].prints.append(text)
    return lines


ALL = [line for page in PAGES for line in command_lines(page)]


def parse(command: click.Command, name: str, arguments: list[str], parent: click.Context | None = None) -> None:
    """Raises click's UsageError for options, commands or values that do not exist."""
    with command.make_context(name, list(arguments), parent=parent) as context:
        if isinstance(command, click.Group):
            rest = [*context._protected_args, *context.args]
            child, inner, rest = command.resolve_command(context, rest)
            assert inner is not None and child is not None
            parse(inner, child, rest, context)


def numberless(text: str) -> str:
    """To compare what is printed with what a page says: numbers may differ, words may not."""
    return " ".join(re.sub(r"\d+(\.\d+)?", "N", text).split())
