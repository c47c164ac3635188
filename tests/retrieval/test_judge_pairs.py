"""Pairs of questions in which little differs: what of it makes another question, and what does not."""

from __future__ import annotations

import pytest

from memoir_retrieval.edits.judge import letters, read, shipped_judge

JUDGE = shipped_judge()


def apart(a: str, b: str) -> bool:
    """Whether neither question is the other's."""
    return not JUDGE.verdict(a, b).same and not JUDGE.verdict(b, a).same


def alike(a: str, b: str) -> bool:
    """Whether each question is the other's."""
    return JUDGE.verdict(a, b).same and JUDGE.verdict(b, a).same


SIGNS = [
    ("Does water freeze at 5 °C?", "Does water freeze at -5 °C?"),
    ("Is it colder than 10 degrees in Oslo?", "Is it colder than −10 degrees in Oslo?"),
    ("Does water freeze at 5 °C?", "At minus five °C, does water freeze?"),
    ("What is 5 + 3?", "What is 5 - 3?"),
    ("What is 5+3?", "What is 5×3?"),
    ("What is x + 3?", "What is x - 3?"),
    ("What is 9 / 3?", "What is 9 - 3?"),
    ("Is 5 > 3?", "Is 5 < 3?"),
    ("Who may ride at an age >12?", "Who may ride at an age <12?"),
    ("Is 5 ≥ 3?", "Is 5 ≤ 3?"),
    ("How much is 100 € in yen?", "How much is 100 $ in yen?"),
    ("What can I buy for $20?", "What can I buy for £20?"),
    ("What is 20 % of 50?", "What is 20 of 50?"),
    ("What does 👍 mean?", "What does 👎 mean?"),
    ("Which key is played for C♯?", "Which key is played for C♭?"),
]


@pytest.mark.parametrize(("a", "b"), SIGNS)
def test_a_sign_that_tells_numbers_apart_is_a_word(a: str, b: str) -> None:
    assert apart(a, b)
    for question in (a, b):
        assert JUDGE.verdict(question, question.lower()).same and letters(question) == letters(question.upper())


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("What is 5+3?", "What is 5 + 3?"),
        ("What is 20% of 50?", "What is 20 per cent of 50?"),
        ("How much is $100 in yen?", "How much is 100 dollars in yen?"),
        ("Does water freeze at -5 °C?", "Does water freeze at –5 °C?"),
        ("Does water freeze at -5 °C?", "Does water freeze at minus 5 C?"),
        ("What does 👍 mean?", "What does 👍🏽 mean? 😊"),
        ("Who is the mother of Ann Lee?", "Who is the mother of Ann Lee? 🙏"),
        ("Who is the mother of Ann Lee?", "- Who is the mother of Ann Lee?"),
        ("Who is the mother of Ann Lee?", "> Who is the mother of **Ann Lee**?"),
        ("What happened on 2020-05-01?", "What happened on 2020–05–01?"),
        ("Who fought in the war of 1914-1918?", "Who fought in the war of 1914 – 1918?"),
        ("Which flat is in a well-known street?", "Which flat is in a well known street?"),
        ("Who founded Acme™?", "Who founded Acme®?"),
        ("Where are 24/7 shops and/or cafés?", "Where are 24/7 shops and / or cafés?"),
    ],
)
def test_other_signs_and_other_writings_of_these_are_no_words(a: str, b: str) -> None:
    assert alike(a, b)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("C++17, C# or .NET at 18+", ("c++", "17", "c#", "or", "net", "at", "18+")),
        ("5+3, -5 and $HOME", ("5", "plus", "3", "minus", "5", "and", "home")),
        ("100% of foo%20bar <b>5</b>", ("100", "percent", "of", "foo", "20bar", "b", "5", "b")),
    ],
)
def test_a_sign_within_a_word_stays_with_it(text: str, words: tuple[str, ...]) -> None:
    assert read(text).words == words


def test_letters_have_the_signs_that_are_words() -> None:
    for a, b in SIGNS[:3]:
        assert letters(a) != letters(b)
    assert letters("5+3 = 20 %") == letters("5 + 3: 20%") == "5plus320percent"
    assert letters("1914-1918") == letters("1914 – 1918") == "19141918"


def test_signs_take_no_quadratic_time() -> None:
    """Quadratic time would be minutes for these texts, so no clock is asked: the suite's timeout ends it."""
    for sign in ("5+", "-5", " -", "5 < ", "% ", "$-", "I "):
        assert len(read(sign * 4000).words) <= 512
