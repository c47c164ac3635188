"""The records of an edit file, whatever holds them: lines or arrays of JSON, one object, columns, a page, or CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from memoir_retrieval.edits.formats import Record, is_record, show
from memoir_retrieval.errors import EditFileError

__all__ = ["Located", "Note", "read_records"]

Note = Callable[[str], object]
"""Takes a line about a file that is read, but not all of it."""

LISTS = ("data", "edits", "records", "examples", "instances")
"""Keys under which tools write the list of records."""
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]+)?")  # keys under which multilingual sets put one record each
_CSV = {".csv", ".tsv"}
_LISTED = ("rephrases", "requires", "ood")  # keys of ours that hold a list, of which a cell of CSV is one entry


_ARGUMENTS = {
    "prompts": "prompt",
    "target_new": "target_new",
    "subject": "subject",
    "ground_truth": "ground_truth",
    "rephrase_prompts": "rephrase_prompt",
}
"""What the arguments of EasyEdit's `edit` are called in its records."""
_PROBES = {"locality_inputs": "locality", "portability_inputs": "portability"}


class Located(NamedTuple):
    """A record of a file.

    where: it starts, such as "line 3".
    record: as it was parsed.
    """

    where: str
    record: Any


def read_records(text: str, name: str, note: Note) -> list[Located]:
    """The records of a file, in file order.

    text: the file's content.
    name: its name, of which the ending says whether it is CSV.
    note: takes what is worth knowing of a file that is read all the same.
    Raises EditFileError, beginning with the place, for a file whose records cannot be found.
    """
    return [Located(where, _of_one_language(record)) for where, record in _located(text, name, note)]


def _of_one_language(record: Any) -> Any:
    """The multilingual ZsRE sets put each record under its language, such as "en"."""
    inner = [*record.values()] if isinstance(record, dict) and len(record) == 1 else []
    return inner[0] if inner and _is_zsre(inner[0]) else record


def _is_zsre(record: Any) -> bool:
    return isinstance(record, dict) and {"src", "alt"} <= record.keys()


def _located(text: str, name: str, note: Note) -> list[Located]:
    if PurePath(name).suffix.lower() in _CSV:
        return list(_csv_records(text))
    if text.lstrip().startswith("["):
        return list(_array_records(text))
    values = [Located(f"line {line}", value) for line, value in _values(text)]
    if len(values) == 1 and isinstance(values[0].record, dict):
        try:
            return _unpacked(values[0], note)
        except EditFileError as error:
            raise EditFileError(f"{values[0].where}: {error}") from None
    return values


# ---- JSON ------------------------------------------------------------------------------------------------------


def _unique(pairs: Iterable[tuple[str, Any]]) -> Record:
    record: Record = {}
    for key, value in pairs:
        if key in record:
            raise _RefusedError(f"key {show(key)} is given twice; keep one")
        record[key] = value
    return record


class _RefusedError(ValueError):
    """What a parser takes for JSON, and has two meanings or none."""


def _constant(name: str) -> None:
    if name != "NaN":  # how pandas writes a cell that is missing
        raise _RefusedError(f"{name} is not a JSON number; write text in double quotes")


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)


def _values(text: str) -> Iterator[tuple[int, Any]]:
    """The values of a text, each of which starts on a line of its own, with that line."""
    begin, line = 0, 1
    while begin < len(text):
        # not splitlines(): U+2028 and its like may stand unescaped inside a JSON string
        end = text.find("\n", begin)
        end = len(text) if end < 0 else end
        content = text[begin:end]
        if content.strip():
            try:
                value = _decoder.decode(content)
            except (ValueError, RecursionError) as error:
                value, end = _over_lines(text, begin, end, line, error)
            yield line, value
        line += text.count("\n", begin, end + 1)
        begin = end + 1


