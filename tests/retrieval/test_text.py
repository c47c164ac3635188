"""Texts that read alike have one form, made in bounded time."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memoir_retrieval.question.text import MARKS, normalize, plain_text, text_key

PLAIN = 'Who leads "Éclair\'s" e-shop?'
SPELLINGS = {
    "no-break space": 'Who\u00a0leads "Éclair\'s" e-shop?',
    "narrow no-break space": 'Who\u202fleads "Éclair\'s" e-shop?',
    "decomposed": unicodedata.normalize("NFD", PLAIN),
    "typographic quotes": "Who leads “Éclair’s” e-shop?",
    "low quotes": "Who leads „Éclair’s“ e-shop?",
    "no-break hyphen": 'Who leads "Éclair\'s" e\u2011shop?',
    "zero-width space": 'Who leads "Éc\u200blair\'s" e-shop?',
    "soft hyphen": 'Who leads "Éc\u00adlair\'s" e-shop?',
    "byte order mark": '\ufeffWho leads "Éclair\'s" e-shop?',
    "mark of direction": 'Who leads \u200e"Éclair\'s" e-shop?',
}


@pytest.mark.parametrize("text", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings_of_one_question_have_one_form(text: str) -> None:
    assert text != PLAIN and plain_text(text) == PLAIN and text_key(text) == text_key(PLAIN)


@pytest.mark.parametrize(
    "text",
    [
        " Who  leads it?\n",
        "10² or 10₂?",
        "ﬁve",
        "می‌خواهم",
        "👩‍💻",
        "它叫“北风”吗？",
        "北　風",
        "« Qui ? »",
        "5′ 10″",
        "\ud83d",
        "\u200b",
    ],
)
def test_what_changes_the_reading_stays(text: str) -> None:
    assert plain_text(text) == text


def test_quotes_of_chinese_are_of_one_question_with_plain_ones() -> None:
    assert text_key("它叫“北风”吗？") == text_key('它叫"北风"吗？')


@given(st.text())
def test_a_plain_text_is_its_own_plain_form(text: str) -> None:
    assert plain_text(plain_text(text)) == plain_text(text)
    assert text_key(text) == text_key(plain_text(text)) == text_key(f" {text}\n")


@given(st.text(st.sampled_from("ae\u0301\u0323\u0f74\u0344")))
def test_texts_of_few_marks_have_the_normal_form(text: str) -> None:
    short = text[:MARKS]
    assert normalize(short, "NFC") == unicodedata.normalize("NFC", short)
    assert normalize(short, "NFKC") == unicodedata.normalize("NFKC", short)


def test_marks_in_a_row_are_bounded_for_every_character_that_becomes_one() -> None:
    """What is left of a run never has more marks than each of those kept decomposes into."""
    for code in range(sys.maxunicode + 1):
        if not 0xD800 <= code < 0xE000 and unicodedata.combining(unicodedata.normalize("NFKD", chr(code))[0]):
            assert len(normalize("a" + 300 * (chr(code) + "\u0301"), "NFKC")) <= 3 * MARKS + 1, hex(code)


@pytest.mark.parametrize("marks", ["\u0301\u0323", "\uff9e\u0323", "\u0344\u0f71"])
def test_a_million_marks_take_no_quadratic_time(marks: str) -> None:
    """Quadratic time would be hours for this text, so no clock is asked: the suite's timeout ends it."""
    text = "a" + marks * 500_000
    assert len(plain_text(text)) < 4 * MARKS and len(normalize(text, "NFKC")) < 4 * MARKS
