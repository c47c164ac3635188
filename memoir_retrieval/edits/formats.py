"""What a record of an edit file is: the project's own layout and the published ones, each read into `Edit`s."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from memoir_retrieval.edits.record import Edit, Probe, Requires, check_texts
from memoir_retrieval.edits.requires import check_requires
from memoir_retrieval.errors import EditFileError
from memoir_retrieval.question.prompts import Message
from memoir_retrieval.question.text import text_key

__all__ = ["FORMATS", "Fields", "Format", "Keys", "Record", "chat_messages", "detect_format", "is_record", "show"]

Record = dict[str, Any]
Texts = Iterable[str]
ROLES = ("system", "user", "assistant", "tool")

_CHAT_AS_TEXT = re.compile(r'\s*\[\s*\{\s*"(role|content)"\s*:.*\}\s*\]\s*', re.DOTALL)
"""What polars' `read_ndjson` makes of a chat, where the prompt of another record is text."""

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 60
show = _shorten.repr
"""How a value of a file is shown in an error: in quotes, and short."""


class Keys:
    """The keys of a file's records: which there are, and which of them were read."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.read: set[str] = set()


class Fields(dict[str, Any]):
    """An object of a record, which notes in `keys` what it has, and what is read of it with `get`."""

    def __init__(self, values: Record, keys: Keys, above: str = "") -> None:
        """values: the object.
        keys: of the file.
        above: what stands before its keys, such as "locality.".
        """
        super().__init__(values)
        self.keys_of_file = keys
        self.above = above
        keys.seen.update(above + key for key in values)

    def get(self, key: str, default: Any = None) -> Any:
        """See `dict.get`.

        key: of the object.
        default: where it has no such key.
        """
        self.keys_of_file.read.add(self.above + key)
        return super().get(key, default)

    def below(self, key: str, value: Record) -> Fields:
        """An object that stands under a key of this one.

        key: of this one.
        value: the object.
        """
        return Fields(value, self.keys_of_file, f"{self.above}{key}.")


class Format(NamedTuple):
    """A record layout.

    keys: the key sets by which it is recognised.
    parse: reads one record.
    """

    keys: list[list[str]]
    parse: Callable[[Fields], list[Edit]]


def is_record(record: Record) -> bool:
    """Whether an object has the keys of an edit, or of what is known not to be one, so that it holds no records itself.

    record: an object of a file.
    """
    key_sets = [set(keys) for known in FORMATS.values() for keys in known.keys]
    return any(keys <= record.keys() for keys in [*key_sets, *(keys for keys, _ in _NO_EDITS)])


def detect_format(record: Record) -> str:
    """The format with the largest key set found in the record; of equals, the first.

    record: an object of a file.
    Raises EditFileError for one that is no edit, saying what it is where that is known.
    """
    for keys, reason in _NO_EDITS:
        if keys <= record.keys():
            raise EditFileError(reason)
    languages = [key for key, value in record.items() if isinstance(value, dict) and {"src", "alt"} <= value.keys()]
    if languages:
        raise EditFileError(
            f"it holds a record for each of {', '.join(map(show, languages[:5]))}, but an edit acts in its own "
            "language "
            "alone; write the records of one language"
        )
    sizes = {name: len(keys) for name in FORMATS for keys in FORMATS[name].keys if {*keys} <= {*record}}
    if sizes:
        return max(sizes, key=lambda name: sizes[name])
    first = "; ".join(f"{name}: {', '.join(FORMATS[name].keys[0])}" for name in [*FORMATS][:4])
    raise EditFileError(
        f"no known format has the keys {show([*record])}; write those of one of: {first}; or of "
        f"{', '.join([*FORMATS][4:])}, which docs/reference/edit-files.md lists"
    )


_NO_EDITS: list[tuple[set[str], str]] = [
    (
        {"example_type", "edit"},
        "a record of RippleEdits, whose edits are sentences without a question; read KnowEdit's wiki_recent and "
        "wiki_counterfact, which were made from it",
    ),
    (
        {"chosen", "rejected"},
        "a pair of preferences, not a question with one answer: write 'prompt' and 'target'",
    ),
]
"""Keys of records that are no edits, and what these are."""


def _memoir(record: Fields) -> list[Edit]:
    names = Edit.__struct_fields__
    if unknown := [key for key in record if key not in names]:
        raise EditFileError(f"key {show(unknown[0])} is unknown; the keys are {', '.join(names)}")
    values = {name: value for name in names if (value := record.get(name)) is not None}
    if isinstance(values.get("prompt"), list):
        if values.get("before"):
            raise EditFileError("'prompt' is a chat, and so is 'before'; write all its messages under 'prompt'")
        values |= _chat(values["prompt"])
    if isinstance(values.get("before"), list):
        values["before"] = chat_messages("before", values["before"])
    prompt, target = _text(values, "prompt"), _target(values, "target")
    if isinstance(record["prompt"], str) and _CHAT_AS_TEXT.fullmatch(prompt):
        raise _wrong("prompt", prompt, "a chat as a list of messages, not as one text")
    try:
        edit = msgspec.convert(values | {"prompt": prompt, "target": target}, Edit)
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
    chat = chat_messages("prompt", messages)
    if not chat or chat[-1]["role"] != "user":
        raise EditFileError(f"'prompt' is {show(messages)}; end a chat with a message of the user's, the question")
    return {"prompt": chat[-1]["content"], "before": list(chat[:-1])}


def chat_messages(key: str, messages: Iterable[Any]) -> tuple[Message, ...]:
    """Messages as a server takes them: content in text or in parts of text, which it joins by line ends.

    key: under which they stand, for errors.
    messages: as JSON has them.

    Raises EditFileError for one that is not of text, or of no known role.
    """
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


def _conversation(key: str, messages: list[Any]) -> list[Edit]:
    """A chat that ends with the question and the answer to learn, as fine-tuning takes it."""
    chat = chat_messages(key, messages)
    if len(chat) < 2 or (chat[-2]["role"], chat[-1]["role"]) != ("user", "assistant"):
        raise _wrong(key, messages, "a chat that ends with a message of the user's and the assistant's answer")
    prompt, target = _text(chat[-2], "content"), _text(chat[-1], "content")
    return _edit(prompt, target, "", (), before=chat[:-2])


def _openai(record: Fields) -> list[Edit]:
    messages = record.get("messages")
    if not isinstance(messages, list):
        raise _wrong("messages", messages, "a list of messages")
    return _conversation("messages", messages)


def _sharegpt(record: Fields) -> list[Edit]:
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and {*turn} == {"from", "value"} for turn in turns
    ):
        raise _wrong("conversations", turns, 'a list of {"from", "value"}')
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles.get(str(t["from"]), t["from"]), "content": t["value"]} for t in turns]
    return _conversation("conversations", messages)


def _alpaca(record: Fields) -> list[Edit]:
    if _text(record, "input", required=False).strip():
        raise EditFileError(
            "'instruction' and 'input' can make a question in several ways; write it as 'prompt', with 'target'"
        )
    return _edit(_text(record, "instruction"), _target(record, "output"), "", ())


def _question(record: Fields) -> list[Edit]:
    """A question and its answer; UnKE adds a paraphrase, and questions about parts of the answer."""
    questions, answers = _texts(record, "sub_question"), _texts(record, "sub_answer")
    if len(questions) != len(answers):
        raise EditFileError(
            f"{len(questions)} of 'sub_question', but {len(answers)} of 'sub_answer'; give one for each"
        )
    parts = [Probe(prompt=prompt, answer=answer) for prompt, answer in zip(questions, answers, strict=True)]
    subject = _text(record, "subject", required=False)
    prompt, target = _text(record, "question"), _target(record, "answer")
    return _edit(prompt, target, subject, _texts(record, "para_question"), portability=parts)


def _wikibigedit(record: Fields) -> list[Edit]:
    rephrases = [*_texts(record, "rephrase"), *_texts(record, "personas")]
    locality, portability = [_probe(record, "loc", "loc_ans")], [_probe(record, "mhop", "mhop_ans")]
    subject = _text(record, "subject", required=False)
    prompt, target = _text(record, "update"), _target(record, "ans")
    return _edit(prompt, target, subject, rephrases, locality, portability=portability)


def _qaedit(record: Fields) -> list[Edit]:
    others = {*Edit.__struct_fields__} - {"prompt", "target", "subject", "source", "locality"}
    if mixed := sorted(others & record.keys()):
        raise EditFileError(f"'rephrase' and {show(mixed[0])} are keys of different formats; write 'rephrases', a list")
    locality = [
        _probe(entry, "prompt" if "prompt" in entry else "loc", "loc_ans", "answer", "ground_truth")
        for entry in (_objects(record, "locality") if record.get("locality") is not None else ())
    ]
    subject, source = _text(record, "subject", required=False), _text(record, "source", required=False)
    prompt, target = _text(record, "prompt"), _target(record, "target")
    return _edit(prompt, target, subject, _texts(record, "rephrase"), locality, source=source)


def _target_new(record: Fields) -> list[Edit]:
    """EasyEdit, WISE and KnowEdit: one family, in which a file may mix flat and nested locality."""
    wikibio = "labels" in record and "target_new" not in record
    return _edit(
        _text(record, "text" if wikibio else "prompt"),
        _target(record, "labels" if wikibio else "target_new"),
        _text(record, "concept" if wikibio else "subject", required=False),
        [*_texts(record, "rephrase_prompt"), *_texts(record, "rephrase")],
        [_probe(record, "locality_prompt", "locality_ground_truth"), *_nested(record, "locality")],
        portability=_nested(record, "portability"),
        ood=_texts(record, "ood_rephrase"),
    )


def _zsre(record: Fields) -> list[Edit]:
    subject = _text(record, "subject", required=False)
    locality = [_probe(record, "loc", "loc_ans")]
    rephrases = _texts(record, "rephrase")
    return _edit(
        _text(record, "src"), _target(record, "alt"), subject, rephrases, locality, portability=_one_hop(record)
    )


def _counterfact(record: Fields) -> list[Edit]:
    rewrite = _object(record, "requested_rewrite")
    answer = _text(_object(rewrite, "target_true", required=False), "str", required=False)
    neighbourhood = [Probe(prompt=text, answer=answer) for text in _texts(record, "neighborhood_prompts")]
    return _rewrite(rewrite, _texts(record, "paraphrase_prompts"), neighbourhood, _one_hop(record))


def _mquake(record: Fields) -> list[Edit]:
    rewrites = _objects(record, "requested_rewrite")
    # The multi-hop questions need every edit of the record, so they belong to the one that comes last.
    answer, aliases = _text(record, "new_answer", required=False), tuple(_texts(record, "new_answer_alias"))
    hops = [Probe(prompt=text, answer=answer, aliases=aliases) for text in _texts(record, "questions") if answer]
    edits: list[Edit] = []
    for rewrite in rewrites:
        edits += _rewrite(rewrite, _texts(rewrite, "question"), [], hops if rewrite is rewrites[-1] else [])
    return edits


def _hallueditbench(record: Fields) -> list[Edit]:
    subject = _text(record, "subject", required=False)
    rephrases, locality = _texts(record, "paraphrased_question"), [_probe(record, "locality_question")]
    hops = [_probe(record, f"question_{n}hop", f"answer_{n}hop") for n in range(2, 7)]
    return _edit(_text(record, "question"), _target(record, "object"), subject, rephrases, locality, portability=hops)


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
        ("qaedit", "prompt target rephrase", _qaedit),
        ("wikibigedit", "update ans", _wikibigedit),
        ("question", "question answer", _question),
        ("openai", "messages", _openai),
        ("sharegpt", "conversations", _sharegpt),
        ("alpaca", "instruction output", _alpaca),
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
    def with_prompt(probes: Iterable[Probe]) -> tuple[Probe, ...]:
        return tuple(probe for probe in probes if probe.prompt.strip())

    if not text_key(prompt):
        raise _wrong("prompt", prompt, "some text, or drop the record")
    edit = Edit(
        prompt=prompt,
        target=target,
        subject=subject,
        rephrases=tuple(text for text in rephrases if text.strip()),
        locality=with_prompt(locality),
        source=source,
        neighbourhood=with_prompt(neighbourhood),
        portability=tuple(probe for probe in with_prompt(portability) if probe.answer.strip()),
        ood=tuple(text for text in ood if text.strip()),
        before=before,
        requires=requires,
    )
    check_texts(edit)
    check_requires(edit)
    return [edit]


def _rewrite(rewrite: Fields, rephrases: list[str], neighbourhood: list[Probe], portability: list[Probe]) -> list[Edit]:
    cloze, subject = _text(rewrite, "prompt"), _text(rewrite, "subject")
    target = _target(_object(rewrite, "target_new"), "str")
    if cloze.count("{}") != 1:
        raise _wrong("requested_rewrite.prompt", cloze, "text with {} once, where the subject goes")
    # not str.format(): a file must not reach into its other replacement fields
    prompt = cloze.replace("{}", subject)
    return _edit(prompt, target, subject, rephrases, neighbourhood=neighbourhood, portability=portability)


def _nested(record: Fields, key: str) -> list[Probe]:
    """KnowEdit's probes, which it sorts by kind; CKnowEdit gives them in one list, and calls the answer so."""
    value = record.get(key)
    if isinstance(value, list):
        return [_probe(entry, "prompt", "ground_truth", "answer") for entry in _objects(record, key)]
    kinds = _object(record, key, required=False)
    return [
        _probe(entry, "prompt", "ground_truth", "answer")
        for kind in kinds
        for entry in _objects(kinds, kind, 'a list of {"prompt", "ground_truth"}')
    ]


