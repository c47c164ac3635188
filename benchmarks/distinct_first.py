"""Edits in the order in which stores of different size are compared: those with distinct subjects first.

    python benchmarks/distinct_first.py FILE OUT --distinct 1000 --edits 10000

OUT gets so many edits of FILE, each prompt once: first the first edits of so many subjects, then the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from memoir_retrieval.edits.files import check_duplicates, limit_distinct_subjects, read_edits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--distinct", type=int, default=1000)
    parser.add_argument("--edits", type=int, default=10_000)
    options = parser.parse_args()
    edits = check_duplicates(read_edits(options.file), "first")
    first = limit_distinct_subjects(edits, options.distinct)
    prompts = {edit.prompt for edit in first}
    ordered = [*first, *(edit for edit in edits if edit.prompt not in prompts)][: options.edits]
    records = [
        {"prompt": edit.prompt, "target": edit.target, "subject": edit.subject, "rephrases": edit.rephrases}
        for edit in ordered
    ]
    options.out.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
    print(f"{options.out}: {len(ordered)} edits, the first {len(first)} of distinct subjects")


if __name__ == "__main__":
    main()
