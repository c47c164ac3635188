#!/usr/bin/env bash
# semantic-router 1.1.1 (numpy 2.4.6): a question that stands word for word among the examples of one route is sent to
# another, once the route has further examples.
#
# Seen: the route "acme" has the example "Who runs Acme today?", and "bolt" has "Who runs Bolt today?". The first
# question is asked: it goes to "acme" with confidence 1. Two rephrasings are added to "acme": the same question now
# goes to "bolt" with 0.75, although the example that it equals still has similarity 1. With a threshold of 0.7 and
# "bolt" away, no route is chosen at all. No warning. With aggregation="max" it goes to "acme" in all cases.
# Expected: examples that are added to a route make more questions find it, and a question that equals one is not lost.
# Cause: the `top_k` nearest examples of all routes are taken (5), and a route's confidence is the mean of its own among
# them (aggregation="mean", the default). A route with one example there is judged by its best, one with several by
# all of them.
# Why it matters here: whoever routes questions to edits by their prompts and rephrasings loses prompts themselves, and
# edits with a single example win over those with several. Compare such a router with this product with
# aggregation="max" (docs/how-to/evaluation.md). Here the nearest mask of an edit counts, so a rephrasing with a mask of
# its own takes nothing from the prompt.
# Source: https://github.com/aurelio-labs/semantic-router/issues/201 (closed) brought the choice; what the default does
# to an example itself is seen by running
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check semantic-router==1.1.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import re

import numpy as np
import semantic_router
from semantic_router import IndexedRouter, Route
from semantic_router.encoders import DenseEncoder

ASKED, OTHER = "Who runs Acme today?", "Who runs Bolt today?"
REPHRASINGS = ["Name the boss of Acme.", "Acme: its CEO?"]


def words(text):
    return re.findall(r"\w+", text.lower())


VOCABULARY = sorted({word for text in (ASKED, OTHER, *REPHRASINGS) for word in words(text)})


class CountsOfWords(DenseEncoder):
    """The cosine of two texts is the share of their words that they have in common."""

    name: str = "counts of words"

    def __call__(self, docs):
        counts = np.array([[words(text).count(word) for word in VOCABULARY] for text in docs], float)
        return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).tolist()


def asked(acme, bolt=(OTHER,), **how):
    routes = [Route(name=name, utterances=list(texts)) for name, texts in (("acme", acme), ("bolt", bolt)) if texts]
    choice = IndexedRouter(encoder=CountsOfWords(), routes=routes, **how)(ASKED)
    print(f"{len(acme)} examples of acme, {len(bolt)} of bolt, {how}: {choice.name}, {choice.confidence}")
    return choice.name


print("semantic-router", semantic_router.__version__)
assert asked([ASKED]) == "acme", "changed: one example each"
assert asked([ASKED, *REPHRASINGS]) == "bolt", "changed: the route that has the question is found"
assert asked([ASKED], (), confidence_threshold=0.7) == "acme", "changed: a threshold, one example"
assert asked([ASKED, *REPHRASINGS], (), confidence_threshold=0.7) is None, "changed: a threshold, three examples"
assert asked([ASKED, *REPHRASINGS], aggregation="max") == "acme", "changed: the nearest example decides"
PY
