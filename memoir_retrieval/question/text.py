"""One form for texts that read alike but were typed, pasted or exported differently."""

from __future__ import annotations

import unicodedata
from typing import Literal

import regex

__all__ = ["MARKS", "normalize", "plain_text", "text_key"]

MARKS = 30
"""Combining marks in a row that are kept; Unicode's stream-safe format has this limit, and no language comes near."""
# The two kana marks are letters here, and combining marks once they are normalized.
_SURPLUS = regex.compile(rf"([\p{{M}}\uFF9E\uFF9F]{{{MARKS}}})[\p{{M}}\uFF9E\uFF9F]+")

# Soft hyphen, zero-width space, word joiner, byte order mark and marks of direction. The zero-width joiners stay: they
# change what is read in Persian, in Indian scripts and in emoji.
_INVISIBLE = dict.fromkeys(
    [0x00AD, 0x061C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060, *range(0x2066, 0x206A), 0xFEFF], ""
)
_SPACES = dict.fromkeys([0x00A0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F], " ")
_HYPHENS = dict.fromkeys([0x2010, 0x2011], "-")
_QUOTES = dict.fromkeys(range(0x2018, 0x201C), "'") | dict.fromkeys(range(0x201C, 0x2020), '"') | {0x3000: " "}
_EVERYWHERE = _INVISIBLE | _SPACES | _HYPHENS
_EAST_ASIAN = regex.compile(r"[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}]")


def normalize(text: str, form: Literal["NFC", "NFKC", "NFKD"]) -> str:
    """The Unicode normal form of a text, in time that grows with its length alone.

    Ordering combining marks takes quadratic time in a run of them, so of each run the first `MARKS` are kept.

    text: any text, half surrogate pairs included.
    form: which normal form.
    """
    return text if text.isascii() else unicodedata.normalize(form, _SURPLUS.sub(r"\1", text))


def plain_text(text: str) -> str:
    """A text as a keyboard writes it: composed letters, plain spaces, quotes and hyphens, nothing invisible.

    The typographic quotes and the wide space of Chinese and Japanese texts stay, as that is how these are typed. Runs
    of spaces stay too. A text of invisible characters alone comes back as it is.

    text: any text; ASCII comes back as it is.
    """
    plain = _plain(text)
    return plain if plain.strip() else text


def text_key(text: str) -> str:
    """What two texts have in common that are spellings of one: their plain form, with one space for each run of them.

    text: any text; what is invisible alone gives "".
    """
    return " ".join(_plain(text).translate(_QUOTES).split())


def _plain(text: str) -> str:
    if text.isascii():
        return text
    plain = normalize(text.translate(_EVERYWHERE), "NFC")
    return plain if _EAST_ASIAN.search(plain) else plain.translate(_QUOTES)
