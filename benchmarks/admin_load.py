"""A thousand administration requests at once: what they are answered with, and how long the event loop stands still.

    python benchmarks/admin_load.py STORE [REQUESTS]

The real routes, queue and audit log over a copy of a store. No engine, and nobody makes the changes: what is measured
is what a request costs the loop that also serves `/v1`. A third of the requests add edits, half of these with a text of
combining marks only; the others list edits and search them. Prints one JSON object: answers by method and status, and
the longest time in milliseconds until the loop came round again. The client shares that loop and sends all requests in
one turn of it, so this bounds what a server's loop would see from above.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import httpx

from memoir_vllm import config
from memoir_vllm.admin.engines import Engines
from memoir_vllm.admin.jobs import QUEUE
from memoir_vllm.admin.routes import make_app
from memoir_vllm.admin.service import Service
from memoir_vllm.admin.tokens import Tokens

TOKENS = [f"token-number-{n:04}" for n in range(10)]
MARKS = "a" + "\u0301\u0323" * 8_000
TICK_S = 0.001


async def longest_pause(pauses: list[float]) -> None:
    """Wakes up every millisecond and notes how late it was."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(TICK_S)
        pauses.append(time.perf_counter() - before - TICK_S)


async def measure(store: Path, requests: int) -> dict[str, Any]:
    engines = Engines(cast(Any, None))  # nobody asks them
    service = Service(config.parse_section({"store": str(store)}), "", "here:1", engines, None)
    tokens = Tokens({sha256(token.encode()).digest(): token for token in TOKENS})
    app = make_app(tokens, lambda: service, schema=False)
    pauses: list[float] = []
    answers: Counter[str] = Counter()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:

        async def ask(n: int) -> None:
            headers = {"Authorization": f"Bearer {TOKENS[n % len(TOKENS)]}"}
            if n % 3 == 0:
                edit = {"prompt": f"Who runs company {n}?", "target": "Jane Doe"}
                if n % 2:
                    edit |= {"prompt": f"{n} {MARKS}"}
                reply = await client.post("/edits", json=edit, headers=headers)
            else:
                query = {"search": MARKS[:256]} if n % 3 == 1 else {}
                reply = await client.get("/edits", params=query, headers=headers)
            answers[f"{reply.request.method} {reply.status_code}"] += 1

        await ask(2)  # what is imported and read once
        watch = asyncio.create_task(longest_pause(pauses))
        await asyncio.sleep(0.05)
        began = time.perf_counter()
        await asyncio.gather(*(ask(n) for n in range(requests)))
        seconds = time.perf_counter() - began
        watch.cancel()
    return {
        "requests": requests,
        "seconds": round(seconds, 2),
        "answers": dict(sorted(answers.items())),
        "waiting": len(service.jobs.open()),
        "may_wait": QUEUE,
        "longest_pause_ms": round(1e3 * max(pauses), 1),
    }


def main(store: str, requests: str = "1000") -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(store, Path(scratch) / "store")
        print(json.dumps(asyncio.run(measure(folder, int(requests)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
