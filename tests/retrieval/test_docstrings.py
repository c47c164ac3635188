"""Docstrings of public names: a line for each parameter and field, and examples that run."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib.util
import inspect
import json
import re
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from http_stand_in import JsonHandler, StandIn, running

import memoir_index
import memoir_retrieval
from memoir_retrieval import Editor, load_model, read_edits
from memoir_retrieval.model.embedded import get_model

ROOT = Path(__file__).parents[2]


def public() -> Iterator[tuple[str, Any]]:
    """Every name on the page of the Python API, with what it stands for."""
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs/site_pages.py")
    assert spec and spec.loader
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    for package in (memoir_retrieval, memoir_index):
        yield from ((name, getattr(package, name)) for name in package.__all__)
    for module, name in pages.RELATED:
        yield name, getattr(importlib.import_module(module), name)


PUBLIC = dict(public())


def parts(name: str, thing: Any) -> Iterator[tuple[str, str, list[str]]]:
    """What has a docstring of its own in a public name: title, text, and the names that the text must explain."""
    if not inspect.isclass(thing):
        yield name, inspect.getdoc(thing) or "", parameters(thing)
        return
    fields = [key for key in inspect.get_annotations(thing) if not key.startswith("_")]
    start = thing.__init__ if "__init__" in vars(thing) and not fields else None
    text = inspect.getdoc(thing) or ""
    yield name, text + "\n" + (inspect.getdoc(start) or "" if start else ""), parameters(start) if start else fields
    for key, member in vars(thing).items():
        called = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if key.startswith("_"):
            continue
        if isinstance(called, property | cached_property):
            yield f"{name}.{key}", inspect.getdoc(called) or "", []
        elif inspect.isfunction(called):
            yield f"{name}.{key}", inspect.getdoc(called) or "", parameters(called)


def parameters(function: Any) -> list[str]:
    return [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_parameter_and_field_has_a_line(name: str) -> None:
    for title, text, names in parts(name, PUBLIC[name]):
        assert text, f"{title} has no docstring"
        lines = re.findall(r"^([\w, ]+): \S", text, re.M)
        explained = {word.strip() for line in lines for word in line.split(",")}
        assert set(names) <= explained, f"{title} does not explain {', '.join(sorted(set(names) - explained))}"


EXEMPT = {
    "command": "click shows the help texts of its options",
    "option": "click shows the help texts of its options",
    "group": "click shows the help texts of its options",
    "overload": "the implementation has the docstring",
}
OF_VLLM = {"MemoirEndpoints", "MemoirScheduler", "MemoirWorker"}
"""Classes whose methods override vLLM's: one line says what ours add, vLLM says what the parameters are."""


def unexplained(source: str) -> list[str]:
    """The names in a module's `__all__`, and their public methods, without a docstring or a line for each parameter."""
    tree = ast.parse(source)
    assigned = {node.targets[0].id: node.value for node in tree.body
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}  # fmt: skip
    exported = set(ast.literal_eval(assigned["__all__"])) if "__all__" in assigned else set()
    missing: list[str] = []
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name not in exported:
            continue
        missing += [f"{node.name}: {gap}" for gap in gaps(node)]
        for member in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and not member.name.startswith("_"):
                said = ast.get_docstring(member) or ""
                lacking = [] if said.startswith("See `") or (said and node.name in OF_VLLM) else gaps(member)
                missing += [f"{node.name}.{member.name}: {gap}" for gap in lacking]
    return missing


def gaps(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> list[str]:
    """The parameters or fields that no line of a docstring explains, or what stands for the missing docstring."""
    text, names = ast.get_docstring(node) or "", []
    if isinstance(node, ast.ClassDef):
        start = next((m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"), None)
        fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
        names = [ast.unparse(f.target) for f in fields if f.value is None or not explains_itself(f.value)]
        if start and not fields:
            names, text = arguments(start), f"{text}\n{ast.get_docstring(start) or ''}"
    elif not EXEMPT.keys() & {decorator_name(d) for d in node.decorator_list}:
        names = arguments(node)
    if not text.strip():
        return ["no docstring"]
    lines = re.findall(r"^([\w, ]+):(?= \S)", text, re.M)
    explained = {word.strip() for line in lines for word in line.split(",")}
    return [name for name in names if not name.startswith("_") and name not in explained]


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = function.args
    return [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg not in ("self", "cls")]


def explains_itself(value: ast.expr) -> bool:
    """Whether a field of a pydantic model has a description, or is not shown."""
    return isinstance(value, ast.Call) and not {"description", "exclude"}.isdisjoint(k.arg for k in value.keywords)


def decorator_name(decorator: ast.expr) -> str:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return called.attr if isinstance(called, ast.Attribute) else ast.unparse(called)


def test_every_name_that_a_module_exports_is_explained_line_by_line() -> None:
    seen = 0
    for folder in ("memoir_retrieval", "index", "integrations"):
        for file in ROOT.glob(f"{folder}/**/*.py"):
            source = file.read_text(encoding="utf-8")
            assert unexplained(source) == [], file.relative_to(ROOT)
            seen += "__all__" in source
    assert seen > 100


@pytest.mark.parametrize(
    ("definition", "gap"),
    [
        ("def f(a): ...", "f: no docstring"),
        ("def f(a):\n    'Does a.'", "f: a"),
        ("def f(a, b):\n    'Does. a: this. b: that.'", "f: a, f: b"),
        ("class f:\n    'A record.'\n    a: int = 0", "f: a"),
        ("class f:\n    'A thing.'\n    def g(self): ...", "f.g: no docstring"),
        ("def f(a, b):\n    '''Does.\n\n    a, b: both.'''", ""),
        ("class f:\n    'A record.'\n    a: int = Field(0, description='It.')", ""),
        ("def g(a): ...", ""),
    ],
)
def test_a_name_without_its_line_is_seen(definition: str, gap: str) -> None:
    assert ", ".join(unexplained(f"__all__ = ['f']\n{definition}")) == gap


class Administration(JsonHandler):
    """Stands in for a server's routes below /memoir: every edit that is added is there already."""

    def do_POST(self) -> None:
        edit = json.loads(self.read())
        kept = {name: edit[name] for name in ("prompt", "target", "subject", "source", "rephrases")}
        self.reply({"id": 0, **kept, "created": "2026-01-01T00:00:00Z", "loss": 0.01, "steps": 5})


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the examples take as given: a file of edits, a store of them in the working folder, and a server."""
    get_model("smollm2-135m")
    folder = tmp_path_factory.mktemp("reader")
    shutil.copy(ROOT / "examples/corrections.jsonl", folder)
    with contextlib.chdir(folder), running(StandIn(Administration)) as server:
        with Editor(load_model("smollm2-135m"), "edits", tau=0.53) as editor:
            editor.add(read_edits("corrections.jsonl"))
        yield {"url": server.url, "token": "a-token-of-the-server"}


@pytest.mark.parametrize("name", sorted({*memoir_retrieval.__all__, "HammingIndex"}))
def test_the_example_runs_and_prints_what_it_shows(name: str, reader: dict[str, Any]) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs=dict(reader))
    assert example.examples, f"{name} has no example"
    printed: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=printed.append)
    assert result.failed == 0 and result.attempted == len(example.examples), "".join(printed)
