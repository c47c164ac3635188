#!/usr/bin/env bash
# sacrebleu 2.6.0: the corpus BLEU of answers that all equal their references is 0 where each is shorter than four words.
#
# Seen: corpus_bleu of "Paris" and "New York City" with themselves is 0.0; sentence_bleu of each is 100, and so is chrF.
# With one answer of four words among them it is 100. The score's counts say why: there are no 4-grams. No warning.
# Expected: 100, or an error that nothing could be counted.
# Cause: precisions of 1- to 4-grams are multiplied, and that of none is 0; `effective_order`, which leaves such orders
# out, is on in sentence_bleu and off in corpus_bleu.
# Why it matters here: targets of edits are names, years and numbers. A table with BLEU for edits says 0 for a perfect
# method. `memoir eval` and `memoir bench methods` report exact and contained answers instead.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check sacrebleu==2.6.0
"$folder/venv/bin/python" - <<'PY'
import sacrebleu

answers = ["Paris", "New York City", "1998"]
corpus = sacrebleu.corpus_bleu(answers, [answers])
alone = [sacrebleu.sentence_bleu(answer, [answer]).score for answer in answers]
longer = [*answers, "the Republic of Ireland"]
print(f"corpus: {corpus.score} (n-grams counted: {corpus.totals}); sentences: {[round(score) for score in alone]}")
print(f"corpus with one answer of four words: {sacrebleu.corpus_bleu(longer, [longer]).score:.0f}")
assert corpus.score == 0.0, "changed: equal short answers score"
assert all(round(score) == 100 for score in alone), "changed: single answers score less"
assert round(sacrebleu.corpus_bleu(longer, [longer]).score) == 100, "changed: longer answers score less"
PY