def _over_lines(text: str, begin: int, end: int, line: int, error: Exception) -> tuple[Any, int]:
    """A value that does not end on the line where it begins, and where that of its end does.

    begin, end: of the first line. error: what was wrong with that line alone.
    """
    try:
        value, stop = _decoder.raw_decode(text, begin + len(text[begin:end]) - len(text[begin:end].lstrip()))
    except json.JSONDecodeError as whole:
        # A line that begins a record belongs to the next one: then the first is what is broken.
        next_record = text[whole.pos : whole.pos + 1] in ("{", "")
        if whole.pos <= end or next_record:
            raise _not_json(error, line) from None
        raise _not_json(whole, 1) from None
    except (ValueError, RecursionError) as whole:
        raise _not_json(whole, line) from None
    past = text.find("\n", stop)
    past = len(text) if past < 0 else past
    if stop <= end or text[stop:past].strip():
        raise _not_json(error, line) from None
    return value, past


def _array_records(text: str) -> Iterator[Located]:
    """Walk an array known to be sound once more, because json.loads does not tell the line of an element."""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(error, 1) from None
    start = re.compile(r"[^ \t\r\n,]")
    line, counted, element = 1, 0, start.search(text, text.index("[") + 1)
    while element and element[0] != "]":
        line, counted = line + text.count("\n", counted, element.start()), element.start()
        try:
            record, end = _decoder.raw_decode(text, counted)
        except ValueError as error:
            raise _not_json(error, line) from None
        yield Located(f"line {line}", record)
        element = start.search(text, end)


def _not_json(error: Exception, line: int) -> EditFileError:
    if isinstance(error, _RefusedError):
        return EditFileError(f"line {line}: {error}")
    reason = "a number too long, or nested too deep"
    if isinstance(error, json.JSONDecodeError):
        line += error.lineno - 1
        reason = f"{error.msg} at column {error.colno}"
    wanted = "write one JSON object per line, or one array of objects (CSV is read from files named .csv or .tsv)"
    return EditFileError(f"line {line}: not JSON ({reason}); {wanted}")


# ---- what holds records ----------------------------------------------------------------------------------------


def _unpacked(whole: Located, note: Note) -> list[Located]:
    """The records in the one object of a file: itself, or those that it holds under one of the forms tools write."""
    value: Record = whole.record
    if _is_objects(value.get("rows")) and all("row" in row for row in value["rows"]):
        return _page(value, note)
    names = value.get("columns")
    if isinstance(names, list) and all(isinstance(n, str) for n in names) and isinstance(value.get("data"), list):
        rows = value["data"]
        if twice := [name for name in names if names.count(name) > 1]:
            raise EditFileError(f"column {show(twice[0])} is given twice; keep one")
        if not all(isinstance(row, list) and len(row) == len(names) for row in rows):
            raise EditFileError("'data' has rows of another length than 'columns'; write one object per line")
        return _numbered(dict(zip(names, row, strict=True)) for row in rows)
    if value.get("prompts") is not None and value.get("target_new") is not None:
        if unread := sorted(value.keys() - _ARGUMENTS.keys() - _PROBES.keys()):
            note(f"these lists are not read: {', '.join(map(show, unread))}")
        return _numbered(_keyword_records(value))
    columns = [*value.values()]
    if columns and all(isinstance(c, dict) and c and all(map(str.isdecimal, c)) for c in columns):
        rows = sorted({row for column in columns for row in column}, key=lambda row: (len(row), row))
        return _numbered({key: column.get(row) for key, column in value.items()} for row in rows)
    lists = [key for key, part in value.items() if _is_objects(part)]
    if not is_record(value):
        by_id = all(isinstance(part, dict) and is_record(part) for part in columns)
        of_one_fact = all(map(_LANGUAGE.fullmatch, value)) and all(_is_zsre(part) for part in columns)
        if columns and by_id and not of_one_fact:
            return _numbered(columns)
        if len(lists) == 1 and lists[0] in LISTS:
            return _numbered(value[lists[0]])
        if lists:
            raise EditFileError(
                f"one object with lists of objects under {', '.join(map(show, lists[:5]))}; write the list that holds "
                "the edits as a file of its own"
            )
    elif len(columns) > 1 and not lists and all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
        return _numbered(dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True))
    return [whole]


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) for part in value)


def _numbered(records: Iterable[Any]) -> list[Located]:
    return [Located(f"record {number}", record) for number, record in enumerate(records, 1)]


