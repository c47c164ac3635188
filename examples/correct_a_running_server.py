"""Correct a running server: `correct_a_running_server.py http://127.0.0.1:8000 TOKEN "PROMPT" "TARGET"`.

TOKEN is the MEMOIR_ADMIN_TOKEN that the server was started with.
"""

import asyncio
import sys

from memoir_retrieval import AdminClient, Edit
from memoir_retrieval.client.admin import Change


def show(change: Change) -> None:
    if change.progress is not None and change.progress.stage == "training":
        print(f"step {change.progress.step}, loss {change.progress.loss:.3f}", file=sys.stderr)


async def main(url: str, token: str, prompt: str, target: str) -> None:
    async with AdminClient(url, token) as server:
        edit = await server.add(
            Edit(prompt=prompt, target=target), replace=True, watch=show
        )  # returns once it is served
        lookup = await server.lookup([{"role": "user", "content": prompt}])
        print(f"edit {edit.id} is served, generation {lookup.generation}, loss {edit.loss:.3f}")
        print(f"the prompt is {lookup.result}, overlap {lookup.matches[0].overlap:.2f} (tau {lookup.tau})")


asyncio.run(main(*sys.argv[1:5]))
