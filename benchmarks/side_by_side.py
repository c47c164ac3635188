"""CPU seconds an edit takes with so many memories side by side, in alternating turns.

python benchmarks/side_by_side.py examples/zsre-100.jsonl 1 4 8 [--edits 16] [--turns 3]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from memoir_retrieval import Editor, read_edits
from memoir_retrieval.model.base import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("counts", type=int, nargs="+")
    parser.add_argument("--edits", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m")
    options = parser.parse_args()
    edits = read_edits(options.file)[: options.edits]
    base = load_model(options.model)
    seconds: dict[int, list[float]] = {n: [] for n in options.counts}
    steps: dict[int, float] = {}
    for _ in range(options.turns):
        for n in options.counts:
            with tempfile.TemporaryDirectory() as folder, Editor(base, Path(folder) / "store", chat=False) as editor:
                started = time.process_time()
                stored = editor.add(edits, on_conflict="both", keep_failed=True, side_by_side=n)
                seconds[n].append((time.process_time() - started) / len(stored))
            steps[n] = round(sum(edit.steps for edit in stored) / len(stored), 2)
    ratios = {
        n: median(a / b for a, b in zip(seconds[options.counts[0]], times, strict=True)) for n, times in seconds.items()
    }
    result = {
        n: {"cpu_seconds": round(median(times), 3), "times_faster": round(ratios[n], 2), "steps": steps[n]}
        for n, times in seconds.items()
    }
    print(json.dumps({"edits": len(edits), "turns": options.turns, "side_by_side": result}))


if __name__ == "__main__":
    main()
