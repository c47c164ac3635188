"""Whether a question is the question of an edit: decided from the words of both, the same wherever it is decided.

Masks of two questions are alike where the questions are about the same thing, whatever they ask of it; and questions
that differ in nothing but a name, a number or an opposite have nearly the same mask. So the nearest edits are looked at
word by word. A word that only one of the two questions has counts against them, the more the less it can be left out
and the less any word of the other question means the same: a small table of words, made by `train_judge`, says both.
The table knows English. Of other words it knows that they must be in both.

Everything is a sum of whole numbers or of floats in a fixed order, so the reference and a server decide alike.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.resources import files
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np
import regex
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from memoir_retrieval.edits.numbers import digits_joined, number, other_number, raised_apart, roman, signs_in_words
from memoir_retrieval.edits.requires import UNSPACED
from memoir_retrieval.edits.task_words import PLACE, ROWS, TaskWords
from memoir_retrieval.edits.units import CURRENCIES, other_unit, unit
from memoir_retrieval.errors import StoreError, StoreMismatch
from memoir_retrieval.question.text import normalize, plain_text, text_key

__all__ = [
    "Judge",
    "Reading",
    "Terms",
    "Verdict",
    "Weights",
    "has_digit",
    "judge_named",
    "letters",
    "letters_and_words",
    "read",
    "shipped_judge",
]

TABLE = "judge.safetensors"
SCALE = 127
"""A table's vectors are whole numbers: the length of each is about this."""
_COLUMNS = {"vectors": "int8", "needed": "float32", "extra": "float32", "asks": "uint8"}
_NEGATIONS = """not no never without except neither nor none unless nothing non excluding excluded lacking"""
NEGATIONS = frozenset(_NEGATIONS.split())
_LITTLE = """a an the of is are was were be been being am do does did has have had it its this that these those what
which who whom whose in at by for as there please i me my you your we our can could would will should"""
LITTLE = frozenset(_LITTLE.split())
"""Words that say nothing by themselves: a question may have them or not."""
_POINTERS = """question questions message text sentence line prompt request user following below above this that it its
these those here both two he she they them his her their same one ones word words letter letters answer reply asker
writer author speaker person somebody anybody mail note vowel vowels consonants syllables characters verb verbs noun
nouns tag tags topic subject category language tone mood feeling intent sentiment title heading grammar spelling mistake
mistakes typo typos translate translation say said spam polite rude ask asked asking mean meaning"""
POINTERS = frozenset(_POINTERS.split())
"""Words that point to a text or name what it has. A question without any is not about the text beside it."""
TASK = 1.0
"""Nats from which on a message is a task, by what its words and its activations say together."""
WORDED = 0.6
"""Nats from which on it is one by its words, where nobody knows what the activations say."""
REPLACED = 8.0
"""Nats that one word in place of another counts, more than can speak for an edit."""
SYNONYMS = 0.55
"""Cosine of two words from which on they may stand in place of each other."""
LIGHT = 1.0
"""Nats below which a word may be left out."""
_LONG = 9
"""Letters of a word from which on the first may be mistyped: "Dublin" and "Lublin" are two."""
LONGEST = 512
"""Words of a text that are looked at; the last ones of a longer text are not."""

