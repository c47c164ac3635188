"""Docstrings of public names: a line for each parameter and field, and examples that run."""

from __future__ import annotations

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
        with Editor(load_model("smollm2-135m"), "edits") as editor:
            editor.add(read_edits("corrections.jsonl"))
        yield {"url": server.url, "token": "a-token-of-the-server"}


@pytest.mark.parametrize("name", sorted({*memoir_retrieval.__all__, "HammingIndex"}))
def test_the_example_runs_and_prints_what_it_shows(name: str, reader: dict[str, Any]) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs=dict(reader))
    assert example.examples, f"{name} has no example"
    printed: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=printed.append)
    assert result.failed == 0 and result.attempted == len(example.examples), "".join(printed)
