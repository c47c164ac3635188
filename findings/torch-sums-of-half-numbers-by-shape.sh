#!/usr/bin/env bash
# torch 2.13.0+cpu: what numbers of half precision add up to depends on the function, and on whether they are rows of a
# matrix or a vector.
#
# Seen: 4096 times 0.01 in bfloat16, all for one group, on a CPU. `sum`, `scatter_add_`, and `index_add_` of rows of a
# matrix, give 41. `index_add_` of a vector, `index_put_` with `accumulate` and `segment_reduce` give 4, and
# `segment_reduce` says that the mean is 0.001. In float16 it is 41 and 32. No warning.
# Expected: 41 from all. The page of `index_add_` says that elements are added, for every shape alike, and no word of
# what is rounded when.
# Cause: the first ones add up in float32 and round at the end. The others round after every number; 4 + 0.01 is 4 in
# bfloat16. `index_add_` has a path of its own for vectors.
# Why it matters here: a mask is made of means of activations. vLLM hands these over in bfloat16, with the questions of
# a step one behind the other, which is what `segment_reduce` and `index_add_` are for. The product makes float32 of
# them first (`integrations/memoir_vllm/worker/pooling.py`, `block_sums.py`; tests/vllm/test_pooling.py).
# Source: https://github.com/pytorch/pytorch/issues/139242 is about `index_reduce_` alone; the rest seen by running.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0+cpu
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch

N, WIDTH = 4096, 3
torch.set_num_threads(1)
group = torch.zeros(N, dtype=torch.long)
lengths = torch.tensor([N])


def sums(x):
    zero, wide = x.new_zeros((1, *x.shape[1:])), group.view(-1, *[1] * (x.dim() - 1)).expand_as(x)
    return {
        "sum": x.sum(0, keepdim=True),
        "scatter_add_": zero.clone().scatter_add_(0, wide, x),
        "index_add_": zero.clone().index_add_(0, group, x),
        "index_put_": zero.clone().index_put_((group,), x, accumulate=True),
        "segment_reduce": torch.segment_reduce(x, "sum", lengths=lengths),
        "mean by segment_reduce": torch.segment_reduce(x, "mean", lengths=lengths),
    }


print("torch", torch.__version__, "numbers:", N)
for dtype, right, wrong in ((torch.float32, 40.96, 40.96), (torch.bfloat16, 41, 4), (torch.float16, 40.97, 32)):
    for shape in ((N,), (N, WIDTH)):
        totals = sums(torch.full(shape, 0.01, dtype=dtype))
        seen = {name: round(total.flatten()[0].item(), 4) for name, total in totals.items()}
        print(f"{dtype}, shape {shape}: {seen}")
        mean = seen.pop("mean by segment_reduce")
        assert abs(mean * N - wrong) < 0.1, "changed: the mean is another one"
        for name, total in seen.items():
            rounds = name in ("index_put_", "segment_reduce") or (name == "index_add_" and len(shape) == 1)
            assert abs(total - (wrong if rounds else right)) < 0.1, f"changed: {name} of {shape}"
PY
