"""The documentation: every command line in it is one that exists, the cheap ones are run, generated pages are fresh."""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import yaml

import memoir_index
import memoir_retrieval
from memoir_retrieval.cli import cli, main
from memoir_retrieval.embedded import get_model

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")])
TUTORIAL = ROOT / "docs/tutorial.md"

# Commands other than `memoir`, and why no test runs them. Those of `memoir` are parsed, and run where the tutorial has
# them; `memoir serve`, `demo`, `bench` and `verify` have tests of their own that start real servers.
NOT_RUN = {
    "pip": "changes the environment that the tests run in",
    "make": "its targets run these tests; that the target exists is checked",
    "source": "a shell's own; the tests run inside the environment",
    "vllm": "the CPU build has no such command; tests/vllm start the same server by its module",
    "docker": "needs Docker and a GPU",
    "kubectl": "needs a cluster; the manifest is checked",
    "curl": "needs a server; its JSON is checked",
    "python": "benchmarks take minutes; the examples are run below, and by tests/vllm/test_server.py",
    "cp": "run in the tutorial",
    "head": "run in the tutorial",
    "export": "a shell's own",
    "git": "fetches or publishes",
    "pytest": "would run tests within a test; that its marker exists is checked",
    "pre-commit": "changes the checkout's hooks",
}
# Lines of the tutorial that are not run, and why.
TUTORIAL_NOT_RUN = ("make", "source", "curl", "python", "memoir serve", "memoir verify")  # servers: tests/vllm
DOCTOR_MAY_WARN = "memoir doctor"  # vllm or openai may be missing where these tests run


class Line(NamedTuple):
    """One command of a page and the lines that it is said to print."""

    page: Path
    number: int
    words: list[str]
    prints: list[str]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.number}"


def blocks(page: Path, language: str) -> list[tuple[int, list[str]]]:
    """First line number and lines of each fenced block of a language."""
    found: list[tuple[int, list[str]]] = []
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            inside = not inside and line == f"```{language}"
            if inside:
                found.append((number + 1, []))
        elif inside:
            found[-1][1].append(line)
    return found


def command_lines(page: Path) -> list[Line]:
    lines: list[Line] = []
    for first, block in blocks(page, "console"):
        waiting = ""
        for number, text in enumerate(block, first):
            if waiting or text.startswith("$ "):
                waiting += text.removeprefix("$ ") if not waiting else text
                if waiting.endswith("\\"):
                    waiting = waiting[:-1]
                    continue
                words, waiting = shlex.split(waiting, comments=True), ""
                while words:
                    end = words.index("&&") if "&&" in words else len(words)
                    lines.append(Line(page, number, words[:end], []))
                    words = words[end + 1 :]
            else:
                assert lines and lines[-1].number >= first, f"{page}:{number}: output without a command"
                lines[-1].prints.append(text)
    return lines


ALL = [line for page in PAGES for line in command_lines(page)]


def test_pages_are_found() -> None:
    assert len(PAGES) > 15 and len(ALL) > 40


@pytest.mark.parametrize("line", ALL, ids=str)
def test_every_command_exists(line: Line) -> None:
    words = [word for word in line.words if not re.fullmatch(r"[A-Z_]+=.*", word)]
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "memoir":
        parse(cli, "memoir", arguments)
        return
    assert program in NOT_RUN, f"{line}: say in NOT_RUN why {program!r} is not run"
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in arguments if "=" not in word} <= set(targets)
    if program == "python":
        assert find_spec(arguments[1]) if arguments[0] == "-m" else (ROOT / arguments[0]).is_file()
    if program == "pytest" and "-m" in arguments:
        markers = re.findall(r'^    "([a-z]+): ', (ROOT / "pyproject.toml").read_text(), re.M)
        assert arguments[arguments.index("-m") + 1] in markers
    if program == "vllm":
        assert "memoir" in json.loads(arguments[arguments.index("--additional-config") + 1])
    if program == "curl" and "-d" in arguments:
        json.loads(arguments[arguments.index("-d") + 1])


def parse(command: click.Command, name: str, arguments: list[str], parent: click.Context | None = None) -> None:
    """Raises click's UsageError for options, commands or values that do not exist."""
    with command.make_context(name, list(arguments), parent=parent) as context:
        if isinstance(command, click.Group):
            rest = [*context._protected_args, *context.args]
            found, inner, rest = command.resolve_command(context, rest)
            assert inner is not None and found is not None
            parse(inner, found, rest, context)


@pytest.mark.parametrize("bad", ["edit f.jsonl --store s --layers 3", "lookup", "bench engine", "verify --store s"])
def test_a_command_that_does_not_exist_is_found(bad: str) -> None:
    with pytest.raises(click.UsageError):
        parse(cli, "memoir", bad.split())


