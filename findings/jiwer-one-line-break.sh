#!/usr/bin/env bash
# jiwer 4.0.0 (rapidfuzz 3.14.6): a line break does not separate words, and two of them do.
#
# Seen: the word error rate of "Jane Doe" against "Jane Doe" is 0 where a space, two line breaks, or a space and a line
# break stand between the words, and 1.0 where one line break, tab or no-break space does. If the text with the line
# break is the reference, it is 2.0. A list of four words, one a line, has 1.0 against the four words in a row. The same
# holds of `mer`, `wil` and `wip`. No warning.
# Expected: 0 for the same words, or at least the same figure for one line break and for two.
# Cause: two or more white-space characters become one space; a single one stays as it is. Then words are what stands
# between spaces, so "Jane\nDoe" is one word.
# Why it matters here: chat models break lines in lists and addresses, and a target is often written in one line. By
# the word error rate a right answer is then as bad as a wrong one, and a blank line more or less moves the figure of
# an edit from 1 to 0. `" ".join(text.split())` of both texts counts words alone (docs/how-to/evaluation.md).
# Source: https://github.com/jitsi/jiwer/pull/129 (closed; 4.0.0 is as it was); its documentation of the default says
# that multiple spaces are filtered out
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jiwer==4.0.0 rapidfuzz==3.14.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import warnings
from importlib.metadata import version

import jiwer

warnings.simplefilter("error")
print("jiwer", version("jiwer"), "rapidfuzz", version("rapidfuzz"))


def rate(target, answer):
    value = jiwer.wer(target, answer)
    print(f"target {target!r}, answer {answer!r}: word error rate {value}")
    return value


for gap in (" ", "\n\n", " \n", "\t\t", "\r\n"):
    assert rate("Jane Doe", f"Jane{gap}Doe") == 0, f"changed: {gap!r} separated words"
for gap in ("\n", "\t", "\u00a0"):
    assert rate("Jane Doe", f"Jane{gap}Doe") == 1, f"changed: {gap!r} alone did not separate words"
assert rate("Jane\nDoe", "Jane Doe") == 2, "changed: a line break in the target"
assert rate("Jane Doe", "John Roe") == 1, "changed: other words"
assert rate("iron zinc lead tin", "iron\nzinc\nlead\ntin") == 1, "changed: four lines"
other = [f("Jane Doe", "Jane\nDoe") for f in (jiwer.mer, jiwer.wil, jiwer.wip)]
print("mer, wil and wip for one line break:", other)
assert other == [1, 1, 0], "changed: other measures of words"
assert rate("Jane Doe", " ".join("Jane\nDoe".split())) == 0, "changed: words joined by spaces"
PY
