"""Numbers as people write them: "ninth" is "9th", and "nine" is 9; and the signs beside them, as words."""

from __future__ import annotations

from functools import lru_cache

import regex

__all__ = ["digits_joined", "number", "other_number", "raised_apart", "roman", "signs_in_words"]

_UNITS = """one first two second three third four fourth five fifth six sixth seven seventh eight eighth nine ninth ten
tenth eleven eleventh twelve twelfth thirteen thirteenth fourteen fourteenth fifteen fifteenth sixteen sixteenth
seventeen seventeenth eighteen eighteenth nineteen nineteenth"""
_TENS = """twenty twentieth thirty thirtieth forty fortieth fifty fiftieth sixty sixtieth seventy seventieth eighty
eightieth ninety ninetieth"""
_UNIT_WORDS, _TEN_WORDS = _UNITS.split(), _TENS.split()
_PLAIN = regex.compile(r"\d+(?:st|nd|rd|th)?")
_JOINED = regex.compile(rf"\b(?:{'|'.join(_TEN_WORDS[::2])})-(?:{'|'.join(_UNIT_WORDS[:18])})\b")

_RAISED = regex.compile(r"(?<=\d)(?=\p{No})")

_SPACE = r"[^\S\n]{0,2}"
_BEFORE, _BEHIND = rf"(?<=[\d)%\p{{Sc}}]{_SPACE})", rf"(?={_SPACE}[-−]?[\d(\p{{Sc}}])"
_COMPARES = rf"(?<=[\d)]{_SPACE}|[\p{{L}}\d)][^\S\n]{{1,2}})"
# The first that fits a place counts. A dash that is no minus, a bullet or a quotation mark of mails stays a sign.
_SIGNS = {
    rf"{_BEFORE}\+(?={_SPACE}\p{{L}}\b)|(?<=\b\p{{L}}{_SPACE})\+{_BEHIND}|{_BEFORE}\+{_BEHIND}": "plus",
    r"(?<=^|[\s(=<>+×÷*])(?<!\d[^\S\n]{1,2})[-−–](?=\p{Sc}?\d)": "minus",
    rf"{_BEFORE}[×*]{_BEHIND}|(?<=\b\p{{L}})[×*](?=\d)|(?<=\d)[×*](?=\p{{L}}\b)|(?<=\d{_SPACE})x(?={_SPACE}\d)"
    r"|(?i:\bmultiplied by\b)": "times",
    rf"(?<=[\p{{L}}\d)]{_SPACE})\^(?={_SPACE}[-−]?[\p{{L}}\d(])": "power",
    rf"{_BEFORE}÷{_BEHIND}|(?<=(?i:\b(?:is|calculate|compute|solve))\s{{1,2}}[\d.,]{{1,12}}{_SPACE})/(?={_SPACE}\d)"
    r"|(?<=\b[nxyzNXYZ])[÷/](?=\d)|(?<=\d)[÷/](?=[nxyzNXYZ]\b)": "divided by",  # else it may be a date
    rf"{_COMPARES}>{_BEHIND}": "greater than",
    rf"{_COMPARES}<{_BEHIND}": "less than",
    rf"{_COMPARES}(?:>=|≥){_BEHIND}": "at least",
    rf"{_COMPARES}(?:<=|≤){_BEHIND}": "at most",
    rf"{_COMPARES}(?:!=|≠){_BEHIND}": "not",
    r"[%％](?![\p{L}\p{N}])|(?i:\bper cent\b)": "percent",
    r"€": "euro",
    r"[$＄](?!\p{L})": "dollar",
    r"[£￡](?!\p{L})": "pound",
    r"[¥￥]": "yen",
    r"₹": "rupee",
    r"₽": "rouble",
    r"₩": "krw",
    r"₺": "lira",
    r"(?<=\b[A-Ga-g])♯": "sharp",
    r"(?<=\b[A-Ga-g])♭": "flat",
}
_SIGN = regex.compile("|".join(f"({pattern})" for pattern in _SIGNS), regex.MULTILINE)
_SIGN_WORDS = tuple(f" {word} " for word in _SIGNS.values())


_ONES = ("", "i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix")
_ROMAN_VALUES = {"x" * (n // 10) + _ONES[n % 10]: n for n in range(40) if n not in (0, 1, 5, 10)}


def _words() -> dict[str, str]:
    """The digits of every number below 100 that is written as words, such as "twenty-first"."""
    values = {}
    for first, step, words in ((1, 1, _UNIT_WORDS), (20, 10, _TEN_WORDS)):
        for place, word in enumerate(words):
            values[word] = first + step * (place // 2), place % 2 == 1
    for ten in _TEN_WORDS[::2]:
        for unit in _UNIT_WORDS[:18]:
            values[f"{ten}-{unit}"] = values[ten][0] + values[unit][0], values[unit][1]
    return {word: f"{value}{_ending(value) if ordinal else ''}" for word, (value, ordinal) in values.items()}


def _ending(value: int) -> str:
    return "th" if 10 < value < 20 else {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th")


_DIGITS = _words()


@lru_cache(maxsize=1 << 16)
def number(word: str) -> str:
    """The digits of a number, with the ending of an ordinal; "" for a word that is none.

    word: in lower case.
    """
    return _DIGITS.get(word, "") or (word if _PLAIN.fullmatch(word) else "")


def roman(word: str) -> int:
    """The value of a Roman numeral of two letters or more, up to 39; 0 for a word that is none.

    word: in lower case.
    """
    return _ROMAN_VALUES.get(word, 0)


def other_number(a: str, b: str) -> bool:
    """Whether two words are numbers of one kind, both ordinals or neither, and not the same.

    a, b: in lower case.
    """
    first, other = number(a), number(b)
    return "" not in (first, other) and first != other and first[-1].isalpha() == other[-1].isalpha()


def digits_joined(text: str) -> str:
    """A text in which digits stand for numbers of two words and a hyphen, such as "twenty-first".

    text: in lower case.
    """
    return _JOINED.sub(lambda match: _DIGITS[match[0]], text)


def raised_apart(text: str) -> str:
    """A text with a space between a digit and what is raised or a fraction behind it, as in "10²" and "2½". Unicode's
    compatible forms alone would make the numbers 102 and 21 of them.

    text: any.
    """
    return _RAISED.sub(" ", text)


def signs_in_words(text: str) -> str:
    """A text with words for the signs that tell numbers apart: currencies, %, a minus, what calculates or compares. The
    dash of a range, a date or a list is none of them.

    text: any.
    """
    return _SIGN.sub(lambda match: _SIGN_WORDS[match.lastindex - 1], text)
