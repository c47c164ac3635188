"""Draw docs/pictures/messages.svg from the tables of docs/measurements/quality.md. `--check` only compares.

python docs/make_pictures.py [--check]
"""

from __future__ import annotations

import re
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
PAGE = FOLDER / "measurements" / "quality.md"
PICTURE = FOLDER / "pictures" / "messages.svg"
SECTION = "## Messages as people write them"
WIDTH, LEFT, RIGHT = 860, 330, 60
BEFORE, AFTER, WRONG = "#b0bec5", "#3949ab", "#c62828"


class Row(NamedTuple):
    """A bar or two of the picture.

    label: beside them.
    message: how the row of the table begins.
    number: which of the percentages in a cell counts, from 0; a cell with one percentage has it for all.
    """

    label: str
    message: str
    number: int = 0


ASKING = (
    Row("the edit's question, alone", "the edit's question, alone"),
    Row("after a time stamp, talk or passages, in a log", "after a time stamp"),
    Row("in an agent's prompt, before “reply in JSON”", "in an agent's prompt"),
    Row("in an e-mail", "in an e-mail"),
    Row("in quotes, reported of somebody", "in quotes"),
    Row("in lower case", "lower case"),
    Row("in UPPER CASE", "lower case", 1),
    Row("again, after the model's own answer", "again after the model's own answer"),
    Row("a rephrasing", "a rephrasing"),
    Row("beside an unedited question", "beside an unedited question"),
    Row("with a slip in the name", "a slip in a common word", 1),
    Row("after examples, or after a German line", "after examples"),
)
NOT_ASKING = (
    Row("an unrelated prompt", "the library's prompts"),
    Row("the same question about another name", "the same question about another name"),
    Row("another question about the same name", "another question about the same name"),
    Row("an opposite, a negation, another year", "an opposite"),
    Row("“translate it”, “name its topic” and nine more tasks", "correct, rewrite"),
    Row("unseen tasks", "**unseen tasks**"),
    Row("“translate it”, asked in Spanish", "*newest:* translate"),
)


def cells(message: str) -> list[str]:
    """The table's row that begins with a message, without that cell."""
    section = PAGE.read_text(encoding="utf-8").split(SECTION)[1].split("\n## ")[0]
    (row,) = re.findall(rf"^\| ({re.escape(message)}.*) \|$", section, re.M)
    return row.split(" | ")[1:]


def share(cell: str, number: int) -> int:
    """A percentage of a cell; also of counts, such as "0 of 128"."""
    shares = [int(text) for text in re.findall(r"(\d+) %", cell)]
    shares = shares or [round(100 * int(a) / int(b)) for a, b in re.findall(r"(\d+) of (\d+)", cell)]
    return shares[number] if len(shares) > 1 else shares[0]


def picture() -> str:
    """The whole SVG."""
    body: list[str] = []
    y = _heading(body, 30, "asks for an edit: how often it gets that edit (more is better)")
    for row in ASKING:
        now, before = (share(cell, row.number) for cell in cells(row.message)[:2])
        _label(body, y + 13, row.label)
        _bar(body, y, now, AFTER)
        _bar(body, y + 10, before, BEFORE)
        y += 28
    y = _heading(body, y + 26, "asks for something else: how often it gets an edit (less is better)")
    for row in NOT_ASKING:
        _label(body, y + 8, row.label)
        _bar(body, y, share(cells(row.message)[0], row.number), WRONG)
        y += 20
    _legend(body, y + 20)
    title = "How often messages get the edit that they ask for, and how often others get one"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 44}" font-family="sans-serif" '
            f'font-size="13" role="img" aria-label="{title}">',
            f'<rect width="{WIDTH}" height="{y + 44}" rx="8" fill="#fafafa"/>',
            *body,
            "</svg>\n",
        ]
    )


def _heading(body: list[str], y: int, text: str) -> int:
    """Returns where the bars begin."""
    body.append(f'<text x="20" y="{y}" font-weight="bold" fill="#263238">A message that {escape(text)}</text>')
    return y + 14


def _label(body: list[str], y: int, text: str) -> None:
    body.append(f'<text x="{LEFT - 10}" y="{y}" text-anchor="end" font-size="12" fill="#263238">{escape(text)}</text>')


def _bar(body: list[str], y: int, percent: int, colour: str) -> None:
    width = max(2, (WIDTH - LEFT - RIGHT) * percent // 100)
    body.append(f'<rect x="{LEFT}" y="{y}" width="{width}" height="9" fill="{colour}"/>')
    body.append(
        f'<text x="{LEFT + width + 6}" y="{y + 8}" font-size="10" fill="#455a64">{percent} %</text>',
    )


def _legend(body: list[str], y: int) -> None:
    names = ((AFTER, "today"), (BEFORE, "when only the mask of the whole message counts"), (WRONG, "today, by mistake"))
    x = LEFT
    for colour, name in names:
        body.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{colour}"/>')
        body.append(f'<text x="{x + 15}" y="{y + 9}" font-size="11" fill="#455a64">{escape(name)}</text>')
        x += 34 + 6 * len(name)


def main() -> None:
    text = picture()
    if sys.argv[1:] == ["--check"]:
        if not PICTURE.is_file() or PICTURE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PICTURE} is not what {PAGE.name} says: run `python docs/make_pictures.py`")
        return
    PICTURE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
