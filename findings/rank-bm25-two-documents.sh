#!/usr/bin/env bash
# rank-bm25 0.2.2 (numpy 2.4.6): with two documents, BM25Okapi scores whatever is asked 0 against both, and the last one always wins.
#
# Seen: "price milk" and "mayor graz" score 0.0 and 0.0 against "mayor of graz" and "price of milk", and get_top_n gives
# "price of milk" for both. With a third document the score is .97; BM25L and BM25Plus tell the two apart. No warning.
# Expected: the document that has the words is first.
# Cause: the idf is log((N - n + .5) / (n + .5)), which is log 1 = 0 for a word in one of two documents (n = 1, N = 2).
# Why it matters here: a router over a store of a few edits, as a baseline to compare with, finds nothing and looks like a
# bad method. `memoir bench methods` compares with embeddings; a BM25 baseline needs Lucene's idf, log(1 + ...).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check rank-bm25==0.2.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
from rank_bm25 import BM25L, BM25Okapi, BM25Plus

two = [["mayor", "of", "graz"], ["price", "of", "milk"]]
for kind in (BM25Okapi, BM25L, BM25Plus):
    for query in (["mayor", "graz"], ["price", "milk"]):
        scores = kind(two).get_scores(query)
        (best,) = kind(two).get_top_n(query, [" ".join(text) for text in two], 1)
        print(f"{kind.__name__}, {' '.join(query)}: {scores.round(2).tolist()}, first: {best}")
okapi = BM25Okapi(two).get_scores(["price", "milk"])
assert (okapi == 0).all(), f"changed: two documents are told apart now ({okapi})"
three = BM25Okapi([*two, ["sea", "level"]]).get_scores(["price", "milk"])
print(f"BM25Okapi with a third document: {three.round(2).tolist()}")
assert three[1] > 0.9 and BM25L(two).get_scores(["price", "milk"])[1] > 1, "changed: other scores"
PY
