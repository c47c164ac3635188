"""The order of the house: which folder may import which, what the map in CONTRIBUTING names, and that names are unique.

Read from the source, so imports inside functions and those for type checkers count like any other.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import memoir_retrieval

ROOT = Path(__file__).parents[2]
PACKAGES = {"memoir_index": ROOT / "index", "memoir_retrieval": ROOT, "memoir_vllm": ROOT / "integrations"}

# From the ground up. A room may import what stands on a lower floor, and itself; not its neighbours.
FLOORS = (
    ("memoir_index",),
    ("memoir_retrieval.errors", "memoir_retrieval.background", "memoir_vllm.patches"),
    ("memoir_retrieval.question",),
    ("memoir_retrieval.edits", "memoir_retrieval.model"),
    ("memoir_retrieval.store",),
    ("memoir_retrieval.lookup", "memoir_retrieval.editing"),
    ("memoir_retrieval.evaluation", "memoir_retrieval.client", "memoir_vllm.config"),
    ("memoir_retrieval.cli", "memoir_vllm.requests", "memoir_vllm.refusals"),
    ("memoir_vllm.front", "memoir_vllm.core", "memoir_vllm.worker"),
    ("memoir_vllm.admin", "memoir_vllm.bench"),
    ("memoir_retrieval", "memoir_vllm"),  # the public face, and the entry point
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the three packages by its dotted name."""
    return {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for package, root in PACKAGES.items()
        for file in (root / package).rglob("*.py")
    }


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of the three packages that a module imports anywhere in its text."""
    targets: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name} imports relatively: write the whole name"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            targets |= whole & MODULES.keys() or {node.module}
    return (targets & MODULES.keys()) - {name}


IMPORTS = {name: imports(name) for name in MODULES}


def room(name: str) -> str:
    """The entry of FLOORS to which a module belongs: the longest that is the module or a folder above it."""
    parts = name.split(".")
    return next(above for n in range(len(parts), 0, -1) if (above := ".".join(parts[:n])) in LEVEL)


def upward(edges: dict[str, set[str]]) -> list[str]:
    return [
        f"{name} imports {target}"
        for name, targets in edges.items()
        for target in targets
        if room(target) != room(name) and LEVEL[room(target)] >= LEVEL[room(name)]
    ]


def test_no_import_runs_up_or_sideways_between_the_floors() -> None:
    assert len(IMPORTS) > 90 and sum(len(targets) for targets in IMPORTS.values()) > 300
    assert upward(IMPORTS) == []


def test_an_import_that_runs_up_or_sideways_is_seen() -> None:
    up = {"memoir_retrieval.store.read": {"memoir_retrieval.lookup.masks"}}
    sideways = {"memoir_retrieval.edits.record": {"memoir_retrieval.model.base"}}
    down = {"memoir_retrieval.lookup.masks": {"memoir_retrieval.store.read"}}
    assert (len(upward(up)), len(upward(sideways)), len(upward(down))) == (1, 1, 0)


def test_no_module_imports_itself_through_others() -> None:
    assert len(list(TopologicalSorter(IMPORTS).static_order())) == len(MODULES)  # CycleError names a circle


def test_every_room_is_there() -> None:
    assert {room(name) for name in MODULES} == set(LEVEL)


@pytest.mark.parametrize("package", ["memoir_index", "memoir_retrieval"])
def test_the_library_imports_no_plugin(package: str) -> None:
    names = [name for name in MODULES if name.split(".")[0] == package]
    assert not [n for n in names if any(target.startswith("memoir_vllm") for target in IMPORTS[n])]


def dotted_strings(name: str) -> Iterator[str]:
    """Strings that look like a module or a name in one, docstrings aside."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and re.fullmatch(r"memoir_(index|retrieval|vllm)(\.\w+)+", text):
            yield text


def test_what_is_named_in_a_string_is_there() -> None:
    """vLLM and subprocesses get our modules and classes by name, which no import checks."""
    seen = defaultdict(list)
    for name in MODULES:
        for text in dotted_strings(name):
            module, _, attribute = (text, "", "") if text in MODULES else text.rpartition(".")
            assert module in MODULES, f"{name} names {text}"
            assert not attribute or re.search(rf"^(class|def) {attribute}\b", MODULES[module].read_text(), re.M), text
            seen[text.split(".")[0]].append(name)
    assert seen["memoir_vllm"]
    # Outside the plugin only commands start it, each in a process of its own.
    assert {room(name) for name in seen["memoir_vllm"]} <= {
        "memoir_retrieval.cli",
        *(entry for entry in LEVEL if entry.startswith("memoir_vllm")),
    }


def test_the_public_face_is_imported_by_nobody_inside() -> None:
    assert not [name for name, targets in IMPORTS.items() if "memoir_retrieval" in targets]
    homes = {f"memoir_retrieval.{home}" for home in memoir_retrieval._HOME.values()}
    assert homes <= MODULES.keys() and homes == IMPORTS["memoir_retrieval"]


def test_no_class_name_stands_twice() -> None:
    places = defaultdict(list)
    for name, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name)
    assert len(places) > 100
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


BARE = {"found", "made", "asked", "told", "one"}
"""What says of a value only that somebody has it: no name of a thing that has a noun."""

KEYS = {"found": {"Checkpoint", "EditScores", "OtherWords", "Row"}, "asked": {"Passed", "Row"}}
"""Fields of files that a run writes, by the classes that describe them; readers of those files know them."""


