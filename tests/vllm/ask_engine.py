"""One engine in a process of its own, for an environment that must not leak into the tests.

Reads flags and prompts as JSON from stdin; the last line of stdout is the answer. `turns`: asked one after another.
`naive`: without what keeps edits out of other requests' blocks; asks for VLLM_ENABLE_V1_MULTIPROCESSING=0.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from engines import Engine


def main() -> None:
    order = json.load(sys.stdin)
    if order.get("naive"):
        _leave_the_cache_alone()
    engine = Engine(**order["flags"])
    try:
        replies = []
        for turn in order.get("turns", [order]):
            replies += engine.ask(turn["prompts"], turn.get("options"), **order.get("how", {}))
        answer = {"replies": [dataclasses.asdict(reply) for reply in replies], "stats": engine.settled()}
    finally:
        engine.close()
    print(json.dumps(answer))


def _leave_the_cache_alone() -> None:
    """Blocks are published before the decision and under the hashes of the base model."""
    from memoir_vllm.core import blocks

    guard = blocks.guard

    def hits_only(manager: Any, *judges: Any) -> None:
        publish = manager.coordinator.cache_blocks
        guard(manager, *judges)
        manager.coordinator.cache_blocks = publish

    blocks.guard, blocks.own = hits_only, lambda *args: None


if __name__ == "__main__":
    main()
