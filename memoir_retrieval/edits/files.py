"""Edit files, read into `Edit` records: in one of the layouts of `edits.formats`, found by `edits.records`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import msgspec

from memoir_retrieval.edits.formats import FORMATS, Fields, Keys, detect_format, show
from memoir_retrieval.edits.record import Edit, prompt_key
from memoir_retrieval.edits.records import Note, read_records
from memoir_retrieval.errors import ConfigError, EditFileError, Reason

__all__ = ["FORMATS", "check_duplicates", "limit_distinct_subjects", "read_edits"]

Keep = Literal["refuse", "first", "last"]


def read_edits(path: str | PathLike[str], format: str | None = None, *, note: Note = warnings.warn) -> list[Edit]:
    """Return the edits of a file, in file order.

    >>> from memoir_retrieval import read_edits
    >>> [edit.target for edit in read_edits("corrections.jsonl")][:2]
    ['Jane Doe', "At nine o'clock"]

    The file is UTF-8: one JSON object per line (blank lines are skipped), one JSON array of objects, one object that
    holds them in a form that tools write (`docs/reference/edit-files.md`), or CSV under a name that ends so. Blank
    rephrases and locality prompts are dropped, as published sets write a missing one that way.

    path: the file.
    format: a name of `FORMATS`; if left out, the keys of the first record decide.
    note: takes a line about what of the file is not read, such as keys that no reader knows.
    Raises ConfigError for an unknown `format`, and EditFileError for a file that cannot be read, holds no
    edit, or has a record that does not fit; the message names the line where that record starts.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"edit format {show(format)} is not known; use one of {', '.join(FORMATS)}")
    text = _read_text(path)
    try:
        records = read_records(text, str(path), lambda line: note(f"{path}: {line}"))
    except EditFileError as error:
        raise EditFileError(f"{path}, {error}") from None
    edits: list[Edit] = []
    keys = Keys()
    for where, record in records:
        try:
            if not isinstance(record, dict):
                raise EditFileError(f"{show(record)} is not an object; write {{...}} with an edit's keys")
            format = format or detect_format(record)
            if format != "memoir" and record.get("requires") is not None:
                raise EditFileError("'requires' is a key of our own format; write 'prompt' and 'target' beside it")
            edits += FORMATS[format].parse(Fields(record, keys))
        except EditFileError as error:
            read_as = f" (file read as format '{format}')" if format else ""
            raise EditFileError(f"{path}, {where}: {error}{read_as}") from None
    if not edits:
        raise EditFileError(f'{path}: holds no edit; write one {{"prompt": "...", "target": "..."}} per line')
    if ignored := sorted(keys.seen - keys.read):
        more = f" and {len(ignored) - 12} more" if len(ignored) > 12 else ""
        note(f"{path}: format '{format}' does not read the keys {', '.join(map(show, ignored[:12]))}{more}")
    return edits


def check_duplicates(edits: Iterable[Edit], keep: Keep = "refuse", most: int | None = None) -> list[Edit]:
    """Return the edits with one edit per prompt, in order of each prompt's first appearance.

    Prompts are compared by `prompt_key`, targets with runs of blanks collapsed. A repeated edit is dropped; the one
    that is kept gets its rephrasings and everything else that evaluation asks.

    edits: in the order of their files.
    keep: what becomes of a prompt with two targets: "refuse" raises EditFileError, "first" and "last" keep one edit.
    most: how many at most. Nothing is read from the first prompt on that is one too many, so that a question of a
        later record, which needs all edits of that record, does not come along without them.

    Raises ConfigError for another `keep`.
    """
    if keep not in ("refuse", "first", "last"):
        raise ConfigError(f"keep={show(keep)} is unknown; use 'refuse', 'first' or 'last'")
    kept: dict[str, tuple[int, list[Edit]]] = {}
    for number, edit in enumerate(edits, 1):
        key = prompt_key(edit.prompt)
        if key not in kept:
            if len(kept) == most:
                break
            kept[key] = (number, [edit])
            continue
        known_number, (known, *_) = kept[key]
        same_target = _collapse(known.target) == _collapse(edit.target)
        if same_target and known.requires == edit.requires:
            kept[key][1].append(edit)
            continue
        if keep == "refuse":
            what = "requires" if same_target else "targets"
            values = (known.requires, edit.requires) if same_target else (known.target, edit.target)
            raise EditFileError(
                f"edits {known_number} and {number} give the prompt {show(edit.prompt)} two {what}, "
                f"{show(values[0])} and {show(values[1])}",
                cure='drop one, or choose "first" or "last"',
                reason=Reason.CONFLICT,
            )
        if keep == "last":
            kept[key] = (number, [edit])
    return [_merge(repeated) for _, repeated in kept.values()]


def limit_distinct_subjects(edits: Iterable[Edit], n: int) -> list[Edit]:
    """Return the first edits whose prompt and subject no edit taken before has; fewer if there are fewer.

    An empty subject never counts as taken.

    edits: in the order of their files.
    n: how many.

    Raises ConfigError if `n` is below 1.
    """
    if n < 1:
        raise ConfigError(f"cannot take {n} edits; ask for 1 or more")
    taken: list[Edit] = []
    seen: set[tuple[str, str]] = set()
    for edit in edits:
        keys = {("prompt", prompt_key(edit.prompt)), ("subject", prompt_key(edit.subject))} - {("subject", "")}
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


def _merge(repeated: list[Edit]) -> Edit:
    """The first of some edits, with what any of them has evaluation ask, each question once, and the first subject."""
    first, *others = repeated
    if not others:
        return first
    fields: dict[str, Any] = {"subject": next((edit.subject for edit in repeated if edit.subject), "")}
    for name in ("rephrases", "locality", "neighbourhood", "portability", "ood"):
        values: dict[str, Any] = {}
        for value in (value for edit in repeated for value in getattr(edit, name)):
            values.setdefault(prompt_key(value if isinstance(value, str) else value.prompt), value)
        fields[name] = tuple(values.values())
    return msgspec.structs.replace(first, **fields)


def _collapse(text: str) -> str:
    return " ".join(text.split())