_WORD = regex.compile(
    rf"(?V1)[[\p{{L}}\p{{N}}]&&[{UNSPACED}]]\p{{M}}*|\p{{N}}+(?:[.,:]\p{{N}}+)+|[\p{{L}}\p{{M}}\p{{N}}_--[{UNSPACED}]]+[+#]*"
)
_STOP = r".!?:;\u0964\u0965\u06d4"  # dandas and the Urdu full stop, too
_SYMBOL = regex.compile(r"(?V1)[[\p{So}\p{Sm}]--[©®™℠°+<=>|~¬×÷⁄−≠≤≥♯♭]]")
_MEANT = frozenset("√∛∜∑∏∫∂∇∞±∓∈∉∪∩⊂⊃")
"""Symbols that are no ornament where one of two texts alone has them."""
# Accents. Elsewhere marks make other letters: the kana's "ba" of "ha", a Thai tone, the Cyrillic short i.
_ACCENT = regex.compile(
    r"(?V1)(?<=[\p{Script=Latin}\p{Script=Greek}\p{Script=Hebrew}\p{Script=Arabic}]\p{M}{0,30})\p{M}"
    r"|(?<=[аеиоуыэюяіє])[\u0300\u0301]|(?<=е)\u0308|[\uFE00-\uFE0F\u20E3]"
)
_ROMAN = regex.compile(r"(?=[ivxlcdm])m{0,3}(?:cm|cd|d?c{0,3})(?:xc|xl|l?x{0,3})(?:ix|iv|v?i{0,3})")
# Inside a clause. No codes are an initial or the article before a name, and half of a word: "X-ray", "O'Connor".
_CODE = regex.compile(
    r"(?<=[^\s.!?:;\"“”\-–—][^\S\n]{1,3})"
    r"(?:[A-HJ-Z](?=[?!,;)]|['’](?!(?!s\b)\p{L})|\.?\s*$|\s(?!\s*\p{Lu}))"
    r"|(?=[IVX]{2,}\b)X{0,3}(?:IX|IV|V?I{0,3})\b)"
)
# A run of signs is read once, from its first one on: the time is linear where it ends no clause.
_CLAUSE = regex.compile(rf"(?<![{_STOP}])[{_STOP}]++(?=[\s\"')\]*]|$)|[\n\"“”]+|(?:^|\s)[-–—]+\s")
_SENTENCE = regex.compile(rf"[^{_STOP}\n\"“”]+\??")
_APOSTROPHE = regex.compile(r"(?<=\p{L})[’´`ʼ‘＇](?=\p{L})")
_CONTRACTED = regex.compile(r"(?i)(?:\b(ca|wo)|(?<=\p{L}))n't\b")
_FULL = {"ca": "can", "wo": "will"}
_POSSESSIVE = regex.compile(r"(?<=\p{L})['’](?:s|re|ll|ve|d|m)?\b|(?<=s)['’](?=\s|$)")
_NEITHER = regex.compile(r"[^\p{L}\p{M}\p{N}]+")  # letters nor digits
_THOUSANDS = regex.compile(r"\d{1,3}(?:,\d{3})+")
_HELPING = "is are was were do does did has have had can ca could will wo would should must ai".replace(" ", "|")
_PERSONS = "it this that there he she they we you i".replace(" ", "|")
_TAG = regex.compile(
    rf"(?i),\s(?:(?:{_HELPING})(?:n['’]?t)?\s(?:{_PERSONS})(?:\snot)?(?=\s{{0,3}}(?:[.?!\n\"“”]|$))"
    r"|(?:right|correct|no)(?=\s{0,3}\?))"
)
_PLAIN = str.maketrans({"ł": "l", "ø": "o", "đ": "d", "ı": "i", "ß": "ss", "æ": "ae", "œ": "oe", "ð": "d", "þ": "th"})
_VERBS = """divided beat beats beaten defeat defeats defeated conquer conquered invade invaded attack attacked precede
preceded succeed succeeded"""
_PASSIVE = frozenset(_VERBS.split())
_DIRECTED = _PASSIVE.union(("to", "from", "into", "over", "than", "minus"))
"""Words around which it makes a difference which of two others stands first."""
_SYMMETRIC = """and or between with vs versus married related near same differ different"""
_EITHER_WAY = frozenset(_SYMMETRIC.split())
"""Words beside which it makes none."""
_CALCULATES = frozenset(("percent", "plus", "minus", "times", "divided", "power"))
"""Words that tell texts apart as numbers do where they stand beside one."""


class Reading(NamedTuple):
    """A text as it is judged.

    words: in their order, case and accents taken off.
    clauses: the same words, by the clauses of the text.
    names: words that have a capital letter inside a clause; empty where no word is without one.
    codes: words that tell texts apart as numbers do: "minus" before a number, the A of "Plan A", the II of "Elizabeth
    II".
    symbols: signs with a meaning of their own that no word stands for, such as emoji.
    """

    words: tuple[str, ...]
    clauses: tuple[tuple[str, ...], ...]
    names: frozenset[str] = frozenset()
    codes: frozenset[str] = frozenset()
    symbols: frozenset[str] = frozenset()


Terms: TypeAlias = tuple[tuple[str, float], ...]
"""Words with what each counts, in nats, the heaviest first."""