@pytest.fixture(scope="module")
def after_tutorial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the examples, in which the tutorial's commands have been run one after another."""
    get_model("smollm2-135m")
    folder = tmp_path_factory.mktemp("tutorial")
    shutil.copytree(ROOT / "examples", folder / "examples")
    with contextlib.chdir(folder):
        yield folder


def test_the_tutorial_prints_what_it_says(after_tutorial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers may differ, words may not."""
    ran = 0
    for line in command_lines(TUTORIAL):
        if shlex.join(line.words).startswith(TUTORIAL_NOT_RUN):
            continue
        out = run(line.words, capsys)
        for said in line.prints:
            assert numberless(said) in numberless(out), f"{line}: prints {out!r}"
        ran += 1
    assert ran >= 8


def test_the_examples_run(after_tutorial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They go on with the tutorial's store where it is there, and train one where this test is run alone."""
    runpy.run_path("examples/edit_and_ask.py")
    rephrased, unrelated = capsys.readouterr().out.splitlines()[:2]
    assert rephrased == "0 Jane Doe"
    assert unrelated.startswith("None ") and "Paris" in unrelated
    runpy.run_path("examples/look_up_and_measure.py")
    held, found, measured = capsys.readouterr().out.splitlines()
    assert held == "3 edits of smollm2-135m, generation 1"
    assert found.startswith("edit 2, overlap 0.") and found.endswith("Port 4711")
    assert measured == "reliability 1.00, exact answers 1.00"


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    if words[0] != "memoir":
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout
    with pytest.raises(SystemExit) as done:
        main(words[1:])
    out = capsys.readouterr().out
    assert done.value.code == 0 or (shlex.join(words) == DOCTOR_MAY_WARN and "fail" not in out), out
    return out


def numberless(text: str) -> str:
    return " ".join(re.sub(r"\d+(\.\d+)?", "N", text).split())


def test_python_blocks_compile_and_import_what_exists() -> None:
    seen = 0
    for page in PAGES:
        for number, block in blocks(page, "python"):
            tree = ast.parse("\n".join(block), f"{page}:{number}")
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module == "memoir_retrieval":
                    assert {alias.name for alias in node.names} <= set(memoir_retrieval.__all__)
                    seen += 1
    assert seen >= 2


def test_the_ten_lines_of_the_documentation_are_the_example() -> None:
    (_, block) = blocks(ROOT / "docs/how-to/python.md", "python")[0]
    example = (ROOT / "examples/edit_and_ask.py").read_text().partition('"""\n\n')[2]
    assert "\n".join(block).strip() == example.strip()
    assert len([line for line in block if line]) <= 10


def test_the_manifest_of_kubernetes_runs_commands_that_exist() -> None:
    ((_, block),) = blocks(ROOT / "docs/how-to/kubernetes.md", "yaml")
    deployment, service = yaml.safe_load_all("\n".join(block))
    pod = deployment["spec"]["template"]["spec"]
    (doctor,), (server,) = pod["initContainers"], pod["containers"]
    parse(cli, "memoir", doctor["command"][1:])
    parse(cli, "memoir", ["serve", *server["args"]])  # the image's entry point, checked below
    ((_, dockerfile),) = blocks(ROOT / "docs/how-to/docker.md", "dockerfile")
    assert 'ENTRYPOINT ["memoir", "serve"]' in dockerfile
    assert {mount["name"] for mount in server["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]


def test_the_command_line_reference_is_what_help_says() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs/make_cli_reference.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_has_a_docstring() -> None:
    """They are the page of the Python API."""
    seen = 0
    for module in (memoir_retrieval, memoir_index):
        for name in module.__all__:
            thing = getattr(module, name)
            members = vars(thing).items() if inspect.isclass(thing) else ()
            public = [m for key, m in members if not key.startswith("_") and (callable(m) or hasattr(m, "__func__"))]
            for member in (thing, *public):
                assert inspect.getdoc(member), f"{module.__name__}.{name}: {member} has no docstring"
                seen += 1
    assert seen > 30


@pytest.mark.skipif(find_spec("material") is None, reason="needs the extra `docs`")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site/reference/api.html").read_text()
    assert all(name in api for name in memoir_retrieval.__all__)
    home = (tmp_path / "site/index.html").read_text()
    assert "pictures/path.svg" in home
    external = re.findall(r'(?:src|href)="(https?://[^"]+)"', home)
    assert not [url for url in external if url.endswith((".js", ".css", ".woff2"))]


def test_links_between_pages_and_files_lead_somewhere() -> None:
    """MkDocs checks links inside docs/; these are those of the README and its neighbours, anchors aside."""
    for page in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert re.match(r"https?://", target) or (ROOT / target).exists(), f"{page.name}: {target}"
