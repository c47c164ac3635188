"""Edit files: the project's own JSONL and the published formats, read into `Edit` records."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from memoir_retrieval.edit import Edit, Probe
from memoir_retrieval.errors import ConfigError, EditFileError
from memoir_retrieval.prompts import Message

__all__ = ["FORMATS", "Format", "check_duplicates", "limit_distinct_subjects", "read_edits"]

Record = dict[str, Any]
Texts = Iterable[str]
ROLES = ("system", "user", "assistant")
Keep = Literal["refuse", "first", "last"]

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 60
_show = _shorten.repr


class Format(NamedTuple):
    """A record layout: the key sets that tell it from the others, and the function that reads one record."""

    keys: list[list[str]]
    parse: Callable[[Record], list[Edit]]


def read_edits(path: str | PathLike[str], format: str | None = None) -> list[Edit]:
    """Return the edits of a file, in file order.

    The file is UTF-8: one JSON object per line (blank lines are skipped), or one JSON array of objects.
    `format` is a name of `FORMATS`; left out, it is told from the keys of the first record. Blank rephrases
    and locality prompts are dropped, as published sets write a missing one that way.

    Raises ConfigError for an unknown `format`, and EditFileError for a file that cannot be read, holds no
    edit, or has a record that does not fit; the message names the line where that record starts.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"no edit format {_show(format)}; use one of {', '.join(FORMATS)}")
    edits: list[Edit] = []
    for line, record in _records(_read_text(path), path):
        try:
            if not isinstance(record, dict):
                raise EditFileError(f"{_show(record)} is not an object; write {{...}} with an edit's keys")
            format = format or _detect(record)
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
        raise ConfigError(f"keep={_show(keep)} is unknown; use 'refuse', 'first' or 'last'")
    kept: dict[str, tuple[int, Edit]] = {}
    for number, edit in enumerate(edits, 1):
        known_number, known = kept.setdefault(_collapse(edit.prompt), (number, edit))
        if _collapse(known.target) == _collapse(edit.target):
            continue
        if keep == "refuse":
            raise EditFileError(
                f"edits {known_number} and {number} give the prompt {_show(edit.prompt)} two targets, "
                f"{_show(known.target)} and {_show(edit.target)}; drop one, or use --on-conflict first|last"
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


def _detect(record: Record) -> str:
    """The format with the largest key set found in the record; of equals, the first."""
    sizes = {name: len(keys) for name in FORMATS for keys in FORMATS[name].keys if {*keys} <= {*record}}
    if sizes:
        return max(sizes, key=lambda name: sizes[name])
    formats = "; ".join(f"{name}: {', '.join(known.keys[0])}" for name, known in FORMATS.items())
    raise EditFileError(f"no known format has the keys {_show([*record])}; write those of one of: {formats}")


def _memoir(record: Record) -> list[Edit]:
    fields = Edit.__struct_fields__
    if unknown := [key for key in record if key not in fields]:
        raise EditFileError(f"key {_show(unknown[0])} is unknown; the keys are {', '.join(fields)}")
    if isinstance(record["prompt"], list):
        record = record | _chat(record["prompt"])
    prompt, target = _text(record, "prompt"), _text(record, "target")
    try:
        edit = msgspec.convert(record, Edit)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        reason = " ".join(str(error).split())
        probes = "locality, neighbourhood and portability"
        raise EditFileError(f'{reason}; write text, and {probes} as [{{"prompt", "answer"}}]') from None
    return _edit(
        prompt,
        target,
        edit.subject,
        edit.rephrases,
        edit.locality,
        source=edit.source,
        neighbourhood=edit.neighbourhood,
        portability=edit.portability,
        ood=edit.ood,
        before=_messages("before", edit.before),
    )


def _chat(messages: list[Any]) -> Record:
    """A prompt that is a chat: its last message is the question, what stands before it is kept as such."""
    found = _messages("prompt", messages)
    if not found or found[-1]["role"] != "user":
        raise EditFileError(f"'prompt' is {_show(messages)}; end a chat with a message of the user's, the question")
    return {"prompt": found[-1]["content"], "before": list(found[:-1])}


def _messages(key: str, messages: Iterable[Any]) -> tuple[Message, ...]:
    for one in messages:
        sound = isinstance(one, dict) and {*one} == {"role", "content"} and isinstance(one["content"], str)
        if not sound or one["role"] not in ROLES:
            raise _wrong(key, one, f'messages, each {{"role", "content"}} in text, of a role of {", ".join(ROLES)}')
    return tuple(messages)


def _target_new(record: Record) -> list[Edit]:
    """EasyEdit, WISE and KnowEdit: one family, in which a file may mix flat and nested locality."""
    wikibio = "labels" in record and "target_new" not in record
    return _edit(
        _text(record, "text" if wikibio else "prompt"),
        _text(record, "labels" if wikibio else "target_new"),
        _text(record, "concept" if wikibio else "subject", required=False),
        _texts(record, "rephrase_prompt"),
        [_probe(record, "locality_prompt", "locality_ground_truth"), *_nested(record, "locality")],
        portability=_nested(record, "portability"),
        ood=_texts(record, "ood_rephrase"),
    )


def _zsre(record: Record) -> list[Edit]:
    subject = _text(record, "subject", required=False)
    locality = [_probe(record, "loc", "loc_ans")]
    rephrases = _texts(record, "rephrase")
    return _edit(_text(record, "src"), _text(record, "alt"), subject, rephrases, locality, portability=_one_hop(record))


def _counterfact(record: Record) -> list[Edit]:
    rewrite = _object(record, "requested_rewrite")
    answer = _text(_object(rewrite, "target_true", required=False), "str", required=False)
    neighbourhood = [Probe(prompt=text, answer=answer) for text in _texts(record, "neighborhood_prompts")]
    return _rewrite(rewrite, _texts(record, "paraphrase_prompts"), neighbourhood, _one_hop(record))


def _mquake(record: Record) -> list[Edit]:
    rewrites = record.get("requested_rewrite")
    if not isinstance(rewrites, list) or not all(isinstance(rewrite, dict) for rewrite in rewrites):
        raise _wrong("requested_rewrite", rewrites, "a list of objects")
    # The multi-hop questions need every edit of the record, so they belong to the one that comes last.
    answer, aliases = _text(record, "new_answer", required=False), tuple(_texts(record, "new_answer_alias"))
    hops = [Probe(prompt=text, answer=answer, aliases=aliases) for text in _texts(record, "questions") if answer]
    edits: list[Edit] = []
    for rewrite in rewrites:
        edits += _rewrite(rewrite, _texts(rewrite, "question"), [], hops if rewrite is rewrites[-1] else [])
    return edits


def _hallueditbench(record: Record) -> list[Edit]:
    subject = _text(record, "subject", required=False)
    rephrases, locality = _texts(record, "paraphrased_question"), [_probe(record, "locality_question")]
    hops = [_probe(record, f"question_{n}hop", f"answer_{n}hop") for n in range(2, 7)]
    return _edit(_text(record, "question"), _text(record, "object"), subject, rephrases, locality, portability=hops)


FORMATS: dict[str, Format] = {
    name: Format([keys.split() for keys in key_sets.split("|")], parse)
    for name, key_sets, parse in (
        ("memoir", "prompt target", _memoir),
        ("zsre", "src alt", _zsre),
        ("knowedit", "prompt target_new locality|prompt target_new portability|text labels", _target_new),
        ("easyedit", "prompt target_new|prompt target_new rephrase_prompt", _target_new),
        ("wise", "prompt target_new locality_prompt|prompt target_new ood_rephrase", _target_new),
        ("counterfact", "requested_rewrite", _counterfact),
        ("mquake", "requested_rewrite questions", _mquake),
        ("hallueditbench", "question object", _hallueditbench),
    )
}


def _edit(
    prompt: str,
    target: str,
    subject: str,
    rephrases: Texts,
    locality: Iterable[Probe] = (),
    *,
    source: str = "",
    neighbourhood: Iterable[Probe] = (),
    portability: Iterable[Probe] = (),
    ood: Texts = (),
    before: tuple[Message, ...] = (),
) -> list[Edit]:
    def asked(probes: Iterable[Probe]) -> tuple[Probe, ...]:
        return tuple(probe for probe in probes if probe.prompt.strip())

    edit = Edit(
        prompt=prompt,
        target=target,
        subject=subject,
        rephrases=tuple(text for text in rephrases if text.strip()),
        locality=asked(locality),
        source=source,
        neighbourhood=asked(neighbourhood),
        portability=tuple(probe for probe in asked(portability) if probe.answer.strip()),
        ood=tuple(text for text in ood if text.strip()),
        before=before,
    )
    try:
        msgspec.json.encode(edit)
    except UnicodeEncodeError as error:
        half = _show(error.object[error.start])
        raise EditFileError(f"{_show(error.object)} has half a surrogate pair, {half}; remove it") from None
    return [edit]


def _rewrite(rewrite: Record, rephrases: list[str], neighbourhood: list[Probe], portability: list[Probe]) -> list[Edit]:
    cloze, subject = _text(rewrite, "prompt"), _text(rewrite, "subject")
    target = _text(_object(rewrite, "target_new"), "str")
    if cloze.count("{}") != 1:
        raise _wrong("requested_rewrite.prompt", cloze, "text with {} once, where the subject goes")
    # not str.format(): a file must not reach into its other replacement fields
    prompt = cloze.replace("{}", subject)
    return _edit(prompt, target, subject, rephrases, neighbourhood=neighbourhood, portability=portability)


def _nested(record: Record, key: str) -> list[Probe]:
    """KnowEdit's probes, which it sorts by kind."""
    probes: list[Probe] = []
    for kind, entries in _object(record, key, required=False).items():
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise _wrong(f"{key}.{kind}", entries, 'a list of {"prompt", "ground_truth"}')
        probes += [_probe(entry, "prompt", "ground_truth") for entry in entries]
    return probes


def _one_hop(record: Record) -> list[Probe]:
    """The question that one more hop leads to, as EasyEdit adds it to ZsRE and CounterFact."""
    return [_probe(_object(record, "portability", required=False), "New Question", "New Answer")]


def _probe(record: Record, key: str, answer_key: str = "") -> Probe:
    """KnowEdit nests alternative answers ("a", ["a", "b"], [["a", "alias"], ["b"]]): the first is the answer."""
    answers: list[str] = []
    pending = [record.get(answer_key)]
    while pending:
        value = pending.pop(0)
        if isinstance(value, list):
            pending = value + pending
        elif isinstance(value, str):
            answers.append(value)
        elif value is not None:
            raise _wrong(answer_key, value, "text or a list of texts")
    aliases = tuple(dict.fromkeys(text for text in answers[1:] if text != answers[0]))
    return Probe(prompt=_text(record, key, required=False), answer=answers[0] if answers else "", aliases=aliases)


def _text(record: Record, key: str, required: bool = True) -> str:
    value = record.get(key)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise _wrong(key, value, "text in double quotes")
    if required and not value.strip():
        raise _wrong(key, value, "some text, or drop the record")
    return value


def _texts(record: Record, key: str) -> list[str]:
    value = record.get(key)
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in values):
        raise _wrong(key, value, "text or a list of texts")
    return values


def _object(record: Record, key: str, required: bool = True) -> Record:
    value = record.get(key)
    if value is None and not required:
        return {}
    if not isinstance(value, dict):
        raise _wrong(key, value, "an object")
    return value


def _wrong(key: str, value: object, wanted: str) -> EditFileError:
    return EditFileError(f"{_show(key)} is {'missing' if value is None else _show(value)}; write {wanted}")


def _collapse(text: str) -> str:
    return " ".join(text.split())
