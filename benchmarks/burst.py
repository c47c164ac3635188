"""Sends HTTP requests as fast as they are answered, each over a connection of its own: read by `admin_load.py`.

    python benchmarks/burst.py PORT AT_ONCE < requests.json

The file is a list of requests as text, of which AT_ONCE wait for their answers at a time. Prints a JSON object: how
many were answered with each status.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Sequence


async def send(port: int, at_once: int, requests: Sequence[str]) -> Counter[str]:
    statuses: Counter[str] = Counter()
    streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(min(at_once, len(requests)))]
    left = iter(requests)

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for request in left:
            if writer.is_closing():
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request.encode())
            answer = await reader.read()
            writer.close()
            statuses[answer.split(b" ", 2)[1].decode() if answer else "none"] += 1

    await asyncio.gather(*(client(*stream) for stream in streams))
    return statuses


if __name__ == "__main__":
    print(json.dumps(asyncio.run(send(int(sys.argv[1]), int(sys.argv[2]), json.load(sys.stdin)))))
