"""Sends HTTP requests at one moment, each over a connection of its own: read by `admin_load.py`.

    python benchmarks/burst.py PORT < requests.json

The file is a list of requests as text. Prints a JSON object: how many were answered with each status.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Sequence


async def send(port: int, requests: Sequence[str]) -> Counter[str]:
    streams = [await asyncio.open_connection("127.0.0.1", port) for _ in requests]
    for (_, writer), request in zip(streams, requests, strict=True):
        writer.write(request.encode())
    answers = await asyncio.gather(*(reader.read() for reader, _ in streams))
    for _, writer in streams:
        writer.close()
    return Counter(answer.split(b" ", 2)[1].decode() if answer else "none" for answer in answers)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(send(int(sys.argv[1]), json.load(sys.stdin)))))
