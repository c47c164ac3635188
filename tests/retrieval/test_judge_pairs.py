"""Pairs of questions in which little differs: what of it makes another question, and what does not."""

from __future__ import annotations

import pytest

from memoir_retrieval.edits.judge import letters, read, shipped_judge
from memoir_retrieval.edits.units import unit

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
    ("Which key is played for C♯?", "Which key is played for C?"),
    ("What is 2^3?", "What is 2*3?"),
    ("What is 2^3?", "What is 2-3?"),
    ("Which x solves x^2 = 16?", "Which x solves x/2 = 16?"),
    ("Which x solves x^2 = 16?", "Which x solves x*2 = 16?"),
    ("What is 2 + 2?", "What is 2 + 2 + 2?"),
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
        ("What is 2^3?", "What is 2 ^ 3?"),
        ("Which key is played for C♯?", "Which key is played for C sharp?"),
        ("Which shops are *open* at 5 *today*?", "Which shops are open at 5 today?"),
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


@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        ("Who is allowed in the lab?", "Who isn't allowed in the lab?"),
        ("Which plants can grow in the shade?", "Which plants can't grow in the shade?"),
        ("Which plants will grow in the shade?", "Which plants won't grow in the shade?"),
    ],
)
def test_a_contracted_negation_is_one_in_any_writing(positive: str, negative: str) -> None:
    full = negative.replace("can't", "cannot").replace("won't", "will not").replace("n't", " not")
    for sign in "'’´`ʼ‘":
        for text in (negative.replace("'", sign), negative.upper().replace("'", sign)):
            assert apart(positive, text) and apart(positive.upper(), text)
            assert read(text).words == read(full).words and letters(text) == letters(negative)
    assert read("WON'T and ain´t").words == ("will", "not", "and", "ai", "not")
    assert read("Ann Lee´s and `Lee`").words == ("ann", "lee", "and", "lee")


@pytest.mark.parametrize("word", ["excluding", "lacking"])
def test_what_leaves_something_out_is_a_negation(word: str) -> None:
    assert apart("Which fees are due?", f"Which fees are due, {word} tax?")
    assert apart("Which plans come with support?", f"Which plans come {word} support?")


def test_who_is_excluded_is_not_who_is_in() -> None:
    assert apart("Who is in the national team?", "Who is excluded in the national team?")


@pytest.mark.parametrize(
    ("edit", "name", "other"),
    [
        ("Who won Super Bowl {}?", "XXIV", "XXVI"),
        ("Who was pope after John {}?", "XXIII", "XVIII"),
        ("Which team was the winner of Super Bowl {}?", "xxiv", "xxvi"),
        ("Which books did William {} write?", "Golding", "Gold"),
        ("Who was the spouse of Robert {}?", "Browning", "Brown"),
        ("How did Carl {} die?", "Starr", "Starred"),
        ("How many people live in {}?", "Dublin", "Lublin"),
        ("Who is the spouse of Jan {}?", "Keller", "Heller"),
        ("What is {} made of?", "methane", "ethane"),
    ],
)
def test_a_name_like_another_is_no_slip(edit: str, name: str, other: str) -> None:
    assert apart(edit.format(name), edit.format(other))
    assert alike(edit.format(name), edit.format(name.lower()))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Who discovered penicillin?", "Who discoverd penicilin?"),
        ("Who discovered penicillin?", "Who discovers penicillin?"),
        ("What is photosynthesis?", "What is ohotosynthesis?"),
        ("Who is Tom Edward's mother?", "Who is Tom Edwards mother?"),
        ("Which bird sings in the Amazon?", "Which birds sing in the Amazon?"),
    ],
)
def test_a_slip_or_another_form_of_a_word_is_no_other_question(a: str, b: str) -> None:
    assert alike(a, b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("What does Plan A cover?", "What exactly does Plan B cover?"),
        ("Which foods have vitamin A?", "What foods contain vitamin K?"),
        ("When did Elizabeth II die?", "In which year did Elizabeth I pass away?"),
        ("When did World War II end?", "In what year did World War I end?"),
        ("How did Henry V of England die?", "What did Henry IV of England die of?"),
        ("Tell me about hepatitis B.", "Please tell me something about hepatitis C."),
    ],
)
def test_a_single_capital_or_a_roman_numeral_is_a_code(a: str, b: str) -> None:
    assert apart(a, b)
    for question in (a, b):
        for text in (question.lower(), question.upper(), question.title().replace("Ii", "II").replace("Iv", "IV")):
            assert alike(question, text)


def test_one_text_with_capitals_is_enough() -> None:
    assert apart("What does Plan A cover?", "what exactly does plan b cover?")
    assert alike("What does Plan A cover?", "what exactly does plan a cover?")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Who shot John F. Kennedy?", "Who shot John Kennedy?"),
        ("Who shot John F Kennedy?", "Who shot John Kennedy?"),
        ("How do I cook rice?", "How to cook rice?"),
        ("WHAT IS A GOOD PLAN?", "What is good plan?"),
        ("What Is A Good Plan?", "What is good plan?"),
        ("What is an X-ray?", "What is an x-ray?"),
    ],
)
def test_an_initial_an_article_and_a_part_of_a_word_are_no_codes(a: str, b: str) -> None:
    assert alike(a, b)


