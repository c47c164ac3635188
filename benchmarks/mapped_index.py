"""Opening a large index over a mapped file: seconds, and memory of the process' own.

python benchmarks/mapped_index.py [FOLDER]

Writes 10^6 masks of D=14336 (1.8 GB; 2000 different ones again and again) to a file in FOLDER, then removes it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from memoir_index import HammingIndex
from memoir_index.synthetic import MaskSource

D, K, N, DIFFERENT = 14336, 4096, 1_000_000, 2000


def own_mebibytes() -> int:
    """Memory that is not a mapped file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) >> 10


def main(folder: str | None = None) -> None:
    """Print one line a step."""
    source = MaskSource(D, K)
    codes, unrelated = source.masks(DIFFERENT), source.masks(1)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for _ in range(N // DIFFERENT):
            file.write(codes.tobytes())
        file.flush()
        mapped = np.memmap(file.name, np.uint8, "r", shape=(N, D // 8))
        ids = np.arange(N)
        print(f"before: {own_mebibytes()} MiB")

        def step(name: str, act: Callable[[], object]) -> None:
            start = time.perf_counter()
            act()
            print(f"{name}: {time.perf_counter() - start:.4f} s, {own_mebibytes()} MiB")

        index = HammingIndex(D, K)

        def opened(checked: bool) -> None:
            nonlocal index
            index = HammingIndex.from_codes(D, K, ids, mapped, copy=False, checked=checked)

        step("opened, ones of every mask counted", lambda: opened(False))
        step("opened, checked before", lambda: opened(True))
        step("prepared for tau .55", lambda: index.prepare(0.55))
        step("one lookup", lambda: index.search(unrelated, 0.55))
        step("one edit added", lambda: index.add([N], unrelated))
        step("one edit removed", lambda: index.remove([5]))
        step("another removed", lambda: index.remove([N // 2]))


if __name__ == "__main__":
    main(*sys.argv[1:])
