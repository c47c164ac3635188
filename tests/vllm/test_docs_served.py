"""What the documentation tells a reader to send to a server, sent to one: the tutorial's, with an admin token.

Commands go through a shell as they stand, but for the port and the ids that a page can only give as examples.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_pages import ROOT, Line, blocks, command_lines
from servers import Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TOKEN = "the token of the documentation".replace(" ", "-")
BIN = Path(sys.executable).parent
ADMINISTRATION, TUTORIAL = ROOT / "docs/how-to/administration.md", ROOT / "docs/tutorial.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tutorial's reader is when the server shall start."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "examples", folder / "examples")
    for line in command_lines(TUTORIAL):
        if line.words[0] == "cp" or line.words[:2] == ["memoir", "edit"]:
            shell(line.text, folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    (line,) = (line for line in command_lines(TUTORIAL) if line.words[:2] == ["memoir", "serve"])
    command = [str(BIN / "memoir"), *line.arguments]
    command[command.index("edits")] = str(folder / "edits")
    server = Server(command, tmp_path_factory.mktemp("server") / "log", {**os.environ, "MEMOIR_ADMIN_TOKEN": TOKEN})
    server.http.headers["Authorization"] = f"Bearer {TOKEN}"
    yield server
    server.stop()


def shell(text: str, folder: Path, **variables: str) -> str:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **variables}
    command = f"set -e; {text}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def sent(text: str, server: Server) -> str:
    assert "http://127.0.0.1:8000" in text
    return text.replace("http://127.0.0.1:8000", str(server.http.base_url).rstrip("/"))


def test_the_tutorials_server_answers_as_it_says(server: Server, folder: Path) -> None:
    lines = {line.program: line for line in command_lines(TUTORIAL) if "http://" in line.text}
    assert list(lines) == ["curl", "python", "memoir"]
    said = json.loads(shell(sent(lines["curl"].text, server), folder))
    assert said["choices"][0]["message"]["content"] == "Jane Doe" and said["kv_transfer_params"]["memoir"]["edit"] == 0
    with_edits, without = shell(sent(lines["python"].text, server), folder).splitlines()[:2]
    assert with_edits == "matched 0 Jane Doe" and without.startswith("off None")
    said = shell(sent(lines["memoir"].text, server), folder)
    assert "holds: 0 failed" in said and "matched over opted out" in said


def test_the_commands_of_administration_run(server: Server, folder: Path) -> None:
    lines = [line for line in command_lines(ADMINISTRATION) if line.program in ("curl", "export")]
    exports = "; ".join(line.text for line in lines if line.words[0] == "export" and "AUTH" in line.text)
    routes: set[str] = set()
    job = None
    for line in lines:
        if line.program == "export":
            continue
        text = line.text if job is None else re.sub("3f0c2a9b71d4e856", job, line.text)
        said = shell(f"{exports}; {sent(text, server)}", folder, MEMOIR_ADMIN_TOKEN=TOKEN)
        reply = json.loads(said)
        assert "detail" not in reply, line
        routes.add(f"{method(line)} {re.search(r'memoir(/[a-z.]+)', line.text)[1]}")
        if "Exampleton bridge" in text:
            job = reply["id"]
        elif job is not None and "DELETE" not in text and "/jobs/" in text:
            finish(server, job)
    assert routes == {
        *("GET /edits", "POST /edits", "DELETE /edits", "GET /jobs", "POST /lookup"),
        *("GET /stats", "POST /reload", "GET /audit", "GET /openapi.json"),
    }
    assert job is not None and server.http.get(f"/memoir/jobs/{job}").json()["state"] == "done"


def method(line: Line) -> str:
    return line.words[line.words.index("-X") + 1] if "-X" in line.words else "POST" if "-d" in line.words else "GET"


def finish(server: Server, job: str) -> None:
    until = time.monotonic() + 300
    while server.http.get(f"/memoir/jobs/{job}").json()["finished"] is None:
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("page", "first", "prints"),
    [
        ("README.md", "from openai", r"\{'edit'"),
        ("docs/reference/serving.md", "from openai", r"Jane Doe\n \{'edit': 0"),
        ("docs/how-to/python.md", "import asyncio", r"^\d+ Lookup\(result='matched'"),
    ],
)
def test_the_python_of_a_page_asks_it(page: str, first: str, prints: str, server: Server, folder: Path) -> None:
    (block,) = ("\n".join(code) for _, code in blocks(ROOT / page, "python") if code[0].startswith(first))
    script = sent(block, server).replace("the token of the server", TOKEN)
    (folder / "block.py").write_text(script)
    assert re.search(prints, shell("python block.py", folder))
