"""What candidate spans and the judge add to a lookup, and what they add to a store.

    python benchmarks/lookup_cost.py [--edits 100 --edits 100000] [--d 14336] [--rounds 400] [--json]

Made-up masks of edits with made-up questions, tokens of the embedded model. A lookup is all that a request costs the
host once its activations are pooled, and finding what to pool: spans, masks, search, judge. With them it is timed in
turn with one of the whole message alone, decided by masks alone. CPU time, medians over requests, of one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import faiss
import msgspec
import numpy as np
import torch
from made_up_store import write_made_up
from transformers import AutoTokenizer

from memoir_index import unpack
from memoir_index.synthetic import MaskSource
from memoir_retrieval.edits.judge import shipped_judge
from memoir_retrieval.lookup.masks import EditLookup
from memoir_retrieval.model.embedded import get_model
from memoir_retrieval.question.candidates import Pieces, find_candidates
from memoir_retrieval.question.fingerprint import Fingerprint, permutation
from memoir_retrieval.question.prompts import prompt_ids
from memoir_retrieval.question.span import SpanRule, derive_span_rule
from memoir_retrieval.question.tasks import Pooled, TaskProbe
from memoir_retrieval.store.read import EditStore

TAU = 0.55
OFFICES = ("mayor", "chief engineer", "head coach", "finance director", "founder", "ambassador", "editor", "bishop")
KINDS: dict[str, str] = {
    "own": "Who is the {office} of {place}?",
    "rephrased": "Tell me who works as {office} of {place}.",
    "sibling": "Who is the {office} of {other}?",
    "unrelated": "How many grams of flour go into the dough for {other} buns?",
    "e-mail": (
        "Hello there,\n\nI hope that you are well. We met in {other} last spring and had a long talk about boats.\n"
        "One thing I forgot: Who is the {office} of {place}?\n\nBest wishes,\nKim"
    ),
}
"""Messages. All but an unrelated one have a mask that overlaps the edit's by .75; all but an e-mail are one span."""


class Way(NamedTuple):
    """A lookup. name: of it. rule: how its spans are found. lookup: what decides."""

    name: str
    rule: SpanRule
    lookup: EditLookup


def question(edit: int) -> dict[str, str]:
    syllables = ("ba", "ko", "ri", "len", "mu", "sta", "dor", "vi", "tha", "gro")
    name = "".join(syllables[int(digit)] for digit in f"{edit:06d}")
    other = "".join(syllables[int(digit)] for digit in f"{edit * 7 % 999_983:06d}")
    return {"office": OFFICES[edit % len(OFFICES)], "place": name.title(), "other": other.title()}


def own_question(edit: int) -> str:
    return KINDS["own"].format(**question(edit))


def means_of(codes: np.ndarray, perm: np.ndarray, random: np.random.Generator) -> torch.Tensor:
    """Activations whose masks these are: float32 [N, D]."""
    ones = unpack(codes, len(perm))[:, perm]
    values = random.uniform(0.01, 1, ones.shape) + ones
    return torch.from_numpy((values * random.choice((-1, 1), ones.shape)).astype(np.float32))


