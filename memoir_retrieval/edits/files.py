"""Edit files, read into `Edit` records: lines or arrays of JSON in one of the layouts of `edit_formats`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from memoir_retrieval.edits.formats import FORMATS, detect_format, show
from memoir_retrieval.edits.record import Edit
from memoir_retrieval.errors import ConfigError, EditFileError, Reason

__all__ = ["FORMATS", "check_duplicates", "limit_distinct_subjects", "read_edits"]

Keep = Literal["refuse", "first", "last"]


def read_edits(path: str | PathLike[str], format: str | None = None) -> list[Edit]:
    """Return the edits of a file, in file order.

    The file is UTF-8: one JSON object per line (blank lines are skipped), or one JSON array of objects.
    `format` is a name of `FORMATS`; left out, it is told from the keys of the first record. Blank rephrases
    and locality prompts are dropped, as published sets write a missing one that way.

    Raises ConfigError for an unknown `format`, and EditFileError for a file that cannot be read, holds no
    edit, or has a record that does not fit; the message names the line where that record starts.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"no edit format {show(format)}; use one of {', '.join(FORMATS)}")
    edits: list[Edit] = []
    for line, record in _records(_read_text(path), path):
        try:
            if not isinstance(record, dict):
                raise EditFileError(f"{show(record)} is not an object; write {{...}} with an edit's keys")
            format = format or detect_format(record)
            edits += FORMATS[format].parse(record)
        except EditFileError as error:
            read_as = f" (file read as format '{format}')" if format else ""
            raise EditFileError(f"{path}, line {line}: {error}{read_as}") from None
    if not edits:
        raise EditFileError(f'{path}: holds no edit; write one {{"prompt": "...", "target": "..."}} per line')
    return edits


def check_duplicates(edits: Iterable[Edit], keep: Keep = "refuse") -> list[Edit]:
    """Return the edits with one edit per prompt, in order of each prompt's first appearance.

    Prompts and targets are compared with runs of blanks collapsed. A repeated edit is dropped. A prompt with
    two targets raises EditFileError, or is settled by `keep="first"` or `keep="last"`. Raises ConfigError for
    another `keep`.
    """
    if keep not in ("refuse", "first", "last"):
        raise ConfigError(f"keep={show(keep)} is unknown; use 'refuse', 'first' or 'last'")
    kept: dict[str, tuple[int, Edit]] = {}
    for number, edit in enumerate(edits, 1):
        known_number, known = kept.setdefault(_collapse(edit.prompt), (number, edit))
        same_target = _collapse(known.target) == _collapse(edit.target)
        if same_target and known.requires == edit.requires:
            continue
        if keep == "refuse":
            what = "requires" if same_target else "targets"
            values = (known.requires, edit.requires) if same_target else (known.target, edit.target)
            raise EditFileError(
                f"edits {known_number} and {number} give the prompt {show(edit.prompt)} two {what}, "
                f"{show(values[0])} and {show(values[1])}",
                cure='drop one, or choose with keep, "first" or "last"',
                reason=Reason.CONFLICT,
            )
        if keep == "last":
            kept[_collapse(edit.prompt)] = (number, edit)
    return [edit for _, edit in kept.values()]


def limit_distinct_subjects(edits: Iterable[Edit], n: int) -> list[Edit]:
    """Return the first `n` edits whose prompt and subject no edit taken before has; fewer if there are fewer.

    An empty subject never counts as taken. Raises ConfigError if `n` is below 1.
    """
    if n < 1:
        raise ConfigError(f"cannot take {n} edits; ask for 1 or more")
    taken: list[Edit] = []
    seen: set[tuple[str, str]] = set()
    for edit in edits:
        keys = {("prompt", _collapse(edit.prompt)), ("subject", _collapse(edit.subject))} - {("subject", "")}
        if len(taken) < n and not keys & seen:
            taken.append(edit)
            seen |= keys
    return taken


def _read_text(path: str | PathLike[str]) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise EditFileError(f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8; save as UTF-8") from None
    except OSError as error:
        raise EditFileError(f"{path}: cannot be read ({error.strerror}); name an edit file") from None


def _records(text: str, path: str | PathLike[str]) -> Iterator[tuple[int, Any]]:
    if text.lstrip().startswith("["):
        _loads(text, path, 1)
        return _array_records(text)
    # not splitlines(): U+2028 and its like may stand unescaped inside a JSON string
    lines = enumerate(text.split("\n"), 1)
    return ((line, _loads(content, path, line)) for line, content in lines if content.strip())


def _array_records(text: str) -> Iterator[tuple[int, Any]]:
    """Walk an array known to be sound once more, because json.loads does not tell the line of an element."""
    decode = json.JSONDecoder().raw_decode
    start = re.compile(r"[^ \t\r\n,]")
    line, counted, found = 1, 0, start.search(text, text.index("[") + 1)
    while found and found[0] != "]":
        line, counted = line + text.count("\n", counted, found.start()), found.start()
        record, end = decode(text, counted)
        yield line, record
        found = start.search(text, end)


def _loads(text: str, path: str | PathLike[str], line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "a number too long, or nested too deep"
        if isinstance(error, json.JSONDecodeError):
            line += error.lineno - 1
            reason = f"{error.msg} at column {error.colno}"
        wanted = "write one JSON object per line, or one array of objects (CSV is not read)"
        raise EditFileError(f"{path}, line {line}: not JSON ({reason}); {wanted}") from None


def _collapse(text: str) -> str:
    return " ".join(text.split())
