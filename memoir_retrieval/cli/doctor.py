"""`memoir doctor`: what is installed, what is missing, and what to type."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import click

from memoir_retrieval.cli.common import echo_json, json_option
from memoir_retrieval.embedded import EMBEDDED
from memoir_retrieval.errors import MemoirError
from memoir_retrieval.model import identify, resolve
from memoir_retrieval.store import EditStore, library_version


class Finding(NamedTuple):
    """One line of the report. `state`: ok, warn (not needed by everyone) or fail."""

    check: str
    state: str
    detail: str


@click.command()
@click.option("--store", "-s", type=click.Path(path_type=Path), help="Also check a store.")
@click.option("--model", "-m", help="Also check a model (default: the store's own).")
@json_option
def doctor(store: Path | None, model: str | None, as_json: bool) -> None:
    """Check versions, plugin, model and store. Exit code 1 where something fails.

    \b
    Example:
      memoir doctor --store edits
    """
    found = list(_findings(store, model))
    if as_json:
        echo_json([finding._asdict() for finding in found])
    else:
        for check, state, detail in found:
            click.echo(f"{state:4s}  {check:18s} {detail}")
    if any(finding.state == "fail" for finding in found):
        raise click.exceptions.Exit(1)


def _findings(store: Path | None, model: str | None) -> Iterator[Finding]:
    yield Finding("python", "ok", sys.version.split()[0])
    yield Finding("memoir-retrieval", "ok", library_version())
    yield _version("torch", "fail", "pip install torch")
    yield _version("transformers", "fail", "pip install transformers")
    yield from _torchvision()
    yield _version("faiss", "fail", "pip install faiss-cpu")
    yield _version("vllm", "warn", "pip install 'memoir-retrieval[vllm]' to serve (on a CPU see the Makefile)")
    yield _version(
        "openai", "warn", "pip install 'memoir-retrieval[eval]' for `memoir demo` and `memoir eval --server`"
    )
    plugins = [point.value for point in entry_points(group="vllm.general_plugins") if point.name == "memoir"]
    yield (
        Finding("vLLM plugin", "ok", plugins[0])
        if plugins
        else Finding("vLLM plugin", "fail", "entry point not found: pip install memoir-retrieval into this Python")
    )
    name = model or _model_of(store) or next(iter(EMBEDDED))
    yield _try(f"model {name}", lambda: str(resolve(name)), "fail" if model or store else "warn")
    if store is not None:
        yield _try(f"store {store}", lambda: _store(store, name), "fail")


def _version(package: str, missing: str, fix: str) -> Finding:
    try:
        return Finding(package, "ok", str(import_module(package).__version__))
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return Finding(package, missing, f"{_first_line(error)}; {fix}")


def _torchvision() -> Iterator[Finding]:
    """Not needed, but where it was built for another torch ("operator torchvision::nms does not exist"),
    transformers fails to import any model."""
    if find_spec("torchvision") is not None:
        yield _version("torchvision", "fail", "it is not needed: pip uninstall torchvision")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _model_of(store: Path | None) -> str | None:
    try:
        return EditStore.open(store).manifest.model if store else None
    except MemoirError:
        return None


def _store(store: Path, model: str) -> str:
    opened = EditStore.open(store)
    opened.require(identify(resolve(model), opened.manifest.module), model)
    return f"{len(opened.edits)} edits, generation {opened.manifest.generation}, fits {model}"


def _try(check: str, run: Callable[[], str], bad: str) -> Finding:
    try:
        return Finding(check, "ok", run())
    except (MemoirError, OSError) as error:
        return Finding(check, bad, str(error))