def measure(folder: Path, edits: int, d: int, rounds: int, tau: float) -> Iterator[dict[str, object]]:
    random = np.random.default_rng(0)
    k = d * 2 // 7
    source, perm = MaskSource(d, k), permutation(d, 0)
    tokenizer = AutoTokenizer.from_pretrained(get_model("smollm2-135m"))
    rule = derive_span_rule(tokenizer)
    codes = source.masks(edits)
    ways = []
    for name, judge in (("masks alone", ""), ("spans and judge", shipped_judge().name)):
        own = msgspec.structs.replace(rule, candidates=bool(judge))
        (folder / name).mkdir()
        memory = np.zeros((64, d), np.float32)
        write_made_up(folder / name, codes, own_question, memory, perm, k, tau, own, judge)
        store = EditStore.open(folder / name, check=False)
        ways.append(Way(name, own, EditLookup(store, tokenizer.decode)))
        disk = sum(file.stat().st_size for file in store.path.iterdir())
        held = sum(array.nbytes for array in vars(ways[-1].lookup).values() if isinstance(array, np.ndarray))
        row = {"edits": edits, "way": name, "disk_bytes_an_edit": round(disk / edits, 1)}
        yield row | {"index_bytes_an_edit": d // 8 + 8, "lookup_bytes_an_edit": round(held / edits, 1)}
    fingerprint, pieces = Fingerprint(store.background, perm, k), Pieces(tokenizer.decode)
    probe = TaskProbe(random.standard_normal(2 * d + 1).astype(np.float32) * np.float32(0.1))
    for way in ways:
        way.lookup.prepare(tau)
    every: dict[str, list[float]] = {way.name: [] for way in ways}
    for kind, text in KINDS.items():
        spent: dict[str, list[float]] = {way.name: [] for way in ways}
        parts: dict[str, dict[str, list[float]]] = {way.name: {} for way in ways}
        spans = 0
        for turn in range(rounds):
            edit = int(random.integers(edits))
            ids = prompt_ids(tokenizer, [{"role": "user", "content": text.format(**question(edit))}], chat=True)
            spans = max(spans, len(find_candidates(ids, ways[1].rule, pieces)))
            near = source.variants(np.repeat(store.codes[edit : edit + 1], spans, 0), np.full(spans, int(0.75 * k)))
            if kind == "unrelated":
                near = source.masks(spans)
            means = means_of(near, perm, random)
            pooled = Pooled(means, torch.arange(2.0 * spans, spans, -1), means[:1])
            for way in ways if turn % 2 else ways[::-1]:
                laps = timed(way, ids, pooled, pieces, fingerprint, probe, tau)
                if turn >= rounds // 10:  # the first ones warm up
                    spent[way.name].append(sum(laps.values()))
                    for name, lap in laps.items():
                        parts[way.name].setdefault(name, []).append(lap)
        for way in ways:
            if kind != "e-mail":
                every[way.name] += spent[way.name]
            yield {
                "edits": edits,
                "message": kind,
                "spans": spans if way.rule.candidates else 1,
                "way": way.name,
                "us": round(median(spent[way.name]), 1),
                "ratio": round(median(spent[way.name]) / median(spent[ways[0].name]), 3),
                "parts_us": {name: round(median(laps), 1) for name, laps in parts[way.name].items()},
            }
    for way in ways:
        total = median(every[way.name])
        ratio = round(total / median(every[ways[0].name]), 3)
        yield {"edits": edits, "message": "all of one span", "way": way.name, "us": round(total, 1), "ratio": ratio}


def timed(
    way: Way,
    ids: list[int],
    pooled: Pooled,
    pieces: Pieces,
    fingerprint: Fingerprint,
    probe: TaskProbe,
    tau: float,
) -> dict[str, float]:
    """CPU microseconds of each part of a lookup."""
    laps: dict[str, float] = {}

    def lap(name: str, act: Callable[[], object]) -> object:
        start = time.process_time_ns()
        result = act()
        laps[name] = (time.process_time_ns() - start) / 1000
        return result

    found = find_candidates(ids, way.rule, pieces)
    lap("spans", lambda: find_candidates(ids, way.rule, pieces))
    questions = [ids[candidate.span.start : candidate.span.end] for candidate in found]
    count = len(questions)
    codes = lap("masks", lambda: fingerprint.codes(pooled.means[:count]))
    around = None
    if count > 1:
        around = lap("tasks", lambda: probe.scores(pooled.taken(range(count), [0]), [count]))
    lap("search and judge", lambda: way.lookup.decide(codes, tau, questions, [count], around))
    return laps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, action="append", help="edits of a store (default: 100 and 100,000)")
    parser.add_argument("--d", type=int, default=14336, help="bits of a mask")
    parser.add_argument("--tau", type=float, default=TAU, help="least overlap that matches")
    parser.add_argument("--rounds", type=int, default=400, help="lookups of each kind of message")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row")
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    for edits in arguments.edits or (100, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(Path(folder), edits, arguments.d, arguments.rounds, arguments.tau):
                print(json.dumps(row) if arguments.json else "  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
