"""A thousand administration requests at once: what they are answered with, and how long the event loop stands still.

    python benchmarks/admin_load.py STORE [REQUESTS]

vLLM's HTTP server with the real routes, queue and audit log over a copy of a store; its clients are another process
with a connection for each request: first a thousand at one moment, then a hundred at a time. No engine, and nobody
makes the changes: what is measured is what a request costs the loop that also serves `/v1`. A third of the requests add
edits, half of these with a text of combining marks only; the others list edits, search them, and read the jobs and the
audit log.

Prints one JSON object for each kind of requests: answers by status, and how late in milliseconds the loop came round to
a task that sleeps for a millisecond. `processor_ms` is what the processor spent on the loop until then: the pause if no
other program or thread had run. `version` is vLLM's own cheapest route, for comparison: what its server takes to read a
thousand requests, whatever they are. `strangers` have no token; `one holder` sends all with one token.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
import uvicorn
import uvloop
from vllm.entrypoints.launchers.app import build_app
from vllm.utils.argparse_utils import FlexibleArgumentParser

from memoir_vllm import config
from memoir_vllm.admin.engines import Engines
from memoir_vllm.admin.jobs import QUEUE
from memoir_vllm.admin.routes import make_app
from memoir_vllm.admin.service import Service
from memoir_vllm.admin.tokens import Tokens

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser  # since vLLM 0.33
except ImportError:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser

TOKENS = ["one-holders-token", *(f"token-number-{n:04}" for n in range(10))]
MARKS = "a" + "\u0301\u0323" * 8_000
TICK_S = 0.001
PAUSE_S = 12.0  # in which a token's allowance is full again


def request(line: str, body: Any = None, token: str = "") -> str:
    text = "" if body is None else json.dumps(body)
    known = f"Authorization: Bearer {token}\r\n" if token else ""
    head = f"{line} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n{known}Content-Type: application/json\r\n"
    return f"{head}Content-Length: {len(text)}\r\n\r\n{text}"


def administration(n: int, token: str) -> str:
    if n % 3 == 0:
        prompt = f"{n} {MARKS}" if n % 2 else f"Who runs company {n}?"
        return request("POST /memoir/edits", {"prompt": prompt, "target": "Jane Doe"}, token)
    reads = {1: "edits?limit=200", 2: f"edits?search=company%20{n}", 4: "jobs", 5: "audit?limit=200"}
    return request(f"GET /memoir/{reads[n % 6]}", token=token)


async def watch(pauses: list[tuple[float, float]]) -> None:
    """Wakes up every millisecond and notes how late it was, and what time the processor has spent on the loop."""
    while True:
        before, busy = time.perf_counter(), time.thread_time()
        await asyncio.sleep(TICK_S)
        pauses.append((time.perf_counter() - before - TICK_S, time.thread_time() - busy))


@contextlib.asynccontextmanager
async def serving(service: Service) -> AsyncIterator[int]:
    """vLLM's server, as it is started, and its port."""
    app = build_app(make_arg_parser(FlexibleArgumentParser()).parse_args([]), ("generate",))
    tokens = Tokens({sha256(token.encode()).digest(): token for token in TOKENS})
    app.mount("/memoir", make_app(tokens, lambda: service, schema=False))
    app.state.engine_client, app.state.log_stats = None, False
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await task


async def burst(port: int, at_once: int, requests: Sequence[str]) -> dict[str, Any]:
    """Answers, seconds and pauses of one burst. at_once: requests that wait at a time."""
    client = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("burst.py")),
        str(port),
        str(at_once),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    pauses: list[tuple[float, float]] = []
    watcher = asyncio.create_task(watch(pauses))
    began = time.perf_counter()
    answers, _ = await client.communicate(json.dumps(requests).encode())
    seconds = time.perf_counter() - began
    watcher.cancel()
    late, busy = np.percentile(1e3 * np.array(pauses), [50, 99, 100], axis=0).round(1).T.tolist()
    return {
        "answers": dict(sorted(json.loads(answers).items())),
        "seconds": round(seconds, 2),
        "pause_ms": dict(zip(["p50", "p99", "max"], late, strict=True)),
        "processor_ms": dict(zip(["p50", "p99", "max"], busy, strict=True)),
    }


async def measure(store: Path, count: int) -> None:
    engines = Engines(cast(Any, None))  # nobody asks them
    service = Service(config.parse_section({"store": str(store)}), "", "here:1", engines, None)
    kinds = {
        "version": [request("GET /version") for _ in range(count)],
        "strangers": [administration(n, "") for n in range(count)],
        "one holder": [administration(n, "one-holders-token") for n in range(count)],
        "administration": [administration(n, TOKENS[1 + n % 10]) for n in range(count)],
    }
    async with serving(service) as port:
        for requests in kinds.values():  # what is imported and read once
            await burst(port, 1, requests[1:3])
        for at_once in (count, count // 10):
            for kind, requests in kinds.items():
                row = {"requests": f"{count} {kind}", "at once": at_once}
                print(json.dumps(row | await burst(port, at_once, requests)), flush=True)
                await asyncio.sleep(PAUSE_S)
    print(json.dumps({"changes that wait": len(service.jobs.open()), "may wait": QUEUE}))


def main(store: str, requests: str = "1000") -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(store, Path(scratch) / "store")
        uvloop.run(measure(folder, int(requests)))


if __name__ == "__main__":
    main(*sys.argv[1:])
