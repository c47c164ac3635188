#!/usr/bin/env bash
# torchmetrics 1.9.0 (torch 2.13.0+cpu): the AUROC of scores that separate perfectly is 0.5, or 0, or depends on how
# they are cut into batches.
#
# Seen: three related messages share 60, 52 and 41 positions with an edit's mask, three unrelated ones 33, 25 and 20.
# AUROC and average precision are 0.5, as if guessed; with `thresholds=100` AUROC is 0.0. Divided by 64, the same
# numbers give 1.0. Distances with a minus give 0.5 too. Cosines of 0.6 to -0.2 give 1.0 in one update, and 0.8 where
# only the second update has a negative one. The threshold that `binary_recall_at_fixed_precision` finds for distances
# up to 8 is 0.0003. No warning.
# Expected: 1.0 in all cases, since AUROC is about order alone, and a threshold among the scores.
# Cause: if a score of a call is not between 0 and 1, all scores of that call are put through the sigmoid. In single
# precision it is 1 from about 17 on, and it is 0 for -104: unequal scores become equal. Calls whose scores all lie
# between 0 and 1 stay as they are.
# Why it matters here: overlaps and distances are such numbers. A router that separates perfectly looks like chance
# beside one with cosines, and a threshold that comes back is no distance. Divide by the number of positions first
# (docs/how-to/evaluation.md).
# Source: https://github.com/Lightning-AI/torchmetrics/issues/2819 and .../2195 (both open); the documentation says that
# the sigmoid is applied, and not what becomes of the order
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torchmetrics==1.9.0 torch==2.13.0+cpu
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

import torch
from torchmetrics.classification import BinaryAUROC
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_recall_at_fixed_precision,
)

print("torchmetrics", version("torchmetrics"), "torch", torch.__version__)
related = torch.tensor([1, 1, 1, 0, 0, 0])


def auroc(name, scores, **how):
    value = binary_auroc(torch.tensor(scores), related, **how).item()
    print(f"AUROC of {name} {scores} {how or ''}: {value}")
    return value


shared = [60.0, 52.0, 41.0, 33.0, 25.0, 20.0]
assert auroc("shared positions", shared) == 0.5, "changed: shared positions"
assert auroc("shared positions", shared, thresholds=100) == 0, "changed: shared positions, with thresholds"
assert auroc("their shares", [n / 64 for n in shared]) == 1, "changed: numbers between 0 and 1"
assert auroc("minus distances", [-120.0, -180.0, -240.0, -400.0, -500.0, -700.0]) == 0.5, "changed: distances"
precision = binary_average_precision(torch.tensor(shared), related).item()
print("average precision of shared positions:", precision)
assert precision == 0.5, "changed: average precision"


def cosines(*batches):
    metric = BinaryAUROC()
    for scores, labels in batches:
        metric.update(torch.tensor(scores), torch.tensor(labels))
    print(f"AUROC of cosines in {len(batches)} updates: {metric.compute().item():.3f}")
    return round(metric.compute().item(), 3)


first, second = ([0.60, 0.55, 0.50, 0.45], [1, 1, 0, 0]), ([0.40, 0.35, -0.20], [0, 0, 0])
assert cosines((first[0] + second[0], first[1] + second[1])) == 1, "changed: one update"
assert cosines(first, second) == 0.8, "changed: two updates"

near = -torch.tensor([3.0, 5.0, 8.0, 10.0, 12.0, 14.0])
recall, threshold = binary_recall_at_fixed_precision(near, related, min_precision=1.0)
print(f"threshold for precision 1 among {near.tolist()}: {threshold.item():.4f}, recall {recall.item()}")
assert recall == 1 and 0 < threshold < 0.001, "changed: the threshold"
PY