def bare_names(text: str) -> list[str]:
    """Identifiers of a module that are among BARE, underscores in front aside, but for the fields in KEYS."""
    tree = ast.parse(text)
    fields = {
        id(statement.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and node.name in KEYS.get(statement.target.id, ())
    }
    names = [name for node in ast.walk(tree) if id(node) not in fields for name in identifiers(node)]
    return [name for name in names if name.lstrip("_") in BARE]


def identifiers(node: ast.AST) -> Iterator[str]:
    """The names that a node of a syntax tree gives to something or reads; attributes in KEYS are fields of records."""
    match node:
        case ast.Name(id=name) | ast.arg(arg=name) | ast.alias(asname=str(name)) | ast.ExceptHandler(name=str(name)):
            yield name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            yield name
        case ast.Attribute(attr=name) if name not in KEYS:
            yield name
        case ast.Attribute(attr=name, value=ast.Name(id="self"), ctx=ast.Store()):
            yield name
        case ast.keyword(arg=str(name)) if name not in KEYS:
            yield name
        case ast.Global(names=names) | ast.Nonlocal(names=names):
            yield from names


def test_nothing_is_called_found_made_asked_told_or_one() -> None:
    names = {name: bare_names(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}
    assert {name: bare for name, bare in names.items() if bare} == {}
    classes = {
        node.name: {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}
        for file in MODULES.values()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    assert all(key in classes[owner] for key, owners in KEYS.items() for owner in owners)


@pytest.mark.parametrize(
    "text",
    [
        "found = 1",
        "[one.prompt for one in edits]",
        "def told(x): pass",
        "def f(*, _made): pass",
        "class F:\n    async def asked(self): pass",
        "class Hits:\n    found: int",
        "self.found = 1",
        "bar.update(told=1)",
        "import os as made",
        "with lock as (one, _): pass",
        "match x:\n    case [found]: pass",
        "try: pass\nexcept OSError as told: pass",
        "f'{one!r}'",
    ],
)
def test_a_bare_name_is_seen(text: str) -> None:
    assert bare_names(text)


@pytest.mark.parametrize(
    "text", ["row.found", "Row(asked=1, found=2)", "class Row:\n    asked: int", "x['one']", "one_row = 1"]
)
def test_keys_of_files_and_longer_names_are_let_through(text: str) -> None:
    assert bare_names(text) == []


def working_asserts(text: str) -> list[str]:
    """Asserts that do more than say that plain names and attributes are not None, which type checkers want to hear."""
    asserts = [node.test for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assert)]
    return [ast.unparse(test) for test in asserts if not all(map(is_not_none, parts_of(test)))]


def parts_of(test: ast.expr) -> list[ast.expr]:
    return test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]


def is_not_none(test: ast.expr) -> bool:
    """Whether this is `NAME is not None` or `NAME.ATTRIBUTE is not None`."""
    return re.fullmatch(r"[\w.]+ is not None", ast.unparse(test)) is not None


def test_no_assert_does_work_or_guards_data() -> None:
    """`python -O` leaves asserts out: what must happen may not stand in one."""
    asserts = {name: working_asserts(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}
    assert {name: tests for name, tests in asserts.items() if tests} == {}
    assert working_asserts("assert self._checked") == ["self._checked"]
    assert working_asserts("assert check() is not None") == ["check() is not None"]


def test_files_that_the_code_names_are_there() -> None:
    """Comments and docstrings name neighbours as `file.py`."""
    files = {file.name for file in MODULES.values()}
    seen = 0
    for name, path in MODULES.items():
        for file in re.findall(r"`(?:\w+/)?(\w+\.py)`", path.read_text(encoding="utf-8")):
            assert file in files, f"{name} names {file}"
            seen += 1
    assert seen > 10


def test_what_the_code_names_of_a_module_stands_in_it() -> None:
    """Comments and docstrings name what others define as `module.name`; `name` may be a module of a folder, too."""
    words: dict[str, set[str]] = defaultdict(set)
    for name, path in MODULES.items():
        folder, _, module = name.rpartition(".")
        words[module] |= set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
        words[folder.rpartition(".")[2]].add(module)
    assert "masked" in words["record"] and "record" in words["edits"]
    for name, path in MODULES.items():
        for module, word in re.findall(r"`(\w+)\.(\w+)`", path.read_text(encoding="utf-8")):
            known = module not in words or word in words[module] | {"json", "jsonl", "py"}
            assert known, f"{name} names {module}.{word}"


def mapped() -> list[str]:
    """Files that the map in CONTRIBUTING names, relative to the root, in its order.

    A line is a name, two blanks or more, and what it is for. A name that ends in / is a folder: its files are indented
    below it, and its line stands for its `__init__.py`.
    """
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^## The map of the house\n.*?^```\n(.*?)^```$", text, re.M | re.S)
    files, folders = [], {-1: ""}
    for line in block.splitlines():
        indent, name, purpose = re.fullmatch(r"( *)(\S+)(?: {2,}(\S.*))?", line).groups()
        depth = len(indent) // 2
        assert purpose, f"{name}: the map does not say what it is for"
        if name.endswith("/"):
            folders[depth] = folders[depth - 1] + name
            files.append(folders[depth] + "__init__.py")
        else:
            files.append(folders[depth - 1] + name)
    return files


def test_the_map_names_every_module_once_and_nothing_else() -> None:
    files = {str(file.relative_to(ROOT)) for file in MODULES.values()}
    names = mapped()
    assert len(names) == len(set(names))
    assert {"missing": files - set(names), "gone": set(names) - files} == {"missing": set(), "gone": set()}
