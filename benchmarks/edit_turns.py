"""Seconds an edit takes with the code of another checkout and with this one, in alternating turns, by part.

    python benchmarks/edit_turns.py OLD FILE [--edits 16] [--turns 3] [--raw] [--cpu] [--json]

OLD is the folder of the other checkout. Each code runs in a process of its own, which stays; the turns of the two
follow each other, and one waits while the other trains. A turn trains the same edits into a new store. Parts: `open`
(a new store; once, not per edit), `frozen` (what training does not change), `steps`, `audit`, `commit`, and `other`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

PARTS = ("frozen", "steps", "audit", "commit", "other")
HERE = Path(__file__).resolve().parents[1]


def module(*names: str) -> Any:
    """The first of the modules that this code has; the other checkout may have it elsewhere."""
    import memoir_retrieval

    for name in names:
        # By its file: an installed package may offer what this checkout has not.
        if Path(memoir_retrieval.__file__).parent.joinpath(*name.split(".")).with_suffix(".py").exists():
            return importlib.import_module(f"memoir_retrieval.{name}")
    raise SystemExit(f"this checkout has no module {names[0]}: give another")


def work(options: argparse.Namespace) -> None:
    """Train a turn for each line that comes in, and print what it took."""
    clock = time.process_time if options.cpu else time.perf_counter
    seconds: dict[str, float] = defaultdict(float)

    def timed(owner: Any, name: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def measured(*arguments: Any, **named: Any) -> Any:
            started = clock()
            try:
                return function(*arguments, **named)
            finally:
                seconds[part] += clock() - started

        setattr(owner, name, measured)

    from memoir_retrieval import Editor, load_model, read_edits

    trainer = module("editing.trainer", "trainer")
    timed(trainer.Trainer, "prepare", "frozen")
    timed(trainer, "train_edits", "steps")
    for name in {"_audit", "_not_learnt", "_forgotten"} & vars(trainer.Trainer).keys():
        timed(trainer.Trainer, name, "audit")
    timed(module("store.commits", "commits").Commits, "write", "commit")
    base, edits = load_model(options.model), read_edits(options.file)
    for line in sys.stdin:
        first, n = json.loads(line)
        part = edits[first : first + n]
        with tempfile.TemporaryDirectory() as folder:
            started = clock()
            with Editor(base, Path(folder) / "store", chat=not options.raw) as editor:
                opened = clock()
                seconds.clear()
                stored = editor.add(part, on_conflict="both", keep_failed=True)
                total = clock() - opened
        parts = {name: seconds[name] for name in PARTS}
        parts["other"] = total - sum(parts.values())
        steps = sum(edit.steps for edit in stored) / len(stored)
        result = {"open": opened - started, "edit": total / len(stored), "number_of_steps": steps}
        print(json.dumps(result | {name: value / len(stored) for name, value in parts.items()}), flush=True)


def start(checkout: Path, options: argparse.Namespace) -> subprocess.Popen[str]:
    folders = [str(checkout / name) for name in ("", "index", "integrations")]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(folders))
    command = [sys.executable, __file__, "--work", *sys.argv[1:]]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def turn(process: subprocess.Popen[str], first: int, n: int) -> dict[str, float]:
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps([first, n]) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a checkout could not train: see above")
    result: dict[str, float] = json.loads(line)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="folder of the other checkout")
    parser.add_argument("file", type=Path)
    parser.add_argument("--edits", type=int, default=16, help="of each turn")
    parser.add_argument("--turns", type=int, default=3, help="of each code; each has edits of its own")
    parser.add_argument("--raw", action="store_true", help="prompts as they are, not through the chat template")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds, for a machine that others use too")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options)
        return
    processes = {"old": start(options.old.resolve(), options), "new": start(HERE, options)}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    for process in processes.values():
        turn(process, 0, 2)  # what is made once
    for number in range(options.turns):
        for name in ("old", "new") if number % 2 else ("new", "old"):
            results[name].append(turn(processes[name], number * options.edits, options.edits))
    for process in processes.values():
        process.communicate()
    names = list(results["old"][0])
    summary = {
        "edits": options.edits,
        "turns": options.turns,
        "raw": options.raw,
        "cpu": options.cpu,
        "old_over_new": round(median(a["edit"] / b["edit"] for a, b in zip(*results.values(), strict=True)), 2),
        **{
            code: {name: round(median(row[name] for row in rows), 4) for name in names}
            for code, rows in results.items()
        },
    }
    if options.json:
        print(json.dumps(summary))
        return
    print(f"old over new: {summary['old_over_new']} (median of {options.turns} turns of {options.edits} edits)")
    for name in names:
        print(f"{name:16} {summary['old'][name]:8.4f} {summary['new'][name]:8.4f}")


if __name__ == "__main__":
    main()
