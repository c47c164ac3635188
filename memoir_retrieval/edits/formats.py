"""What a record of an edit file is: the project's own layout and the published ones, each read into `Edit`s."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgspec

from memoir_retrieval.edits.record import Edit, Probe, Requires
from memoir_retrieval.edits.requires import check_requires
from memoir_retrieval.errors import EditFileError
from memoir_retrieval.question.prompts import Message

__all__ = ["FORMATS", "Format", "detect_format", "show"]

Record = dict[str, Any]
Texts = Iterable[str]
ROLES = ("system", "user", "assistant", "tool")

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 60
show = _shorten.repr
"""How a value of a file is shown in an error: in quotes, and short."""


class Format(NamedTuple):
    """A record layout: the key sets that tell it from the others, and the function that reads one record."""

    keys: list[list[str]]
    parse: Callable[[Record], list[Edit]]


def detect_format(record: Record) -> str:
    """The format with the largest key set found in the record; of equals, the first."""
    sizes = {name: len(keys) for name in FORMATS for keys in FORMATS[name].keys if {*keys} <= {*record}}
    if sizes:
        return max(sizes, key=lambda name: sizes[name])
    formats = "; ".join(f"{name}: {', '.join(known.keys[0])}" for name, known in FORMATS.items())
    raise EditFileError(f"no known format has the keys {show([*record])}; write those of one of: {formats}")


def _memoir(record: Record) -> list[Edit]:
    fields = Edit.__struct_fields__
    if unknown := [key for key in record if key not in fields]:
        raise EditFileError(f"key {show(unknown[0])} is unknown; the keys are {', '.join(fields)}")
    if isinstance(record.get("prompt"), list):
        record = record | _chat(record["prompt"])
    if isinstance(record.get("before"), list):
        record = record | {"before": _messages("before", record["before"])}
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
        before=edit.before,
        requires=edit.requires,
    )


def _chat(messages: list[Any]) -> Record:
    """A prompt that is a chat: its last message is the question, what stands before it is kept as such."""
    found = _messages("prompt", messages)
    if not found or found[-1]["role"] != "user":
        raise EditFileError(f"'prompt' is {show(messages)}; end a chat with a message of the user's, the question")
    return {"prompt": found[-1]["content"], "before": list(found[:-1])}


def _messages(key: str, messages: Iterable[Any]) -> tuple[Message, ...]:
    """Messages as a server takes them: content in text or in parts of text, which it joins by line ends."""
    return tuple(_message(key, message) for message in messages)


def _message(key: str, message: Any) -> Message:
    fields = dict(message) if isinstance(message, dict) else {}
    parts = fields.get("content")
    if isinstance(parts, list) and all(isinstance(p, dict) and {*p} == {"type", "text"} for p in parts):
        texts = [part["text"] for part in parts if part["type"] == "text"]
        if len(texts) == len(parts) and all(isinstance(text, str) for text in texts):
            fields["content"] = "\n".join(texts)
    known = {"role", "content"} <= fields.keys() <= {"role", "content", "name", "tool_call_id"}
    if not known or fields["role"] not in ROLES or not all(isinstance(value, str) for value in fields.values()):
        wanted = f'messages, each {{"role", "content"}} in text, of a role of {", ".join(ROLES)}'
        raise _wrong(key, message, f"{wanted}; tool calls and pictures cannot be kept")
    return fields


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
    requires: Requires = (),
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
        requires=requires,
    )
    try:
        msgspec.json.encode(edit)
    except UnicodeEncodeError as error:
        half = show(error.object[error.start])
        raise EditFileError(f"{show(error.object)} has half a surrogate pair, {half}; remove it") from None
    check_requires(edit)
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
    return EditFileError(f"{show(key)} is {'missing' if value is None else show(value)}; write {wanted}")
