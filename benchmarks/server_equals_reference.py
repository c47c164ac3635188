"""Ask a running server and the Hugging Face reference the same prompts and count the answers that are the same tokens.

python benchmarks/server_equals_reference.py DIR FILE URL
"""

from __future__ import annotations

import sys

from memoir_retrieval import EditedModel, EditStore, read_edits
from memoir_retrieval.client.server_model import ServerModel


def main(store: str, file: str, url: str) -> int:
    """Exit code 0 if every answer and every matched edit is the same."""
    server, reference = ServerModel(url, EditStore.open(store)), EditedModel.open(store)
    edits = read_edits(file)
    questions = {
        "edited": [e.prompt for e in edits],
        "rephrased": [r for e in edits for r in e.rephrases],
        "unrelated": [p.prompt for e in edits for p in e.locality],
    }
    wrong = 0
    for kind, prompts in questions.items():
        pairs = list(
            zip(
                server.generate(prompts, max_new_tokens=16), reference.generate(prompts, max_new_tokens=16), strict=True
            )
        )
        tokens = sum(a.tokens == b.tokens for a, b in pairs)
        matches = sum(a.edit == b.edit for a, b in pairs)
        wrong += 2 * len(pairs) - tokens - matches
        print(
            f"{kind}: {tokens} of {len(pairs)} answers are the same tokens, {matches} match the same edit", flush=True
        )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
