"""Thousands of requests of all kinds at a real server whose store changes all the time: `pytest -m soak`.

A small random model, so that the requests and not the model take the time, and so few KV blocks that requests are
preempted. What the quiet server answers is compared with the Hugging Face reference for every tenth generation.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import psutil
import pytest
from engines import EARLIER, EDITS, MAX_MODEL_LEN, PIRATE, UNRELATED, user
from mixes import LONG
from servers import Server

from memoir_retrieval.cli.serve import server_command
from memoir_retrieval.client.admin import AdminClient
from memoir_retrieval.client.soak import NEAR, Soak
from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.question.prompts import Prompt
from memoir_retrieval.store.read import EditStore
from memoir_retrieval.store.write import write_generation

TOKEN = "0123456789abcdef"
REQUESTS = int(os.environ.get("MEMOIR_SOAK_REQUESTS", "10000"))
CHANGES, TOKENS, REMOVALS, COMPARED = max(1, REQUESTS // 50), 12, 10, 10
PROMPTS: list[Prompt] = [
    *EDITS,
    *UNRELATED,
    LONG,
    f"{LONG} {EDITS[0]}",
    *([user(text)] for text in EDITS),
    [PIRATE, user(EDITS[1])],
    [PIRATE, *EARLIER, user(EDITS[2])],
    [PIRATE, user(UNRELATED[0])],
    [user(LONG)],
]

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(5400)]


@pytest.fixture
def server(small: Path, small_edits: Path, tmp_path: Path) -> Iterator[Server]:
    flags = f"--enforce-eager --max-model-len {MAX_MODEL_LEN} --max-num-seqs 8 --block-size 32".split()
    flags += ["--num-gpu-blocks-override", "14", "--max-num-batched-tokens", "64", "--scheduling-policy", "priority"]
    command, environment = server_command(str(small), small_edits, flags)
    server = Server(command, tmp_path / "log", {**environment, "MEMOIR_ADMIN_TOKEN": TOKEN})
    yield server
    server.stop()


def sizes(server: Server) -> Mapping[str, float]:
    """Of the server and the engine below it; the trainer comes and goes."""
    total = {"server_resident_bytes": 0, "server_open_fds": 0}
    for process in [top := psutil.Process(server.process.pid), *top.children(recursive=True)]:
        try:
            if "memoir_vllm.admin.trainer" not in process.cmdline():
                total["server_resident_bytes"] += process.memory_info().rss
                total["server_open_fds"] += process.num_fds()
        except psutil.NoSuchProcess:
            continue
    return total


def other_edits(original: EditStore, dice: Random) -> int:
    """Write a generation of some edits with other memories. Returns its number."""
    number = EditStore.open(original.path).manifest.generation + 1
    kept = dice.sample(range(len(EDITS)), dice.randint(2, len(EDITS)))
    rows = np.isin(original.ids, kept)
    content = original.content._replace(
        memories=np.ascontiguousarray(np.roll(original.memories, dice.randrange(64), axis=2)),
        codes=original.codes[rows],
        ids=original.ids[rows],
        memory_of=original.memory_of[rows],
        edits=[edit for edit in original.edits if edit.id in kept],
    )
    write_generation(original.path, msgspec.structs.replace(original.manifest, generation=number), content)
    return number


def test_every_answer_under_load_is_that_of_the_quiet_server_and_of_the_reference(
    server: Server, small: Path, small_edits: Path
) -> None:
    dice, original = Random(18), EditStore.open(small_edits, check=True)
    wanted: dict[int, list[tuple[tuple[int, ...], int | None]]] = {}
    url = f"http://127.0.0.1:{server.port}"
    soak = Soak(url, tokens=TOKENS, clients=16, near=NEAR["float32"], seed=18)

    def truth(generation: int) -> None:
        model = EditedModel.open(small_edits, str(small))
        answers = model.generate(PROMPTS, max_new_tokens=TOKENS, batch_size=1)
        wanted[generation] = [(answer.tokens, answer.edit) for answer in answers]

    async def run() -> None:
        async with AdminClient(url, TOKEN) as admin:
            count = 0

            async def change() -> None:
                nonlocal count
                count += 1
                if count % REMOVALS == 0:  # the real trainer's process
                    generation = (await admin.remove(EditStore.open(small_edits).edits[-1].id)).generation
                else:
                    generation = await asyncio.to_thread(other_edits, original, dice)
                    assert await admin.reload() == generation
                if count % COMPARED == 1:
                    await asyncio.to_thread(truth, generation)

            report = await soak.run(
                PROMPTS,
                minutes=80,
                requests=REQUESTS,
                changes=CHANGES,
                change=change,
                measure=lambda: sizes(server),
                watch=print,
            )
            print(msgspec.json.format(msgspec.json.encode(report)).decode())
            assert report.differing == 0, report.differences
            assert report.failed == 0, report.errors
            assert report.holds, report.checks
            assert report.generations == CHANGES + 1 and sum(report.requests.values()) >= REQUESTS
            assert report.preemptions, "requests were preempted"
            assert report.tokens > report.unclear, "most of what is answered is compared"
            assert all(engine["live"] == 0 for engine in (await admin.stats())["engines"])

    asyncio.run(run())
    assert len(wanted) == -(-CHANGES // COMPARED)
    matched = 0
    for generation, answers in wanted.items():
        for reference, (tokens, edit) in zip(soak.references[generation], answers, strict=False):
            assert reference.decision.edit == edit
            assert reference.tokens[: reference.clear] == tokens[: reference.clear]
            matched += edit is not None
    assert matched > len(wanted)
