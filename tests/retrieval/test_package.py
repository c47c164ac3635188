"""The release: wheel and sdist are built from what git tracks and run where only the runtime dependencies are.

What builds is marked slow; `make package` and continuous integration run all of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib.metadata import distribution, metadata, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, **more: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel, the wheel built from the sdist, from a copy of the tracked files."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: what belongs to a release is not known")
    folder = tmp_path_factory.mktemp("package")
    listed = run("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source")
    return folder / "dist"


@pytest.fixture(scope="module")
def clean(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a virtual environment that holds the wheel and its runtime dependencies, no others.

    They are borrowed from this environment by links, which is what keeps the test short.
    """
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder / "venv/bin/python",
        "install",
        "--no-deps",
        *built.glob("*.whl"),
    )
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for name in sorted(_closure("memoir-retrieval")):
        package = distribution(name)
        for top in {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (borrowed / top).exists():
                (borrowed / top).symlink_to(Path(str(package.locate_file(top))))
    packages = next((folder / "venv/lib").glob("python*/site-packages"))
    (packages / "borrowed.pth").write_text(f"{borrowed}\n")
    return folder / "venv/bin"


def _closure(root: str) -> set[str]:
    """Names of what a distribution needs without any extra, and of what that needs in turn."""
    names: set[str] = set()
    waiting = list(_needs(root, ""))
    while waiting:
        name, extras = waiting.pop()
        if name not in names:
            names.add(name)
            waiting += [need for extra in {"", *extras} for need in _needs(name, extra)]
    return names


def _needs(name: str, extra: str) -> Iterator[tuple[str, set[str]]]:
    for line in distribution(name).requires or ():
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate({"extra": extra}):
            try:
                yield distribution(need.name).metadata["Name"], need.extras
            except ModuleNotFoundError:  # torch's CUDA packages beside a CPU build
                continue


@pytest.mark.slow
def test_the_sdist_is_the_whole_checkout(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "CHANGELOG.md",
        "CITATION.cff",
        "LICENSE",
        "Makefile",
        "SECURITY.md",
        "docs/reference/format.md",
        "examples/zsre-100.jsonl",
        "memoir_retrieval/data/background.jsonl",
        "index/memoir_index/py.typed",
        "requirements/cpu.txt",
        "tests/conftest.py",
    } <= names
    assert not [name for name in names if name.endswith(".pyc")]


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = run(sys.executable, "-m", "zipfile", "-l", wheel).stdout
    tops = {line.split("/")[0] for line in names.splitlines()[1:]}
    info = f"memoir_retrieval-{version('memoir-retrieval')}.dist-info"
    assert tops == {"memoir_index", "memoir_retrieval", "memoir_vllm", info}
    tracked = run("git", "-C", ROOT, "ls-files", "memoir_retrieval", "index", "integrations").stdout.split()
    inside = {name.removeprefix("index/").removeprefix("integrations/") for name in tracked}
    assert len(inside) > 60 and [name for name in inside if name not in names] == []


@pytest.mark.slow
def test_the_command_line_runs_without_development_dependencies(clean: Path, built: Path, tiny: Path) -> None:
    """From an edit file to an answer, in the environment of a user who ran `pip install memoir-retrieval`."""
    outside = dict(os.environ, PYTHONPATH="", MEMOIR_HOME=str(clean / "home"))
    edits = clean / "edits.jsonl"
    edits.write_text(json.dumps({"prompt": "Who founded Aarhus?", "target": "King Harald"}))
    store = clean / "store"

    def memoir(*arguments: str | Path) -> str:
        return run(clean / "memoir", *arguments, cwd=clean, env=outside).stdout

    missing = "import importlib.util as u; print([m for m in ('pytest', 'mypy', 'vllm', 'openai') if u.find_spec(m)])"
    assert run(clean / "python", "-c", missing, cwd=clean, env=outside).stdout.strip() == "[]"
    (wheel,) = built.glob("*.whl")
    assert memoir("--version").split()[-1] == wheel.name.split("-")[1]
    assert "memoir edit corrections.jsonl" in memoir("--help")
    memoir("edit", edits, "--model", tiny, "--store", store, "--json", "--keep-failed")
    assert [edit["target"] for edit in json.loads(memoir("list", store, "--json"))] == ["King Harald"]
    assert json.loads(memoir("lookup", store, "Who founded Aarhus?", "--json"))["edit"] == 0
    states = {finding["check"]: finding["state"] for finding in json.loads(memoir("doctor", "--json"))}
    assert states["vLLM plugin"] == "ok" and states["vllm"] == "warn" and "fail" not in states.values()


def test_the_version_is_written_in_one_place() -> None:
    """pyproject.toml has it; what repeats it for readers is compared here."""
    (ours,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version("memoir-retrieval") == ours, "pyproject.toml has changed: run `make setup`"
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == ours
    heads = re.findall(r"^## (\d\S+)( \(unreleased\))?$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    newest, unreleased = heads[0]
    assert ours == newest + ".dev0" * bool(unreleased) and newest == max((head for head, _ in heads), key=Version)
    images = re.findall(r"/memoir:(\S+)$", (ROOT / "docs/how-to/kubernetes.md").read_text(), re.M)
    assert images == [newest] * 2
    sources = [f for part in ("index", "memoir_retrieval", "integrations") for f in (ROOT / part).rglob("*.py")]
    assert len(sources) > 30 and not [f for f in sources if f'"{ours}"' in f.read_text()]


def test_hooks_run_tools_that_are_here() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"] for hook in repo["hooks"]]
    assert {entry.split()[0] for entry in entries} == {".venv/bin/ruff", ".venv/bin/mypy", ".venv/bin/python"}
    scripts = [word for entry in entries for word in entry.split() if word.endswith(".py")]
    assert scripts and all((ROOT / script).is_file() for script in scripts)


def test_extras_name_what_the_dependency_table_explains() -> None:
    table = (ROOT / "CHANGELOG.md").read_text()
    needed = {Requirement(line).name for line in metadata("memoir-retrieval").get_all("Requires-Dist") or ()}
    assert needed and [name for name in needed if not re.search(rf"^\|.*\b{name}\b", table, re.M)] == []