def _page(value: Record, note: Note) -> list[Located]:
    """The rows that the data set viewer of the Hugging Face Hub gives for a query."""
    for number, row in enumerate(value["rows"], 1):
        if row.get("truncated_cells"):
            raise EditFileError(
                f"row {number} was cut by the data set viewer in {show(row['truncated_cells'])}; download the file of "
                "the data set"
            )
    total = value.get("num_rows_total")
    if isinstance(total, int) and total > len(value["rows"]):
        note(f"a page of the data set viewer: {len(value['rows'])} of {total} rows")
    return _numbered(row["row"] for row in value["rows"])


def _keyword_records(value: Record) -> Iterator[Record]:
    """EasyEdit's arguments of `edit`: one list for all prompts, one for all targets, and so on."""
    lists = {new: _listed(value[old]) for old, new in _ARGUMENTS.items() if value.get(old) is not None}
    count = len(lists["prompt"])
    probes: dict[str, list[tuple[str, list[Any], list[Any]]]] = {}
    for argument, kind in _PROBES.items():
        groups = value.get(argument) or {}
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise EditFileError(f"'{argument}' is {show(groups)}; write objects of 'prompt' and 'ground_truth'")
        probes[kind] = [(n, _listed(g.get("prompt")), _listed(g.get("ground_truth"))) for n, g in groups.items()]
    lengths = [(name, len(column)) for name, column in lists.items()]
    lengths += [(f"{kind}_inputs.{name}", len(c)) for kind in probes for name, *cs in probes[kind] for c in cs]
    for name, length in lengths:
        if length != count:
            raise EditFileError(f"there are {count} prompts, but {length} of {show(name)}; give one for each prompt")
    for i in range(count):
        record: Record = {name: column[i] for name, column in lists.items()}
        for kind, groups in probes.items():
            record[kind] = {
                name: [
                    {"prompt": prompt, "ground_truth": answer}
                    for prompt, answer in _pairs(f"{kind}_inputs.{name}", prompts[i], answers[i])
                ]
                for name, prompts, answers in groups
            }
        yield record


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _pairs(name: str, prompts: Any, answers: Any) -> list[tuple[Any, Any]]:
    """Of several prompts each has its answer; of one prompt a list of answers is one of alternatives."""
    if prompts is None:
        return []
    if not isinstance(prompts, list):
        return [(prompts, answers)]
    if not isinstance(answers, list) or len(answers) != len(prompts):
        raise EditFileError(f"{show(name)} has {len(prompts)} prompts with {show(answers)}; give one answer for each")
    return list(zip(prompts, answers, strict=True))


# ---- CSV -------------------------------------------------------------------------------------------------------


def _csv_records(text: str) -> Iterator[Located]:
    """Rows under a header. What separates cells is what the header has most of: a comma, a semicolon or a tab."""
    header = text.lstrip("\r\n").partition("\n")[0]
    separator = max(",;\t", key=header.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    names: Sequence[str] = ()
    line, number = 1, 0
    try:
        for cells in rows:
            where, line = f"line {line}", rows.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                names = [cell.strip() for cell in cells]
                if twice := [name for name in names if name and names.count(name) > 1]:
                    raise EditFileError(f"{where}: column {show(twice[0])} is given twice; keep one")
                continue
            number += 1
            if any(cell.strip() for cell in cells[len(names) :]):
                raise EditFileError(
                    f"{where}: {len(cells)} cells, but {len(names)} columns; quote a cell that has {show(separator)}"
                )
            record = {name: cell for name, cell in zip(names, cells, strict=False) if name and cell.strip()}
            # What tables write of themselves: the numbers of the rows, and commas at the end.
            unnamed = {cell.strip() for name, cell in zip(names, cells, strict=False) if not name} - {""}
            if strange := unnamed - {str(number - 1), str(number)}:
                raise EditFileError(f"{where}: {show(min(strange))} stands in a column without a name; give it one")
            yield Located(where, {name: [cell] if name in _LISTED else cell for name, cell in record.items()})
    except csv.Error as error:
        raise EditFileError(f"line {rows.line_num}: not CSV ({error}); write one edit per line as JSON") from None