class Verdict(NamedTuple):
    """What is said of a question and an edit.

    same: whether the question is the edit's.
    score: what speaks for it, in nats; from 0 on it is the same.
    relation: how alike what both ask is, in [-1, 1].
    lacking: words that only the edit has.
    added: words that only the question has.
    task: what in the rest of the message asks for something to be done with the question, or "".
    part: what decided: "same words", "task", "words", "relation", or "mask" without a judge.
    """

    same: bool
    score: float
    relation: float
    lacking: Terms
    added: Terms
    task: str
    part: str


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of a judge that no word has.

    version: of how the numbers are used; part of the judge's name.
    bias: what speaks for a question with the edit's words alone, in nats.
    relation: weight of the cosine of what both ask, in nats.
    steep, least: a word stands for another from about the cosine `least` on, and how sharply.
    unknown: what a word counts that the table lacks, in nats.
    digits: what a number or a negation counts, in nats.
    task, task_step: what speaks for a task in every message, and what a 1 in the table of `TaskWords` counts, in nats.
    name: cosine from which on a word may be a name in another's place.
    kind: what "who" in place of "where" counts, in nats.
    many, credit: words in common count for the edit beyond `many` nats, each nat as `credit`.
    """

    version: int
    bias: float
    relation: float
    steep: float
    least: float
    unknown: float
    digits: float
    task: float
    task_step: float
    name: float
    kind: float
    many: float
    credit: float


@lru_cache(maxsize=4096)
def read(text: str) -> Reading:
    """The words of a text, and its clauses. Case, accents and what is contracted do not count, nor does the "isn't it?"
    behind a sentence; of the signs those alone that tell numbers apart, and emoji.

    text: any; of a long one the first 512 words, of its first 8192 characters.
    """
    text = _TAG.sub("", _APOSTROPHE.sub("'", plain_text(text[: 16 * LONGEST])))
    plain = digits_joined(_POSSESSIVE.sub(" ", _fold(_CONTRACTED.sub(_negated, signs_in_words(text)))))
    clauses = []
    left = LONGEST
    for part in _CLAUSE.split(plain):
        clause = tuple(_whole(word) for word in _WORD.findall(part))[:left]
        left -= len(clause)
        if clause:
            clauses.append(clause)
    words = tuple(word for clause in clauses for word in clause)
    symbols = frozenset() if text.isascii() else frozenset(_SYMBOL.findall(text))
    names, codes = _capitals(text)
    return Reading(words, tuple(clauses), names, codes | _calculating(words), symbols)


def _calculating(words: tuple[str, ...]) -> frozenset[str]:
    """Words beside a number that say what is to be done with it, or that it is less than nothing; and the accidental of
    a note, "C sharp"."""
    codes = {word for note, word in pairwise(words) if len(note) == 1 and word in ("sharp", "flat")}
    for i in [i for i, word in enumerate(words) if word in _CALCULATES]:
        before, after = (bool(near) and has_digit(near[0]) for near in (words[i - 1 : i], words[i + 1 :]))
        if words[i] == "minus":  # between two, as in "5 minus 3", it is often written as a dash
            before, after = False, not before and (after or bool(number("".join(words[i + 1 : i + 2]))))
        if words[i] == "power":  # of a number or a variable, "x^2"
            before = len("".join(words[i - 1 : i])) == 1 or before
        if before and after if words[i] in ("times", "power") else before or after:
            codes.add(words[i])
    return frozenset(codes)


def _negated(contracted: regex.Match[str]) -> str:
    """What stands for "n't", and for the verb before it where that has another form there."""
    return f"{_FULL[contracted[1].lower()]} not" if contracted[1] else " not"


def _capitals(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """Words with a capital letter that none of a clause's beginning explains, and single capitals and Roman numerals
    among them; none where every word has one."""
    capital, plain = set(), False
    for clause in _CLAUSE.split(text):
        for word in _WORD.findall(clause)[1:]:
            plain = plain or word[0].islower()
            if word[0].isupper() and not word[1:].isupper():  # CEO is no name
                capital.update(_WORD.findall(_fold(word)))
    if not plain:
        return frozenset(), frozenset()
    return frozenset(capital), frozenset(code.lower() for code in _CODE.findall(text))


def _fold(text: str) -> str:
    if text.isascii():
        return text.lower().replace("cannot", "can not")
    folded = normalize(raised_apart(text.casefold().replace("™", "")), "NFKD")
    return normalize(_ACCENT.sub("", folded), "NFC").translate(_PLAIN).replace("cannot", "can not")


def _whole(word: str) -> str:
    """A number without the signs between its thousands."""
    return word.replace(",", "") if _THOUSANDS.fullmatch(word) else word


def letters(text: str) -> str:
    """The letters and digits of a text, case and accents taken off, and its signs as far as `read` has words for them:
    alike for two writings of the same words.

    text: any; of a long one the first 8192 characters.
    """
    return _NEITHER.sub("", _spelt(text))


def letters_and_words(text: str) -> tuple[str, list[str]]:
    """What `letters` gives, and the words that it is made of.

    text: see `letters`.
    """
    spelt = _spelt(text)
    return _NEITHER.sub("", spelt), _WORD.findall(spelt)


def _spelt(text: str) -> str:
    return _fold(signs_in_words(_APOSTROPHE.sub("'", plain_text(text[: 16 * LONGEST]))))


class Judge:
    """A table of words with the weights that go with it.

    words: V of them.
    vectors: int8 [V, W], of length `SCALE` each.
    needed, extra: float32 [V], nats that a word counts where it stands in the edit's question alone, or in the
    other alone.
    asks: uint8 [V], weight of a word in what a question asks.
    tasks: int8 [ROWS], by which words around a question say that something is to be done with it, see `TaskWords`.
    contraries: int32 [P, 2], rows of words that say the opposite of each other.
    weights: what all words share.
    digest: SHA-256 of the file, in hexadecimal; "" for a judge that was read from none.
    """

    def __init__(
        self,
        words: Sequence[str],
        vectors: NDArray[np.int8],
        needed: NDArray[np.float32],
        extra: NDArray[np.float32],
        asks: NDArray[np.uint8],
        tasks: NDArray[np.int8],
        contraries: NDArray[np.int32],
        weights: Weights,
        digest: str = "",
    ) -> None:
        self.row = {word: row for row, word in enumerate(words)}
        self.vectors, self.weights, self.digest = vectors, weights, digest
        self._needed, self._extra = needed.tolist(), extra.tolist()
        self._task_words = TaskWords(tasks, weights.task_step, weights.task)
        self._asks = asks
        both = [(words[a], words[b]) for a, b in contraries.tolist()]
        self._contraries = frozenset((*both, *((b, a) for a, b in both)))
        self._read = lru_cache(maxsize=1 << 16)(self._rows)
        self._task = lru_cache(maxsize=256)(self._asked_for)  # the rest is one for all candidates of a message

    @classmethod
    def of_bytes(cls, data: bytes, name: str = TABLE) -> Judge:
        """The judge that a file holds.

        data: the file, in safetensors' format.
        name: of the file, for the error.
        Raises StoreError for one that is damaged.
        """
        try:
            tensors = load(data)
            words = tensors.pop("words").tobytes().decode().split("\n")
            weights = msgspec.json.decode(tensors.pop("weights").tobytes(), type=Weights)
            contraries, tasks = tensors.pop("contraries"), tensors.pop("tasks")
            if tasks.dtype != np.int8 or tasks.shape != (ROWS,):
                raise ValueError(f"tasks are {tasks.dtype} {tasks.shape}")
            if (
                contraries.dtype != np.int32
                or contraries.ndim != 2
                or not 0 <= contraries.min() <= contraries.max() < len(words)
            ):
                raise ValueError(f"contraries are {contraries.dtype} {contraries.shape}")
            columns = {key: (str(array.dtype), array.shape[0], array.ndim) for key, array in tensors.items()}
            wanted = {key: (dtype, len(words), 1 + (key == "vectors")) for key, dtype in _COLUMNS.items()}
            if columns != wanted:
                raise ValueError(f"it holds {columns}, not {wanted}")
        except (ValueError, KeyError, IndexError, SafetensorError, msgspec.MsgspecError) as error:
            raise StoreError(f"{name} is damaged ({error!s:.200}): install memoir-retrieval again") from error
        return cls(
            words=words,
            **tensors,
            tasks=tasks,
            contraries=contraries,
            weights=weights,
            digest=hashlib.sha256(data).hexdigest(),
        )

    @property
    def name(self) -> str:
        """Version and digest, as a store's manifest names them."""
        return f"{self.weights.version}-{self.digest[:16]}"

    def verdict(
        self, edit: str, question: str, rest: str = "", required: Sequence[str] = (), speaks: float | None = None
    ) -> Verdict:
        """Whether a question is that of an edit.

        edit: the edit's prompt.
        question: the text that is taken for a question.
        rest: the message around it, with `PLACE` for it; "" where it stands alone.
        required: texts that are known to stand in the question, or others in their place: their words count as shared.
        speaks: what `TaskProbe` says of the rest, in nats; without it its words alone decide whether it is a task.
        """
        mine, theirs = read(edit), read(question)
        if not mine.words and not theirs.words:  # "!!!" or an emoji
            same = mine.symbols == theirs.symbols and (bool(mine.symbols) or text_key(edit) == text_key(question))
            if not same:
                return Verdict(False, -math.inf, 0.0, (), (), "", "words")
        verdict = self._compared(mine, theirs, required)
        if verdict.same and rest and (task := self._task(rest, speaks)):
            return verdict._replace(same=False, score=-math.inf, task=task, part="task")
        return verdict

    def _compared(self, mine: Reading, theirs: Reading, required: Sequence[str]) -> Verdict:
        """The verdict on an edit's question and another, whatever stands around that. required: see `verdict`."""
        here_only, there_only = mine.symbols - theirs.symbols, theirs.symbols - mine.symbols
        if not (here_only and there_only):  # in one alone they may be an ornament
            here_only, there_only = here_only & _MEANT, there_only & _MEANT
        if mine.words == theirs.words and not here_only and not there_only:
            return Verdict(True, self.weights.bias + self.weights.relation, 1.0, (), (), "", "same words")
        shared = {word for text in required for word in read(text).words}
        here, there = dict.fromkeys(mine.words), dict.fromkeys(theirs.words)
        little = LITTLE - _codes(mine) - _codes(theirs)
        added = [word for word in there if word not in here and word not in shared and word not in little]
        absent = [word for word in here if word not in there and word not in shared]
        lacking = [word for word in absent if word not in little]
        names = mine.names | theirs.names
        for word in absent:  # misspelt in one of them, it is shared
            twin = next((other for other in added if self._is_slip(word, other, names)), None)
            if twin is not None:
                added.remove(twin)
                if word in lacking:
                    lacking.remove(word)
        lacking += sorted(here_only)
        added += sorted(there_only)
        relation = self._relation(mine.words, theirs.words)
        needed = self._against(lacking, tuple(there), self._needed, mine.codes | mine.symbols)
        extra = self._against(added, tuple(here), self._extra, theirs.codes | theirs.symbols)
        score = self.weights.bias + self.weights.relation * relation
        if lacking:  # else the question is the edit's with more around it, such as a task
            score += self._in_common([word for word in here if word in there])
        against = self.weights.kind if _other_kind(mine, theirs) else 0.0
        for _, weight in (*needed, *extra):
            against += weight
        if (
            self._renamed(mine, theirs, lacking, added)
            or _turned(mine, theirs, not lacking and not added)
            or _numbers_moved(mine, theirs)
            or _names_moved(mine, theirs)
            or any((a, b) in self._contraries or other_number(a, b) or other_unit(a, b) for a in lacking for b in added)
        ):
            against += REPLACED
        elif (pair := _exchange(mine, theirs, shared)) and not self._is_slip(*pair, names):
            against += self._replaced(*pair)
        part = "relation" if self.weights.relation * (1 - relation) > against else "words"
        return Verdict(score >= against, score - against, relation, _heaviest(needed), _heaviest(extra), "", part)

    def _replaced(self, needed: str, extra: str) -> float:
        """What counts, in nats, where two questions are the same but for one word that stands in place of another: all
        that can, unless the two mean the same or can be left out."""
        rows = [self.row.get(word, -1) for word in (needed, extra)]
        if min(rows) < 0:
            return REPLACED
        first, other = self.vectors[rows].astype(np.int64)
        synonyms = int(first @ other) >= SYNONYMS * SCALE * SCALE
        light = max(self._needed[rows[0]], self._extra[rows[1]]) < LIGHT
        return 0.0 if synonyms or light else REPLACED

    def _in_common(self, words: Sequence[str]) -> float:
        """What speaks for an edit, in nats, where so many words are in both texts that it cannot be by chance."""
        total = 0.0
        for word in words:
            total += self.weights.unknown if word not in self.row else self._needed[self.row[word]]
        return self.weights.credit * max(0.0, total - self.weights.many)

    def _renamed(self, mine: Reading, theirs: Reading, lacking: Sequence[str], added: Sequence[str]) -> bool:
        """Whether a name of the edit is missing and another one stands in the question."""
        letters = [[word for word in words if len(word) == 1] for words in (lacking, added)]
        if all(letters):  # "form K-21" and "form A-21"
            return True
        others = [word for word in added if not any(_akin(word, own) for own in mine.words)]
        names = [name for name in lacking if name in mine.names and not any(_akin(name, w) for w in theirs.words)]
        if not names or not others:
            return False
        return not theirs.names.isdisjoint(others) or any(self._near(name, word) for name in names for word in others)

    def _near(self, a: str, b: str) -> bool:
        """Whether two words are of a kind, as two names are."""
        if a not in self.row or b not in self.row:
            return False
        first, other = self.vectors[[self.row[a], self.row[b]]].astype(np.int64)
        return int(first @ other) >= self.weights.name * SCALE * SCALE

    def _is_slip(self, a: str, b: str, names: frozenset[str]) -> bool:
        """Whether one of two words is the other in another form, or misspelt: both words of the table are not. names:
        those of both texts. Of the forms they have the genitive alone, "Edwards mother"."""
        if (digits := number(a)) and number(b):
            return digits == number(b)
        if (name := unit(a)) and unit(b):
            return name == unit(b)
        if (digits := number(a) or number(b)) and (value := roman(a) or roman(b)):
            return digits.rstrip("stndrh") == str(value)
        if _ROMAN.fullmatch(a) and _ROMAN.fullmatch(b):
            return False
        inflected = _inflected(a, b) and (max(a, b, key=len)[-1] == "s" or not names.issuperset((a, b)))
        if a in self.row and b in self.row:
            return inflected
        return inflected or _misspelt(a, b) or _derived(a, b) or _elided(a, b)

    def _rows(self, words: tuple[str, ...]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Of words of the table: their vectors, float32 [N, W], and the weighted sum of these, float64 [W].

        All are whole numbers that the floats hold exactly, so no order of adding them up changes a sum.
        """
        rows = [self.row[word] for word in words if word in self.row]
        vectors = self.vectors[rows].astype(np.float32)
        return vectors, self._asks[rows].astype(np.float64) @ vectors.astype(np.float64)

    def _relation(self, a: tuple[str, ...], b: tuple[str, ...]) -> float:
        first, other = self._read(a)[1], self._read(b)[1]
        size = math.sqrt(float(first @ first)) * math.sqrt(float(other @ other))
        return float(first @ other) / size if size else 0.0

    def _against(
        self, words: Sequence[str], others: tuple[str, ...], table: Sequence[float], codes: frozenset[str]
    ) -> list[tuple[str, float]]:
        """What each of some words counts that stand in one text alone. others: the words of the other text. codes: of
        the text that has the words, and its symbols."""
        weights = self.weights
        rows = [
            -1 if word in codes or word in NEGATIONS or has_digit(word) or _counts(word) else self.row.get(word, -2)
            for word in words
        ]
        known = [row for row in rows if row >= 0]
        vectors = self._read(others)[0]
        best = iter(())
        if known and len(vectors):
            best = iter((self.vectors[known].astype(np.float32) @ vectors.T).max(axis=1).tolist())
        terms = []
        for word, row in zip(words, rows, strict=True):
            if row < 0:
                terms.append((word, weights.digits if row == -1 else weights.unknown))
            else:
                near = next(best, -SCALE * SCALE) / (SCALE * SCALE)
                terms.append((word, table[row] / (1 + math.exp(weights.steep * (near - weights.least)))))
        return terms

    def _asked_for(self, rest: str, speaks: float | None) -> str:
        """The clause of a message's rest that asks for something to be done with the question, or "".

        rest, speaks: see `verdict`.
        """
        rest = _SENTENCE.sub(self._unless_apart, rest)
        nats = self._task_words.nats(rest)
        if nats < WORDED if speaks is None else nats + speaks < TASK:
            return ""
        return max((" ".join(clause) for clause in read(rest).clauses), key=self._task_words.nats, default="")

    def _unless_apart(self, sentence: regex.Match[str]) -> str:
        """Nothing in place of a question that can be asked by itself; else the sentence."""
        if not sentence[0].endswith("?") or PLACE in sentence[0]:
            return sentence[0]
        text = read(sentence[0])
        content = {word for word in text.words if len(word) > 1 and not has_digit(word)} - text.names - LITTLE
        apart = len(content) > 1 and POINTERS.isdisjoint(text.words) and all(word in self.row for word in content)
        return " " if apart else sentence[0]


def _exchange(a: Reading, b: Reading, shared: set[str]) -> tuple[str, str] | None:
    """The two words in which texts differ that are the same else; "log in" and "log out" are two questions."""
    if len(a.words) != len(b.words):
        return None
    pairs = [(x, y) for x, y in zip(a.words, b.words, strict=True) if x != y]
    if len(pairs) != 1 or shared & set(pairs[0]) or LITTLE.issuperset(pairs[0]):
        return None
    return pairs[0]


def _turned(a: Reading, b: Reading, same: bool) -> bool:
    """Whether two words have changed places around a word that makes a difference of it: "PDF to Word" and "Word to
    PDF", "5 kg in pounds" and "5 pounds in kg". same: whether the texts have the same words but for little ones; then
    others may stand between the two."""
    amounts, others = _amounts(a.words), _amounts(b.words)
    if any(amounts[digits].isdisjoint(others[digits]) for digits in amounts.keys() & others.keys()):
        return True
    for verb in _DIRECTED.intersection(a.words).intersection(b.words):
        if a.words.count(verb) + b.words.count(verb) > 2:
            continue  # which stands for which is not known: "what do I need to bring to renew it" has two
        first, other = _sides(a.words, verb), _sides(b.words, verb)
        if first.passive != other.passive:
            continue
        left, right = first.before[-1:], first.after[:1]
        if left and right and left != right and (left, right) == (other.after[:1], other.before[-1:]):
            return True
        if same and first.only_before & other.only_after and first.only_after & other.only_before:
            return True
    ends = [[_behind(text.words, word) for word in ("from", "to")] for text in (a, b)]
    return ends[0] == ends[1][::-1] != ends[1] and "" not in ends[0]


def _numbers_moved(a: Reading, b: Reading) -> bool:
    """Whether two texts have the same numbers in other places: "season 2, episode 5" and "season 5, episode 2", "10 mod
    3" and "3 mod 10", or one of them more often where something is calculated."""
    first, other = _numbers(a.words), _numbers(b.words)
    if first == other or set(first) != set(other):
        return False
    if sorted(first) != sorted(other):
        return not _CALCULATES.isdisjoint(a.codes & b.codes)
    blanks = [["" if number(word) or has_digit(word) else word for word in text.words] for text in (a, b)]
    if blanks[0] == blanks[1]:
        return True
    beside, others = _beside_numbers(a.words), _beside_numbers(b.words)
    return any(beside[word].isdisjoint(others[word]) for word in beside.keys() & others.keys())


def _names_moved(a: Reading, b: Reading) -> bool:
    """Whether two texts differ in that names have changed places, and none of their words says that it makes no
    difference: "What did Ann give Bob?" and "What did Bob give Ann?"."""
    names = a.names | b.names
    if a.words == b.words or not _EITHER_WAY.isdisjoint(a.words):
        return False
    (blanks, first), (other_blanks, other) = (_without_names(text.words, names) for text in (a, b))
    return blanks == other_blanks and first != other and sorted(first) == sorted(other)


def _without_names(
    words: tuple[str, ...], names: frozenset[str]
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Words in runs with () for each of names, and the runs of names."""
    runs = [(is_name, tuple(run)) for is_name, run in groupby(words, names.__contains__)]
    return [() if is_name else run for is_name, run in runs], [run for is_name, run in runs if is_name]


def _numbers(words: tuple[str, ...]) -> list[str]:
    """The numbers among words, in digits."""
    return [number(word) or word for word in words if number(word) or has_digit(word)]


def _beside_numbers(words: tuple[str, ...]) -> dict[str, set[str]]:
    """The numbers right before or behind each word, but for little words and numbers."""
    beside: dict[str, set[str]] = {}
    for pair in pairwise(words):
        for word, near in (pair, pair[::-1]):
            if (digits := _numbers((near,))) and not _numbers((word,)) and word not in LITTLE:
                beside.setdefault(word, set()).update(digits)
    return beside


def _behind(words: tuple[str, ...], word: str) -> str:
    """The first word behind another that stands once, little ones left out, or ""."""
    if words.count(word) != 1:
        return ""
    return next((after for after in words[words.index(word) + 1 :] if after not in LITTLE), "")


def _amounts(words: tuple[str, ...]) -> dict[str, set[str]]:
    """The units of each number: the one behind it, or the currency before it. "A foot" is one."""
    amounts: dict[str, set[str]] = {}
    for first, second in pairwise(words):
        if unit(second) and (digits := "1" if first in ("a", "an") else number(first) or first * has_digit(first)):
            amounts.setdefault(digits, set()).add(unit(second))
        if unit(first) in CURRENCIES and has_digit(second):
            amounts.setdefault(second, set()).add(unit(first))
    return amounts


class _Sides(NamedTuple):
    """The words around a word, little ones left out. passive: whether it is a verb that "by" follows."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    passive: bool

    @property
    def only_before(self) -> set[str]:
        return set(self.before).difference(self.after)

    @property
    def only_after(self) -> set[str]:
        return set(self.after).difference(self.before)


def _sides(words: tuple[str, ...], verb: str) -> _Sides:
    """What stands around the last place of a word."""
    at = len(words) - 1 - words[::-1].index(verb)
    before, after = (tuple(word for word in part if word not in LITTLE) for part in (words[:at], words[at + 1 :]))
    return _Sides(before, after, verb in _PASSIVE and "by" in words[at:])


def _codes(text: Reading) -> frozenset[str]:
    """Words that are a code or a part of one, though they are little words else: the A of "form A-21" and "Plan A"."""
    words = text.words
    return text.codes | frozenset(word for word, after in pairwise(words) if len(word) == 1 and has_digit(after))


def _akin(a: str, b: str) -> bool:
    """Whether two words begin alike, as those of a land and its language do."""
    return a[:4] == b[:4] and len(a) > 3


_KINDS = {"who": "who", "whom": "who", "whose": "who", "where": "where", "when": "when"}


def _other_kind(a: Reading, b: Reading) -> bool:
    """Whether the first word that asks is another kind of word in each of two questions: a person, a place, a time."""
    kinds = [next((_KINDS[word] for word in reading.words if word in _KINDS), "") for reading in (a, b)]
    return "" not in kinds and kinds[0] != kinds[1]


@lru_cache(maxsize=1 << 16)
def has_digit(word: str) -> bool:
    """Whether a word is a number, or a code with one in it.

    word: as `read` gives it.
    """
    return any(c.isdigit() for c in word)


def _counts(word: str) -> bool:
    """Whether a word is an ordinal that nobody leaves out, as in "the third president". "First" and "second" are."""
    return number(word)[-2:] in ("rd", "th")


def _heaviest(terms: list[tuple[str, float]]) -> Terms:
    return tuple(sorted(terms, key=lambda term: -term[1]))


def _inflected(a: str, b: str) -> bool:
    """Whether one of two words is the other with an ending of English grammar."""
    if a[:2] != b[:2]:  # most pairs: this is asked of every two words
        return False
    short, long = (a, b) if len(a) <= len(b) else (b, a)
    if len(short) < 3 or has_digit(long):
        return False
    stem = short.removesuffix("e")
    return long in (short + "s", short + "es", short + "ed", stem + "ed", short + "ing", stem + "ing")


def _derived(a: str, b: str) -> bool:
    """Whether two words begin alike for the most part, and long enough for that to be a stem."""
    if a[:6] != b[:6]:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return start >= 6 and 5 * start >= 3 * max(len(a), len(b)) and not (has_digit(a) or has_digit(b))


def _elided(a: str, b: str) -> bool:
    """Whether one of two words is the other behind what an apostrophe parts from it elsewhere: "Loreal", "OConnor"."""
    short, long = sorted((a, b), key=len)
    return len(short) > 4 and long[0] in "dlo" and long[1:] == short


def _misspelt(a: str, b: str) -> bool:
    """Whether two words differ in one letter, or in the order of two, and are long enough for that to be a slip: the
    first letter of a shorter word is none."""
    if abs(len(a) - len(b)) > 1 or (a[0] != b[0] and len(a) < _LONG) or has_digit(a) or has_digit(b):
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    x, y = a[start:], b[start:]
    if len(x) > 1 and x[:2] == y[1::-1] and x[2:] == y[2:]:
        return len(a) >= 4
    return min(len(a), len(b)) >= 5 and (x[1:] == y[1:] or x[1:] == y or x == y[1:])


@cache
def shipped_judge() -> Judge:
    """The judge that comes with the library, read once. Raises StoreError where its file is damaged."""
    return Judge.of_bytes((files("memoir_retrieval") / "data" / TABLE).read_bytes())


def judge_named(name: str, store: Path) -> Judge | None:
    """The judge that a store's manifest names, or None where it names none: then masks alone decide.

    name: version and digest, as `Judge.name`; "" for none.
    store: folder of the store, for the error.
    Raises StoreMismatch where that is not the judge that comes with the library.
    """
    if not name:
        return None
    judge = shipped_judge()
    if judge.name != name:
        raise StoreMismatch(
            f"store {store} was made with judge {name}, this memoir-retrieval has {judge.name}: install the version it "
            f"was made with, or change its judge with `memoir calibrate {store} --write`"
        )
    return judge
