"""The messages of `memoir bench routing`: which edit each of them asks for, if any, and in which part it is counted.

Whoever tunes a lookup looks at the part "tune" alone; the part "report" has other forms, relations and records. Forms,
tasks and templates say themselves in which part they are (`data/routing.json`), and so do the topics of ZsRE's
relations. What has an identifier of its own, such as a relation of CounterFact, is divided by its hash.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from memoir_retrieval.background import control_prompts, shipped
from memoir_retrieval.edits.record import Edit, StoredEdit
from memoir_retrieval.evaluation.datasets import QUESTIONS, TEXT
from memoir_retrieval.question.prompts import Message, Prompt

__all__ = [
    "PARTS",
    "PUBLISHED",
    "Part",
    "Question",
    "Trial",
    "chats",
    "faq",
    "forms",
    "hashed_part",
    "opposites",
    "other_questions",
    "plain_questions",
    "published",
    "record_part",
    "siblings",
    "tasks",
    "unrelated",
    "writings",
]

Part = Literal["tune", "report"]
PARTS: tuple[Part, ...] = ("tune", "report")


class Question(NamedTuple):
    """One message to look up.

    kind, name: the row of the report in which it counts.
    part: "tune" for what numbers may be chosen on, "report" for what may only be measured.
    prompt: the message, or a chat.
    right: ids of the edits of which one must act; empty where none may.
    edit: id of the edit that the message was made from, or -1.
    """

    kind: str
    name: str
    part: Part
    prompt: Prompt
    right: tuple[int, ...]
    edit: int = -1


class Trial(NamedTuple):
    """Edits, and the questions that are asked of a store of them.

    name: of the set.
    edits: their ids are their places.
    questions: in no order.
    """

    name: str
    edits: list[Edit]
    questions: list[Question]


# ---- parts ---------------------------------------------------------------------------------------------------------


def hashed_part(key: str) -> Part:
    """The part of what has an identifier.

    key: the identifier.
    """
    return PARTS[hashlib.sha256(key.encode()).digest()[0] % 2]


def record_part(prompt: str, subject: str) -> Part:
    """The part of an edit: that of the topic of its question. So no relation is in both parts.

    prompt: of the edit.
    subject: the name in it, which is no part of the topic; "" for none.
    """
    rest = _without(prompt, subject)
    for _, part, pattern in _data()["topics"]:
        if re.search(pattern, rest):
            return part
    return hashed_part(rest)


def _topics(text: str, subject: str) -> set[str]:
    rest = _without(text, subject)
    return {topic for topic, _, pattern in _data()["topics"] if re.search(pattern, rest)}


def _without(text: str, subject: str) -> str:
    return re.sub(re.escape(subject.lower()), " ", text.lower()) if subject else text.lower()


def _may_be_one_fact(a: str, b: str, subject: str, other_subject: str = "") -> bool:
    """Whether two questions may ask for one thing: they share a topic, or a word that is not everywhere."""
    first, second = _topics(a, subject), _topics(b, other_subject or subject)
    if not first or not second:  # nothing is known of one of them
        return True
    words = [{w for w in re.findall(r"\w{4,}", _without(t, s)) if w not in _EVERYWHERE}
             for t, s in ((a, subject), (b, other_subject or subject))]  # fmt: skip
    return bool(first & second or words[0] & words[1])


_EVERYWHERE = frozenset(
    ["what", "which", "where", "when", "does", "have", "that", "this", "with", "name", "from", "were", "was"]
)


@cache
def _data() -> dict[str, Any]:
    return json.loads(shipped("routing.json"))


# ---- of a store of trained edits -----------------------------------------------------------------------------------


def plain_questions(edits: Sequence[StoredEdit]) -> Iterator[Question]:
    """The prompts of the edits and their rephrasings, alone in their messages.

    edits: of the store that is asked.
    """
    for edit in edits:
        part = record_part(edit.prompt, edit.subject)
        yield Question("plain", "edits", part, edit.prompt, (edit.id,), edit.id)
        for text in edit.rephrases:
            yield Question("plain", "rephrasings", part, text, (edit.id,), edit.id)


def forms(edits: Sequence[StoredEdit]) -> Iterator[Question]:
    """The prompts of the edits in longer messages.

    edits: of the store that is asked.
    """
    for name, part, text, chosen in _texts("forms", edits):
        for i, edit in enumerate(chosen):
            other = chosen[(i + len(chosen) // 3) % len(chosen)]
            right = (edit.id, other.id) if "{other}" in text else (edit.id,)
            yield Question("form", name, part, _filled(text, edit, other), right, edit.id)


def tasks(edits: Sequence[StoredEdit]) -> Iterator[Question]:
    """What is asked of a question or of its subject, where the edit's answer would be wrong.

    edits: of the store that is asked.
    """
    for name, part, text, chosen in _texts("tasks", edits):
        for edit in chosen:
            if edit.subject or "{subject}" not in text:
                yield Question("task", name, part, _filled(text, edit, edit), (), edit.id)


def _texts(key: str, edits: Sequence[StoredEdit]) -> Iterator[tuple[str, Part, str, list[StoredEdit]]]:
    """Row, part and text of each template, with the edits that it is filled with: of one row each begins with another,
    so that a few questions of the row are about several edits."""
    before: Counter[tuple[str, Part]] = Counter()
    for name, part, text in _data()[key]:
        chosen = _of(edits, part)
        first = before[name, part] % max(1, len(chosen))
        before[name, part] += 1
        yield name, part, text, chosen[first:] + chosen[:first]


def _of(edits: Sequence[StoredEdit], part: Part) -> list[StoredEdit]:
    return [edit for edit in edits if record_part(edit.prompt, edit.subject) == part]


def _filled(text: str, edit: StoredEdit, other: StoredEdit) -> str:
    values = {
        "question": edit.prompt,
        "lowered": edit.prompt[:1].lower() + edit.prompt[1:],
        "target": edit.target,
        "subject": edit.subject,
        "other": other.prompt,
    }
    return re.sub(r"\{(question|lowered|target|subject|other)\}", lambda match: values[match[1]], text)


def writings(edits: Sequence[StoredEdit]) -> Iterator[Question]:
    """The prompts of the edits as hurried people, old keyboards and word processors write them.

    edits: of the store that is asked.
    """
    for edit in edits:
        part = record_part(edit.prompt, edit.subject)
        for name, change in WRITINGS.items():
            text = change(edit)
            if text != edit.prompt:
                yield Question("writing", name, part, text, (edit.id,), edit.id)


def _no_accents(text: str) -> str:
    plain = unicodedata.normalize("NFD", text.translate(str.maketrans("łŁøØđĐ", "lLoOdD")))
    return unicodedata.normalize("NFC", "".join(c for c in plain if not unicodedata.combining(c)))


def _typographic(text: str) -> str:
    text = re.sub(r'"([^"]*)"', "\u201c\\1\u201d", text)
    return text.replace("'", "\u2019").replace(" - ", " \u2013 ")


def _swapped(text: str, within: str) -> str:
    """The text with two neighbouring letters of the longest word that stands in `within` exchanged."""
    words = re.findall(r"[^\W\d_]{4,}", within)
    if not words:
        return text
    word = max(words, key=len)
    middle = len(word) // 2
    return text.replace(word, word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :], 1)


WRITINGS: dict[str, Callable[[StoredEdit], str]] = {
    "lower case": lambda edit: edit.prompt.lower(),
    "UPPER CASE": lambda edit: edit.prompt.upper(),
    "Title Case": lambda edit: re.sub(r"(?<![\w'])\w", lambda letter: letter[0].upper(), edit.prompt),
    "name in lower case": lambda edit: edit.prompt.replace(edit.subject, edit.subject.lower()),
    "no-break spaces": lambda edit: edit.prompt.replace(" ", "\u00a0"),
    "double spaces": lambda edit: edit.prompt.replace(" ", "  "),
    "accents left out": lambda edit: _no_accents(edit.prompt),
    "accents decomposed": lambda edit: unicodedata.normalize("NFD", edit.prompt),
    "typographic signs": lambda edit: _typographic(edit.prompt),
    "no question mark": lambda edit: edit.prompt.rstrip("?. "),
    "two question marks": lambda edit: edit.prompt.rstrip("? ") + "??",
    "space before the question mark": lambda edit: edit.prompt.rstrip("? ") + " ?",
    "line breaks around": lambda edit: f"\n\n{edit.prompt}\n",
    "slip in a common word": lambda edit: _swapped(edit.prompt, edit.prompt.replace(edit.subject or "\0", " ")),
    "slip in the name": lambda edit: _swapped(edit.prompt, edit.subject),
}


def chats(edits: Sequence[StoredEdit], answers: Sequence[str]) -> Iterator[Question]:
    """Questions in a chat that has had the base model's answer to the prompt already.

    edits: of the store that is asked.
    answers: what the base model says to each edit's prompt.
    """
    for edit, answer in zip(edits, answers, strict=True):
        part = record_part(edit.prompt, edit.subject)
        before: list[Message] = [{"role": "user", "content": edit.prompt}, {"role": "assistant", "content": answer}]
        apology = "I am sorry for the mistake. Could you ask me again, please?"
        doubt = [{"role": "user", "content": "That is wrong."}, {"role": "assistant", "content": apology}]
        kinds: dict[str, list[Message]] = {
            "again after the model's own answer": [*before, {"role": "user", "content": edit.prompt}],
            "that is wrong, in the same message": [
                *before,
                {"role": "user", "content": f"That is wrong. {edit.prompt}"},
            ],
            "that is wrong, and again": [*before, *doubt, {"role": "user", "content": edit.prompt}],
        }
        if edit.rephrases:
            kinds["a rephrasing after the model's own answer"] = [
                *before,
                {"role": "user", "content": edit.rephrases[0]},
            ]
        for name, messages in kinds.items():
            yield Question("chat", name, part, messages, (edit.id,), edit.id)


def other_questions(edits: Sequence[StoredEdit], each: int = 3) -> Iterator[Question]:
    """Questions of other edits about the name of an edit, which may not ask for the same fact in other words.

    edits: of the store that is asked; those whose subject does not stand in their prompt are left out.
    each: questions about the name of one edit, at most.
    """
    random = np.random.default_rng(0)
    named = [edit for edit in edits if edit.subject and edit.subject in edit.prompt]
    stored = {edit.prompt for edit in edits} | {text for edit in edits for text in edit.rephrases}
    for part in PARTS:
        for edit in _of(named, part):
            others = {
                other.prompt.replace(other.subject, edit.subject)
                for other in _of(named, part)
                if not _may_be_one_fact(edit.prompt, other.prompt, edit.subject, other.subject)
            }
            texts = sorted(others - stored)
            for i in random.permutation(len(texts))[:each]:
                yield Question("other question", "made up, about the same name", part, texts[i], (), edit.id)


# ---- edits of the library's own, of which masks are enough ---------------------------------------------------------


def siblings() -> Trial:
    """One question about many common names, numbers or codes; every second one has an edit."""
    edits: list[Edit] = []
    questions: list[Question] = []
    for relation, part, text, rephrasing, names in _data()["siblings"]:
        for name in names[: len(names) // 2]:
            number = len(edits)
            edits.append(Edit(prompt=text.format(name=name), target="-", subject=name))
            questions.append(
                Question("plain", f"rephrasings: {relation}", part, rephrasing.format(name=name), (number,), number)
            )
            questions.append(Question("plain", f"edits: {relation}", part, edits[-1].prompt, (number,), number))
        for name in names[len(names) // 2 :]:
            for wording in (text, rephrasing):
                questions.append(Question("sibling", relation, part, wording.format(name=name), ()))
    return Trial("siblings", edits, questions)


def opposites() -> Trial:
    """Questions beside their opposites, negations and other years."""
    edits: list[Edit] = []
    questions: list[Question] = []
    for number, (part, text, rephrasing, others) in enumerate(_data()["opposites"]):
        edits.append(Edit(prompt=text, target="-"))
        questions.append(Question("plain", "rephrasings", part, rephrasing, (number,), number))
        questions += [Question("opposite", "opposites, negations, other years", part, o, (), number) for o in others]
    return Trial("opposites", edits, questions)


def faq() -> Trial:
    """Twenty-four edits of a help page with their answers, and ten questions like them that have no edit."""
    edits = [Edit(prompt=prompt, target=target) for prompt, target in _data()["faq"]["edits"]]
    questions = [Question("faq", "own edits", "report", edit.prompt, (i,), i) for i, edit in enumerate(edits)]
    return Trial(
        "faq",
        edits,
        [*questions, *(Question("faq", "siblings", "report", text, ()) for text in _data()["faq"]["others"])],
    )


# ---- published sets ------------------------------------------------------------------------------------------------


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _sample(records: list[Any], most: int) -> list[Any]:
    """So many of the records, spread over the file."""
    return records if len(records) <= most else [records[i * len(records) // most] for i in range(most)]


def _distinct(records: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return list({" ".join(record[key].split()): record for record in reversed(records)}.values())[::-1]


def _knowedit(path: Path, most: int) -> Trial:
    edits: list[Edit] = []
    questions: list[Question] = []
    for record in _sample(_distinct(_lines(path), "prompt"), most):
        number, subject, prompt = len(edits), record["subject"], record["prompt"]
        part = record_part(prompt, subject)
        edits.append(Edit(prompt=prompt, target=record["target_new"] or "-", subject=subject))
        if record.get("rephrase_prompt", "").strip():
            questions.append(Question("plain", "rephrasings", part, record["rephrase_prompt"], (number,), number))
        answers = {answer.lower() for answer in record["ground_truth"]}
        for probe in record["locality"].get("Relation_Specificity", ()):
            # Some of them ask for the edited fact: their answer is the one that the edit replaces.
            same = answers & {str(answer).lower() for answer in probe["ground_truth"]}
            if not same and not _topics(prompt, subject) & _topics(probe["prompt"], subject):
                name = "real, about the same name (KnowEdit)"
                questions.append(Question("other question", name, part, probe["prompt"], (), number))
    return Trial("knowedit", edits, questions)


def _hallueditbench(path: Path, most: int) -> Trial:
    records = _distinct(_lines(path), "question")
    edits: list[Edit] = []
    questions: list[Question] = []
    chosen = _sample(records, most)
    stored = {record["question"] for record in chosen}
    beside: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        beside.setdefault(record["subject"], []).append(record)
    for record in chosen:
        number, subject, part = len(edits), record["subject"], hashed_part(record["relation"])
        edits.append(Edit(prompt=record["question"], target=record["object"], subject=subject))
        questions.append(Question("plain", "rephrasings", part, record["paraphrased_question"], (number,), number))
        others = [record["locality_question"]]
        others += [
            other["question"]
            for other in beside[subject]
            if other["relation"] != record["relation"] and other["question"] not in stored
        ]
        for text in others:
            if subject.lower() in text.lower() and text not in (record["question"], record["paraphrased_question"]):
                name = "real, about the same name (HalluEditBench)"
                questions.append(Question("other question", name, part, text, (), number))
    return Trial("hallueditbench", edits, questions)


def _counterfact(path: Path, most: int) -> Trial:
    edits: list[Edit] = []
    questions: list[Question] = []
    for record in _sample(_lines(path), most):
        rewrite, number = record["requested_rewrite"], len(edits)
        prompt = rewrite["prompt"].replace("{}", rewrite["subject"])
        if any(edit.prompt == prompt for edit in edits):
            continue
        part = hashed_part(rewrite["relation_id"])
        edits.append(Edit(prompt=prompt, target=rewrite["target_new"]["str"], subject=rewrite["subject"]))
        questions += [
            Question("plain", "rephrasings", part, t, (number,), number) for t in record["paraphrase_prompts"]
        ]
        name = "neighbourhood (CounterFact)"
        questions += [Question("sibling", name, part, text, (), number) for text in record["neighborhood_prompts"]]
    return Trial("counterfact", edits, questions)


def _qaedit(path: Path, most: int) -> Trial:
    edits: list[Edit] = []
    questions: list[Question] = []
    for record in _sample(_distinct(_lines(path), "prompt"), most):
        number, part = len(edits), hashed_part(str(record["id"]))
        edits.append(Edit(prompt=record["prompt"], target=record["target"] or "-", subject=record["subject"]))
        questions.append(Question("plain", "rephrasings", part, record["rephrase"], (number,), number))
    return Trial("qaedit", edits, questions)


PUBLISHED: dict[str, tuple[str, Callable[[Path, int], Trial]]] = {
    "knowedit": ("zsre/knowedit_zsre_test_all.jsonl", _knowedit),
    "hallueditbench": ("hallueditbench/meta_llama_3_8b_instruct.jsonl", _hallueditbench),
    "qaedit": ("qaedit/qaedit-dev.jsonl", _qaedit),
    "counterfact": ("counterfact/counterfact_portability_gpt4.jsonl", _counterfact),
}
"""By name: the file below the folder of the data sets, and what reads it."""


def published(name: str, folder: Path, most: int) -> Trial:
    """The trial of a published set.

    name: a key of `PUBLISHED`.
    folder: of the data sets.
    most: edits, at most.
    """
    path, read = PUBLISHED[name]
    return read(folder / path, most)


def unrelated(folder: Path, most: int, stored: Sequence[StoredEdit]) -> Iterator[Question]:
    """Prompts that no edit may act on: the library's, questions of people, and text, where the folder has them.

    folder: of the data sets.
    most: prompts, at most.
    stored: edits of the store; prompts that ask one of them are left out.
    """
    prompts = {" ".join(edit.prompt.lower().split()) for edit in stored}
    texts = [("the library's", text) for text in control_prompts()]
    rest = max(0, most - len(texts))
    questions, text = folder / QUESTIONS, folder / TEXT
    if questions.is_file():
        records = _sample([record["question"] for record in _lines(questions)], rest - rest // 3)
        texts += [("questions of people (NQ-open)", record) for record in records]
    if text.is_file():
        long = [r["text"] for r in _lines(text) if len(r["text"]) > 80 and not r["text"].strip().startswith("=")]
        texts += [("text (WikiText)", " ".join(record.split()[:80])) for record in _sample(long, rest // 3)]
    for name, prompt in texts[:most]:
        if " ".join(prompt.lower().split()) not in prompts:
            yield Question("unrelated", name, hashed_part(prompt), prompt, ())
