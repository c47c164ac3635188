"""The asynchronous client of the administration, and the example that uses it, against a real server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from servers import Server
from test_server_admin import ANSWER, NEW, QUESTIONS, TARGETS, TOKEN, folder, other, server

from memoir_retrieval import AdminClient, Edit
from memoir_retrieval.errors import AdminError

pytestmark = [pytest.mark.engine, pytest.mark.slow]

__all__ = ["folder", "other", "server"]  # the fixtures of the admin API

EXAMPLE = Path(__file__).parents[2] / "examples/correct_a_running_server.py"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_a_server_is_administered_from_python(server: Server) -> None:
    url = str(server.http.base_url)
    async with AdminClient(url, TOKEN) as admin:
        page = await admin.edits("example corp")
        assert (page.total, page.edits[0].target) == (1, TARGETS[0])
        assert (await admin.add(Edit(prompt=QUESTIONS[0], target=TARGETS[0]))).id == 0  # it is there already
        with pytest.raises(AdminError, match="with 409"):
            await admin.add(Edit(prompt=QUESTIONS[0], target="Nobody"))
        edit = await admin.add(Edit(prompt=NEW, target=ANSWER, source="test"))
        assert await admin.edit(edit.id) == edit and edit.source == "test"
        messages = [{"role": "user", "content": NEW}]
        result = await admin.lookup(messages)
        assert result.result == "matched" and result.matches[0].edit == edit.id
        gone = await admin.remove(edit.id)
        assert gone.state == "done" and (await admin.lookup(messages)).result == "unmatched"
        assert await admin.reload() == gone.generation == (await admin.stats())["generation"]
        assert "active" in [entry["what"] for entry in await admin.audit()]
    async with AdminClient(url, "another token that is not it") as stranger:
        with pytest.raises(AdminError, match="with 401"):
            await stranger.stats()


def test_the_example(server: Server) -> None:
    command = [sys.executable, EXAMPLE, str(server.http.base_url), TOKEN, NEW, ANSWER]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "is served, generation" in done.stdout and "the prompt is matched" in done.stdout
