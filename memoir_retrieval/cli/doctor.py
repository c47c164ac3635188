"""`memoir doctor`: what is installed, what is missing, and what to type."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import click

from memoir_retrieval.cli.common import echo, echo_json, json_option
from memoir_retrieval.edits.judge import judge_named
from memoir_retrieval.errors import MemoirError, ModelError, StoreError
from memoir_retrieval.model.adapter import split_adapter
from memoir_retrieval.model.base import identify, resolve
from memoir_retrieval.model.embedded import EMBEDDED
from memoir_retrieval.store.manifest import library_version
from memoir_retrieval.store.read import EditStore

QUESTION = "What is the capital of France?"
TOKENS = 16


class Finding(NamedTuple):
    """One line of the report. `state`: ok, warn (not needed by everyone) or fail."""

    check: str
    state: str
    detail: str


@click.command()
@click.option("--store", "-s", type=click.Path(path_type=Path), help="Also check a store.")
@click.option("--model", "-m", help="Also check a model (default: the store's own).")
@click.option("--quick", is_flag=True, help="Leave out the self-test, which loads the model.")
@json_option
def doctor(store: Path | None, model: str | None, quick: bool, as_json: bool) -> None:
    """Check versions, plugin, model and store, and ask one prompt. Exit code 1 where something fails.

    \b
    Example:
      memoir doctor --store edits
    """
    findings = list(_findings(store, model, quick))
    if as_json:
        echo_json([finding._asdict() for finding in findings])
    else:
        for check, state, detail in findings:
            echo(f"{state:4s}  {check:18s} {detail}")
    if any(finding.state == "fail" for finding in findings):
        raise click.exceptions.Exit(1)


def _findings(store: Path | None, model: str | None, quick: bool) -> Iterator[Finding]:
    yield Finding("python", "ok", sys.version.split()[0])
    yield Finding("memoir-retrieval", "ok", library_version())
    yield _version("torch", "fail", "pip install torch")
    yield _version("transformers", "fail", "pip install transformers")
    yield from _torchvision()
    yield _version("faiss", "fail", "pip install faiss-cpu")
    vllm = _version("vllm", "warn", "pip install 'memoir-retrieval[vllm]' to serve (on a CPU see the Makefile)")
    yield vllm
    yield _version(
        "openai", "warn", "pip install 'memoir-retrieval[eval]' for `memoir demo`, `verify` and `eval --server`"
    )
    yield _plugin(vllm.state == "ok")
    yield from _administration()
    name = model or _model_of(store) or next(iter(EMBEDDED))
    parts = [_try(f"model {name}", lambda: str(resolve(name)), "fail" if model or store else "warn")]
    if store is not None:
        parts.append(_try(f"store {store}", lambda: _store(store, name), "fail"))
    yield from parts
    if not quick and all(part.state == "ok" for part in parts):
        yield _try("self-test", lambda: _self_test(store, name), "fail")


def _plugin(vllm: bool) -> Finding:
    """That vLLM finds the plugin, and that the environment lets it load it. vllm: whether vLLM is installed."""
    points = [point for point in entry_points(group="vllm.general_plugins") if point.name == "memoir"]
    fix = "pip install memoir-retrieval into this Python"
    if not points:
        return Finding("vLLM plugin", "fail", f"entry point not found: {fix}")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "memoir" not in allowed.split(","):
        return Finding("vLLM plugin", "fail", f"VLLM_PLUGINS is {allowed!r}: add memoir to it, or unset it")
    if vllm:
        try:
            points[0].load()
        except Exception as error:  # whatever an import may raise, vLLM would log it and serve without edits
            return Finding("vLLM plugin", "fail", f"{points[0].value} cannot be imported: {_first_line(error)}; {fix}")
    return Finding("vLLM plugin", "ok", points[0].value)


def _administration() -> Iterator[Finding]:
    """Only where a token asks for it: vLLM adds the routes of a plugin that VLLM_PLUGINS names, and no others."""
    if not os.environ.get("MEMOIR_ADMIN_TOKEN"):
        return
    if not [point for point in entry_points(group="vllm.endpoint_plugins") if point.name == "memoir"]:
        yield Finding("administration", "fail", "entry point not found: pip install memoir-retrieval into this Python")
    elif "VLLM_PLUGINS" not in os.environ:
        yield Finding(
            "administration",
            "warn",
            "`vllm serve` needs VLLM_PLUGINS=memoir beside the token; `memoir serve` sets it",
        )
    else:
        yield Finding("administration", "ok", "MEMOIR_ADMIN_TOKEN is set")


def _self_test(store: Path | None, model: str) -> str:
    """One prompt from text to answer: the newest edit must find itself, or the model must say something."""
    from memoir_retrieval.edits.record import as_prompt
    from memoir_retrieval.lookup.reference import EditedModel
    from memoir_retrieval.model.base import load_model
    from memoir_retrieval.question.prompts import prompt_ids

    edited = EditedModel.open(store, model) if store else None
    if edited and edited.retriever.store.edits:
        edit = edited.retriever.store.edits[-1]
        (answer,) = edited.generate([as_prompt(edit)], max_new_tokens=TOKENS)
        if answer.edit != edit.id:
            owner = "no edit" if answer.edit is None else f"edit {answer.edit}"
            raise StoreError(
                f"the prompt of edit {edit.id} matches {owner} (overlap {answer.overlap:.3f}, tau "
                f"{edited.retriever.tau}): `memoir calibrate {store}` suggests another tau"
            )
        if answer.overlap < edited.retriever.tau:  # it is known by its words
            raise StoreError(
                f"the prompt of edit {edit.id} gives a mask far from the stored one (overlap {answer.overlap:.3f}, tau "
                f"{edited.retriever.tau}): `memoir index verify {store}` says which masks are wrong"
            )
        text = answer.text.strip()
        return f"the prompt of edit {edit.id} matches it, overlap {answer.overlap:.3f}, and is answered {text!r}"
    base = edited.base if edited else load_model(model)
    rows = prompt_ids(base.tokenizer, QUESTION, chat=bool(getattr(base.tokenizer, "chat_template", None)))
    import torch

    with torch.no_grad():
        logits = base.model(input_ids=torch.tensor([rows], device=base.device), logits_to_keep=1).logits
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(f"model {model} gives NaN or infinite numbers: fetch it again, or use another dtype")
    return f"{base.module} of {model} can be edited; asked {QUESTION!r} it begins with " + repr(
        base.tokenizer.decode([int(logits[0, -1].argmax())]).strip()
    )


def _version(package: str, missing: str, fix: str) -> Finding:
    try:
        return Finding(package, "ok", str(import_module(package).__version__))
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return Finding(package, missing, f"{_first_line(error)}; {fix}")


def _torchvision() -> Iterator[Finding]:
    """Most vision-language models need it on vLLM. Where it was built for another torch ("operator torchvision::nms
    does not exist"), transformers fails to import any model."""
    if find_spec("torchvision") is not None:
        yield _version("torchvision", "fail", "install the build of your torch, or pip uninstall torchvision")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _model_of(store: Path | None) -> str | None:
    try:
        return EditStore.open(store).manifest.model if store else None
    except MemoirError:
        return None


def _store(store: Path, model: str) -> str:
    opened = EditStore.open(store)
    judge_named(opened.manifest.judge, store)
    opened.require(identify(resolve(model), opened.manifest.module, split_adapter(model)[1]), model)
    return f"{len(opened.edits)} edits, generation {opened.manifest.generation}, fits {model}"


def _try(check: str, run: Callable[[], str], bad: str) -> Finding:
    try:
        return Finding(check, "ok", run())
    except (MemoirError, OSError) as error:
        return Finding(check, bad, str(error))
