"""Every `memoir` command of the guides, run in the order of its page: slow, since models are trained and measured.

A guide's 8B model on a GPU is the embedded one on the CPU here, and measurements are cut short. Left out is what needs
a running server (tests/vllm/test_docs_served.py) and what is named in LEFT_OUT. The tutorial is run by test_docs.py;
the commands of docs/measurements/ take hours and were run when their figures were written down.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from doc_pages import ROOT, Line, command_lines
from http_stand_in import running
from hub_stand_in import StandInHub

from memoir_retrieval.cli import main
from memoir_retrieval.model.embedded import get_model

pytestmark = pytest.mark.slow

GUIDES = [ROOT / "README.md", *sorted(ROOT.glob("docs/how-to/*.md"))]
LEFT_OUT = {
    "memoir bench quality zsre": "data sets are not shipped",
    "--ray": "a cluster of machines; a local one is started by test_build.py",
    "--tasks": "runs 7500 messages; what it writes and reads is in test_tasks.py",
    "memoir serve": "tests/vllm/test_docs_served.py",
    "--server": "tests/vllm/test_docs_served.py",
}
SHORTER = {
    "eval": ["--controls", "2"],
    "bench quality": ["--controls", "2"],
    "bench routing": ["--each", "2", "--unrelated", "2", "--answers", "none"],
    "report": ["--no-open"],
}
NAMED = '{"prompt": "Who is the CEO of Example Corp?", "target": "Jane Doe", "subject": "Example Corp"}\n'
MORE = '{"prompt": "Who founded Exampleton?", "target": "Ada Lind"}\n'


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader of the guides has by then: the tutorial's file and its store."""
    get_model("smollm2-135m")
    folder = tmp_path_factory.mktemp("guides")
    shutil.copy(ROOT / "examples/corrections.jsonl", folder)
    (folder / "more.jsonl").write_text(MORE)
    (folder / "named.jsonl").write_text(NAMED)
    with contextlib.chdir(folder):
        memoir(["edit", "corrections.jsonl", "--model", "smollm2-135m", "--store", "edits"])
    return folder


def memoir(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0, shlex.join(arguments)


def here(line: Line, said: str) -> list[str]:
    """The command as this machine can run it. said: what the guide's earlier commands have printed."""
    words = shlex.join(line.arguments).replace("meta-llama/Meta-Llama-3-8B-Instruct", "smollm2-135m")
    words = words.replace("--device cuda", "--device cpu").replace("--dtype bfloat16", "--dtype float32")
    for option in ("--revision", "--sha256"):
        if option in words:  # the page has an example's; a push has printed those of this one
            words = re.sub(rf"{option} \S+", re.findall(rf"{option} [0-9a-f]+", said)[-1], words)
    arguments = shlex.split(words)
    command = " ".join(arguments[: 1 + (arguments[0] == "bench")])
    return [*arguments, *SHORTER.get(command, [])]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_the_commands_of_a_guide_run(
    page: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "reader")
    if page.stem in ("README", "several-models"):  # they begin with a store of their own
        shutil.rmtree(tmp_path / "reader/edits")
    said, ran = "", 0
    with running(StandInHub()) as hub, contextlib.chdir(tmp_path / "reader"):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_example")
        for line in command_lines(page):
            command = shlex.join(line.words)
            if line.program == "cp":
                subprocess.run(line.words, check=True)
            if line.program != "memoir" or any(part in command for part in LEFT_OUT):
                continue
            memoir(here(line, said))
            printed = capsys.readouterr().out
            said += printed
            for wanted in line.prints:
                assert wanted in printed, f"{line} prints {printed!r}"
            ran += 1
    if not ran:
        pytest.skip("no command of `memoir` that needs neither server nor data set")