@pytest.mark.parametrize(
    ("edit", "question", "words"),
    [
        ("Who {} the Acme factory?", "Which person {} the Acme factory?", ("bought", "sold")),
        ("Which shops are open {}?", "What shops are open {}?", ("yesterday", "today", "tomorrow")),
        ("What does it cost {} tax?", "How much does it cost {} tax?", ("including", "excluding")),
        ("Which {} won the cup?", "What {} were the winners of the cup?", ("boys", "girls")),
        ("Who were the {} of Gorbachev?", "Which people were {} of Gorbachev?", ("predecessors", "successors")),
        ("What is a {} lens?", "What do you call a {} lens?", ("convex", "concave")),
        ("What do {} carry?", "What is it that {} carry?", ("arteries", "veins")),
        ("Is it {} open on Mondays?", "On Mondays, is it {} open?", ("only", "also")),
        ("How long is a marathon in {}?", "What is the length of a marathon in {}?", ("km", "miles", "metres", "feet")),
        ("What is the weight of it in {}?", "How much does it weigh in {}?", ("kg", "pounds", "ounces")),
        ("What does a Big Mac cost in {}?", "How much is a Big Mac in {}?", ("euros", "dollars", "yen", "£")),
        ("How hot is it on Venus in {}?", "What is the heat on Venus in {}?", ("Celsius", "Fahrenheit", "kelvin")),
    ],
)
def test_an_opposite_or_another_unit_is_another_question(edit: str, question: str, words: tuple[str, ...]) -> None:
    for word in words:
        for other in set(words) - {word}:
            assert apart(edit.format(word), edit.format(other)) and apart(edit.format(word), question.format(other))


@pytest.mark.parametrize(("a", "b"), [("km", "kilometres"), ("lbs", "pounds"), ("€", "euros"), ("°C", "Celsius")])
def test_a_unit_and_its_sign_are_one(a: str, b: str) -> None:
    text = "What is the value of it in {}?"
    assert alike(text.format(a), text.format(b))
    assert unit("km") == unit("kilometers") == "kilometre" and unit("chair") == ""


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("How do I convert PDF to Word?", "How can I convert Word to PDF?"),
        ("How do I get from Berlin to Paris?", "How do I get to Berlin from Paris?"),
        ("Is there a night train from the Hague to Vienna?", "Is there a night train to the Hague from Vienna?"),
        ("When did Brazil beat Germany?", "In what year did Germany beat Brazil?"),
        ("When was Brazil defeated by Germany?", "When was Germany defeated by Brazil?"),
        ("What is 3 divided by 9?", "What is 9 divided by 3?"),
        ("What is 9 minus 3?", "What is 3 minus 9?"),
        ("How many kg is 5 pounds?", "How many pounds is 5 kg?"),
        ("Is Everest higher than K2?", "Is K2 higher than Everest?"),
        ("What is the train from Oslo to Bergen?", "What is the train from Bergen to Oslo?"),
        ("Which train goes to Oslo from Bergen?", "Which train goes to Bergen from Oslo?"),
        ("Who flew from New York to San Francisco?", "Who flew from San Francisco to New York?"),
    ],
)
def test_two_words_that_change_places_make_another_question(a: str, b: str) -> None:
    assert apart(a, b) and apart(a.lower(), b.upper())


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("When did Brazil defeat Germany?", "When was Germany defeated by Brazil?"),
        ("When did Brazil beat Germany?", "When was Germany beaten by Brazil?"),
        ("Was it Brazil that defeated Germany in 1990?", "Was it Germany that was defeated in 1990 by Brazil?"),
        ("Who defeated Brazil in 2014?", "Who was Brazil defeated by in 2014?"),
        ("How far is the flight from Oslo to Bergen?", "From Oslo to Bergen, how far is the flight?"),
        ("How far is the flight from Oslo to Bergen?", "How far is the flight to Bergen from Oslo?"),
        ("How much is 5 kg in pounds?", "How many pounds is 5 kilograms?"),
        ("On which organ was it made to be played on?", "On which oragn was it made to be played on?"),
        ("Who moved to Paris in 1990?", "In 1990, who moved to Paris?"),
        ("Is Everest higher than K2?", "Than K2, is Everest higher?"),
        ("How do I convert PDF to Word?", "How to convert PDF to Word?"),
        ("How do I get from Berlin to Paris?", "How do I get to Paris from Berlin?"),
    ],
)
def test_another_order_around_them_is_the_same_question(a: str, b: str) -> None:
    assert alike(a, b)