def _one_hop(record: Fields) -> list[Probe]:
    """The question that one more hop leads to, as EasyEdit adds it to ZsRE and CounterFact."""
    return [_probe(_object(record, "portability", required=False), "New Question", "New Answer")]


def _probe(record: Fields, key: str, *answer_keys: str) -> Probe:
    """KnowEdit nests alternative answers ("a", ["a", "b"], [["a", "alias"], ["b"]]): the first is the answer."""
    answers: list[str] = []
    for answer_key in answer_keys:
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


def _target(record: Mapping[str, Any], key: str) -> str:
    """What an edit teaches: text, a whole number as it is written, or a list of one of these; ROME has it under "str".

    Other numbers have several forms, and a model may answer any of them.
    """
    value = record.get(key)
    if isinstance(value, dict) and isinstance(value.get("str"), str):
        value = value["str"]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        raise _wrong(key, value, f"the one of these {len(value)} that is meant")
    return _text({key: str(value) if type(value) is int else value}, key)


def _text(record: Mapping[str, Any], key: str, required: bool = True) -> str:
    value = record.get(key)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise _wrong(key, value, "text in double quotes")
    if required and not value.strip():
        raise _wrong(key, value, "some text, or drop the record")
    return value


def _texts(record: Fields, key: str) -> list[str]:
    value = record.get(key)
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in values):
        raise _wrong(key, value, "text or a list of texts")
    return values


def _object(record: Fields, key: str, required: bool = True) -> Fields:
    value = record.get(key)
    if value is None and not required:
        value = {}
    if not isinstance(value, dict):
        raise _wrong(key, value, "an object")
    return record.below(key, value)


def _objects(record: Fields, key: str, wanted: str = "a list of objects") -> list[Fields]:
    value = record.get(key)
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise _wrong(f"{record.above}{key}", value, wanted)
    return [record.below(key, entry) for entry in value]


def _wrong(key: str, value: object, wanted: str) -> EditFileError:
    return EditFileError(f"{show(key)} is {'missing' if value is None else show(value)}; write {wanted}")
