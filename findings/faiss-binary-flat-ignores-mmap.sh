#!/usr/bin/env bash
# faiss-cpu 1.15.1 (numpy 2.4.6): `read_index_binary` with IO_FLAG_MMAP, or IO_FLAG_MMAP_IFC, reads a flat binary index into memory.
#
# Seen: after the codes in the file are overwritten, the opened index still answers from the old ones, and opening costs the
# memory of the whole file. No flag, error or warning says that nothing was mapped.
# Expected: a mapped file, or an error.
# Why it matters here: codes of a large store are searched where they lie in the mapped file, which a FAISS index cannot do;
# that is why `memoir_index` calls the Hamming kernels on arrays of its own. Two servers on one machine share those pages.
# Source: https://github.com/facebookresearch/faiss/issues/3165 asks for it for float indexes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check faiss-cpu==1.15.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import os
import resource

import faiss
import numpy as np

rows, width = 400_000, 192
codes = np.random.default_rng(0).integers(0, 256, (rows, width), dtype=np.uint8)
index = faiss.IndexBinaryFlat(8 * width)
index.add(codes)
faiss.write_index_binary(index, "codes.index")
query = codes[:1].copy()
del index, codes


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


print("faiss", faiss.__version__)
for flag in ("IO_FLAG_MMAP", "IO_FLAG_MMAP_IFC"):
    before = resident()
    opened = faiss.read_index_binary("codes.index", getattr(faiss, flag))
    grown = resident() - before
    size = os.path.getsize("codes.index")
    with open("codes.index", "r+b") as file:
        file.seek(size - rows * width)
        first = file.read(width)
        file.seek(size - rows * width)
        file.write(bytes(width))
    distance, _ = opened.search(query, 1)
    print(f"{flag}: {grown / 1e6:.0f} MB of a file of {size / 1e6:.0f} MB read; nearest at distance {distance[0, 0]}")
    with open("codes.index", "r+b") as file:
        file.seek(size - rows * width)
        file.write(first)
    assert grown > 0.9 * rows * width, "changed: the file is mapped now"
    assert distance[0, 0] == 0, "changed: the index looks at the file now"
    del opened
PY
