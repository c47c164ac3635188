#!/usr/bin/env bash
# rouge-score 0.1.2: an answer equal to its target scores 0 where the target has no Latin letters or digits.
#
# Seen: ROUGE-1 and ROUGE-L of two equal texts in Chinese, Russian or Arabic are 0.0; of "Müller" against "M ller" they are
# 1.0, since every other character only separates words. The score is a number like any other: no warning.
# Expected: 1.0 for equal texts.
# Why it matters here: toolkits and papers of model editing score free text by ROUGE. Figures of a multilingual set say nothing
# about the edits then. `memoir eval` compares whole answers instead.
# Source: https://github.com/huggingface/evaluate/issues/256; `RougeScorer(tokenizer=...)` takes another tokenizer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check rouge-score==0.1.2
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

from rouge_score import rouge_scorer

scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"])
print("rouge-score", version("rouge-score"))
for target, answer in (("北京", "北京"), ("Анна Линд", "Анна Линд"), ("Müller", "M ller"), ("Jane Doe", "Jane Doe")):
    scores = {name: score.fmeasure for name, score in scorer.score(target, answer).items()}
    print(repr(target), repr(answer), scores)
    expected = 0.0 if target[0] in "北А" else 1.0
    assert set(scores.values()) == {expected}, "changed"
PY
