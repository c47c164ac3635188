"""Messages around questions, to learn from: those that want something done with a question, and others.

They are made of what was written for this library: whole ones with a place for a question, which want something done
with it or want its answer (`data/messages.json`), and sentences to the same ends (`data/judge_questions.json`). They
get questions of the latter file.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Framed", "framed", "held_back", "longer"]

FOLDS = 5  # one message of so many is held back
LABELS = (("Q: ", "A: "), ("User: ", "Assistant: "), ("Input: ", "Output: "), ("", "-> "), ("* ", "  "), ("Q. ", "A. "))
QUOTES = ('"{}"', "'{}'", "“{}”", "{}", "{}", "{}", "{}", "{}")


class Framed(NamedTuple):
    """A message around a question.

    text: the whole of it.
    question: what stands in it.
    task: whether something else than its answer is wanted.
    sentence: what it was made of; messages of one are held back together.
    """

    text: str
    question: str
    task: bool
    sentence: str


def framed(seed: int = 0) -> Iterator[Framed]:
    """Messages to learn from.

    seed: of what stands beside what. Each message draws by itself, so that more of them leave the others as they are.
    """
    data = files("memoir_retrieval") / "data"
    own = _own()
    whole: dict[str, list[str]] = json.loads((data / "messages.json").read_text())
    rng = random.Random()

    def question() -> str:
        of = rng.choice(own["questions"])
        return str(rng.choice(of["wordings"]).replace("{}", rng.choice(own["names"][of["name"]])))

    def answer() -> str:
        return str(
            rng.choice(own["names"][rng.choice(("person", "country", "city", "work", "number", "year", "thing"))])
        )

    def frame() -> str:
        return _filled(rng.choice(own["frames"]), own, rng)

    for task, key in ((True, "tasks"), (False, "forms")):
        for message in whole[key]:
            rng.seed(f"{seed} {message}")
            core = question()
            yield Framed(message.replace("{question}", core), core, task, message)
    for task, key in ((True, "tasks"), (False, "frames")):
        for sentence in own[key] + own[f"more_{key}"]:
            rng.seed(f"{seed} {sentence}")
            core, words, gap = question(), _filled(sentence, own, rng), rng.choice((" ", "\n", "\n\n"))
            parts = [words, rng.choice(QUOTES).format(core)]
            if not words.endswith(":") and rng.random() < 0.2:
                parts.reverse()
            if rng.random() < 0.4:  # beside a task there may be more, too
                more = [frame() for _ in range(rng.choice((1, 1, 2, 4)))]
                parts = [*more, *parts] if rng.random() < 0.5 else [*parts, *more]
            yield Framed(gap.join(parts), core, task, sentence)
    for number in range(len(own["frames"])):  # a question beside others
        rng.seed(f"{seed} beside {number}")
        core, others = question(), [question() for _ in range(rng.choice((1, 1, 2)))]
        parts = [*others, core] if rng.random() < 0.5 else [core, *others]
        if rng.random() < 0.3:
            parts.insert(0, frame())
        yield Framed(rng.choice((" ", "\n", " Also, ", " And ")).join(parts), core, False, f"beside {others[0]}")
    for number in range(len(own["frames"]) // 2):  # a question behind others that have answers
        rng.seed(f"{seed} behind {number}")
        ask, reply = rng.choice(LABELS)
        core, pairs = question(), [(question(), answer()) for _ in range(rng.choice((1, 2, 2, 3)))]
        gap = rng.choice(("\n", "\n\n"))
        text = gap.join(f"{ask}{other}\n{reply}{said}" for other, said in pairs)
        text = f"{text}{gap}{ask}{core}" + rng.choice(("", f"\n{reply}".rstrip()))
        yield Framed(f"{frame()}\n{text}" if rng.random() < 0.3 else text, core, False, f"behind {pairs[0][0]}")


def longer(messages: Sequence[Framed], seed: int = 0) -> Iterator[Framed]:
    """Half of some messages with more around them: people greet, explain and thank, whatever they want.

    messages: any.
    seed: of which and of what stands there.
    """
    own = _own()
    rng = random.Random()
    for message in messages:
        rng.seed(f"{seed} longer {message.text}")
        if rng.random() < 0.5:
            continue
        parts = [message.text]
        for _ in range(rng.choice((1, 1, 2, 3))):
            parts.insert(rng.choice((0, len(parts))), _filled(rng.choice(own["frames"] + own["more_frames"]), own, rng))
        yield message._replace(text=rng.choice((" ", "\n", "\n\n")).join(parts))


def held_back(messages: Sequence[Framed]) -> NDArray[np.bool_]:
    """Which messages are not learnt from while it is measured how much the others teach: bool [M].

    messages: all of them; of one sentence all are held back or none.
    """
    return np.array([zlib.crc32(message.sentence.encode()) % FOLDS == 0 for message in messages], bool)


def _own() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((files("memoir_retrieval") / "data" / "judge_questions.json").read_text())
    return data


def _filled(sentence: str, own: dict[str, Any], rng: random.Random) -> str:
    thing = rng.choice(own["objects"])
    return sentence.replace("{object}", thing).replace("{}", rng.choice(own["names"]["language"]))