@pytest.mark.parametrize(
    ("edit", "question"),
    [
        ("What do I need to bring to renew my passport?", "To renew my passport, what do I need to bring?"),
        ("How do I get to the airport to catch my flight?", "To catch my flight, how do I get to the airport?"),
        ("Who founded L'Oreal?", "Who founded Loreal?"),
        ("Where is L'Aquila?", "Where is Aquila?"),
        ("Who is Flannery O'Connor?", "Who is Flannery Connor?"),
        ("When did World War II end?", "When did the Second World War end?"),
        ("Who was Pope John Paul II?", "Who was Pope John Paul the second?"),
        ("What is 10/2?", "What is 10 / 2?"),
        ("What is 12 ÷ 4?", "What is 12/4?"),
        ("What happened on 9/11?", "What happened on 9 / 11?"),
        ("How much is 7 times 8?", "How much is 7 x 8?"),
        ("How much is 7 multiplied by 8?", "How much is 7 × 8?"),
        ("How much is £5 in dollars?", "How much is 5 pounds in dollars?"),
        ("How many inches are in a foot?", "How many inches does one foot have?"),
    ],
)
def test_another_writing_is_the_same_question(edit: str, question: str) -> None:
    assert shipped_judge().verdict(edit, question).same
    assert shipped_judge().verdict(question, edit).same


@pytest.mark.parametrize(
    ("edit", "question"),
    [
        ("How much is £5 in dollars?", "How much is $5 in pounds?"),
        ("How much is $20 in euros?", "How much is €20 in dollars?"),
        ("How many inches are in a foot?", "How many feet are in an inch?"),
        ("How many feet are in a mile?", "How many miles are in a foot?"),
        ("When did World War II end?", "When did the First World War end?"),
        ("What is Plan A's aim?", "What exactly is Plan B's aim?"),
    ],
)
def test_the_other_way_round_is_another_question(edit: str, question: str) -> None:
    assert not shipped_judge().verdict(edit, question).same
    assert not shipped_judge().verdict(question, edit).same


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("What is √16?", "What is 16?"),
        ("What happens in season 2 episode 5 of Lost?", "What happens in season 5 episode 2 of Lost?"),
        ("What happened on 03/04/2020?", "What happened on 04/03/2020?"),
        ("Who won the match 2-1?", "Who won the match 1-2?"),
        ("What is 10 mod 3?", "What is 3 mod 10?"),
        ("What is 2^3?", "What is 3^2?"),
        ("What do 2 adults and 5 children pay?", "What do 5 adults and 2 children pay?"),
        ("What did Ann give Bob?", "What did Bob give Ann?"),
        ("When did Ann Lee sue Bob Ray?", "When did Bob Ray sue Ann Lee?"),
    ],
)
def test_numbers_and_names_in_other_places_are_apart(a: str, b: str) -> None:
    assert apart(a, b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("What happens in season 2 episode 5 of Lost?", "What happens in episode five of season two of Lost?"),
        ("Who won the 20th World Cup in 2014?", "In 2014, who won the 20th World Cup?"),
        ("What happened on March 3 2020?", "What happened on 3 March 2020?"),
        ("Who won the World Cup 2014?", "Who won the World Cup 2014? I mean 2014."),
        ("How far is it between Rome and Oslo?", "How far is it between Oslo and Rome?"),
        ("What did Ann Lee give Bob?", "What did Ann Lee give to Bob?"),
    ],
)
def test_numbers_and_names_that_stay_in_their_places_are_alike(a: str, b: str) -> None:
    assert alike(a, b)


@pytest.mark.parametrize(
    ("a", "b"), [("バス", "パス"), ("カス", "ガス"), ("ม้า", "มา"), ("कर्म", "करम"), ("мой", "мои"), ("їх", "іх")]
)
def test_a_mark_that_makes_another_letter_is_no_accent(a: str, b: str) -> None:
    assert apart(a, b) and letters(a) != letters(b) and read(a).words != read(b).words


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("café", "cafe"),
        ("Việt", "Viet"),
        ("ещё", "еще"),
        ("за\u0301мок", "замок"),
        ("ῥόδον", "ροδον"),
        ("שָׁלוֹם", "שלום"),
        ("كَتَبَ", "كتب"),
        ("ﾊﾞｽ", "バス"),
        ("ha\u00adus", "haus"),
        ("ha\u200bus", "haus"),
        ("5\ufe0f\u20e3", "5"),
        ("❤️", "❤"),
    ],
)
def test_accents_and_what_is_invisible_make_no_other_word(a: str, b: str) -> None:
    assert alike(a, b) and letters(a) == letters(b) and read(a).words == read(b).words


def test_many_names_take_no_cubic_time() -> None:
    """250 names took 3 s for one verdict, and this is 24 of them: no clock is asked, the suite's timeout ends it."""
    syllables = [first + last for first in "bdfgkmnprst" for last in "aeiou"]
    names = [f"{a}{b}{a}l" for a in syllables for b in syllables]
    for at in range(24):
        mine, theirs = names[at : at + 250], names[at + 300 : at + 550]
        edit = f"Who met {' and '.join(name.title() for name in mine)} in Rome?"
        assert not JUDGE.verdict(edit, f"Who met {' and '.join(theirs)} in Rome?").same


def test_texts_without_words_are_compared_by_their_signs() -> None:
    assert apart("😀", "!!!") and apart("!!!", "???")
    assert alike("😀", " 😀") and alike("!!!", "!!! ")
