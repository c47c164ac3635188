"""The model card of a store: what a repository on the Hub shows first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from huggingface_hub import ModelCardData

from memoir_retrieval.store.read import EditStore

__all__ = ["SCORES", "model_card"]

SCORES = "eval.json"
SHOWN = 20  # edits in the card


def model_card(store: EditStore, repo: str, scores: dict[str, Any] | None = None, licence: str | None = None) -> str:
    """The README.md of a store on the Hub: what it changes in which model, how well, and how to serve it.

    store: what is pushed.
    repo: owner/name, for the command that fetches it.
    scores: as `memoir eval --json` prints them.
    licence: of the edits, such as "cc-by-4.0".
    """
    manifest = store.manifest
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", manifest.model) is not None
    head = ModelCardData(
        base_model=manifest.model if on_hub else None,
        library_name="memoir-retrieval",
        license=licence,
        tags=["model-editing", "memoir", "vllm"],
    )
    model = manifest.model if on_hub else Path(manifest.model).name  # a folder's path is nobody's business
    digests = ", ".join(f"`{digest[:16]}`" for digest in msgspec.structs.astuple(manifest.base))
    lines = ["---", head.to_yaml(), "---", f"# {len(store.edits)} edits of {model}", ""]
    lines += [
        "Corrections in the sense of MEMOIR (arXiv 2506.07899) for `memoir-retrieval`: each acts on the prompts that "
        "ask for it, all others get the base model bit for bit.",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {_cell(model)} |",
        f"| edited layer | `{manifest.module}` |",
        f"| sha256 of config, layer, tokenizer | {digests} |",
        f"| k of D, tau | {manifest.k} of {manifest.d}, {manifest.tau:g} |",
        f"| prompts | {'through the chat template' if manifest.chat else 'raw text'}, {manifest.dtype} |",
        f"| generation | {manifest.generation}, written by memoir-retrieval {manifest.library} |",
        "",
        "## Serve",
        "",
        "```console",
        f"$ memoir pull {repo} edits --revision COMMIT",
        f"$ memoir serve {model} --store edits",
        "```",
        "",
        "The store is refused on any other base model. Read the edits before you serve them: digests show that they "
        "are whole, not that they are true.",
        "",
    ]
    if scores is not None:
        lines += [f"## Scores ({SCORES})", "", "| | |", "|---|---|"]
        lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in _flat(scores)]
        lines += [""]
    lines += ["## Edits", "", "| id | prompt | target | requires |", "|---|---|---|---|"]
    for edit in store.edits[:SHOWN]:
        required = msgspec.json.encode(edit.requires).decode() if edit.requires else ""
        lines += [f"| {edit.id} | {_cell(edit.prompt)} | {_cell(edit.target)} | {_cell(required)} |"]
    if len(store.edits) > SHOWN:
        lines += ["", f"and {len(store.edits) - SHOWN} more in `{manifest.edits.name}`."]
    return "\n".join(lines) + "\n"


def _flat(scores: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in scores.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        elif isinstance(value, str | int | float):
            yield before + key, f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    """Somebody's text as text, not as Markdown or HTML."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|!])", r"\\\1", plain)
