"""The demo's server: whatever happens, the reason is said and no process stays behind."""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from memoir_retrieval.errors import ConfigError

demo = import_module("memoir_retrieval.cli.demo")  # the package's own name `demo` is the command

# Stand-ins for vLLM's server, so that no engine has to start: one that answers /health, one that stops at once.
HEALTHY = """
import http.server, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[2], "w").write(str(worker.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
BROKEN = "print('loading'); print('no room for the model'); raise SystemExit(3)"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Starts HEALTHY in place of vLLM; the file it returns will hold the id of the server's worker process."""
    worker = tmp_path / "worker"

    def command(_model: str, _store: Path, flags: list[str]) -> tuple[list[str], dict[str, str]]:
        port = flags[flags.index("--port") + 1]
        return [sys.executable, "-c", HEALTHY, port, str(worker)], dict(os.environ)

    monkeypatch.setattr(demo, "server_command", command)
    return worker


def gone(pid: int) -> bool:
    """Whether a process ends within 5 s: a kill takes effect a little after it was sent."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # ended, and not yet waited for by its new parent
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_a_server_that_stops_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "server_command", lambda *_: ([sys.executable, "-c", BROKEN], dict(os.environ)))
    server = demo._server(tmp_path / "store", demo._free_port())
    with pytest.raises(ConfigError, match=r"exit code 3.*server\.log ends: loading \| no room for the model"), server:
        pass


@pytest.mark.parametrize("raised", [None, ValueError, KeyboardInterrupt], ids=["normal", "error", "interrupted"])
def test_the_server_and_its_workers_are_stopped(
    stand_in: Path, tmp_path: Path, raised: type[BaseException] | None
) -> None:
    def use() -> None:
        with demo._server(tmp_path / "store", demo._free_port()):
            if raised:
                raise raised

    if raised:
        with pytest.raises(raised):
            use()
    else:
        use()
    assert gone(int(stand_in.read_text()))


def test_a_missing_example_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl is not there.*--file"):
        demo.demo.main(["--file", str(tmp_path / "none.jsonl")], standalone_mode=False)


def test_answers_are_compared_whole_and_without_outer_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    """As `memoir eval` compares them; published targets may begin with a blank."""
    long = "the balcony of " * 20
    rows = [
        demo.DemoAnswer("edited", "q", "no", "MAT-49", 0, 1.0, " MAT-49"),
        demo.DemoAnswer("edited", "q", "no", "MAT-48", 0, 1.0, "MAT-49"),
        demo.DemoAnswer("rephrased", "q", "Oslo", "Oslo", 1, 0.6, "Oslo"),
        demo.DemoAnswer("unrelated", "q", long + "a", long + "b", None, 0.5, None),
        demo.DemoAnswer("unrelated", "q", long, long, None, 0.5, None),
    ]
    demo._print(rows, 6)
    said = capsys.readouterr().out.splitlines()[-3:]
    assert said == [
        "edited: 1 of 2 answers are the target, 0 were before",
        "rephrased: 1 of 1 answers are the target, 1 were before",
        "unrelated: 1 of 2 answers are unchanged, 0 matched an edit",
    ]
