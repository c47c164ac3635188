"""MEMOIR edits for language models: train them, store them, look them up, measure them.

>>> from memoir_retrieval import Editor, load_model, read_edits
>>> base = load_model("smollm2-135m")
>>> with Editor(base, "edits") as editor:
...     editor.add(read_edits("corrections.jsonl"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memoir_retrieval.client.admin import AdminClient
    from memoir_retrieval.editing.editor import Editor
    from memoir_retrieval.edits.files import read_edits
    from memoir_retrieval.edits.record import Edit, Probe, StoredEdit
    from memoir_retrieval.errors import MemoirError
    from memoir_retrieval.evaluation.measure import evaluate
    from memoir_retrieval.lookup.reference import EditedModel
    from memoir_retrieval.lookup.retriever import Match, Retriever
    from memoir_retrieval.model.base import load_model
    from memoir_retrieval.store.read import EditStore
    from memoir_retrieval.store.remove import find_prompts, remove_edits
    from memoir_retrieval.store.settings import Training

__all__ = [
    "AdminClient",
    "Edit",
    "EditStore",
    "EditedModel",
    "Editor",
    "Match",
    "MemoirError",
    "Probe",
    "Retriever",
    "StoredEdit",
    "Training",
    "evaluate",
    "find_prompts",
    "load_model",
    "read_edits",
    "remove_edits",
]

_HOME = {
    "AdminClient": "client.admin",
    "Edit": "edits.record",
    "EditStore": "store.read",
    "EditedModel": "lookup.reference",
    "Editor": "editing.editor",
    "Match": "lookup.retriever",
    "MemoirError": "errors",
    "Probe": "edits.record",
    "Retriever": "lookup.retriever",
    "StoredEdit": "edits.record",
    "Training": "store.settings",
    "evaluate": "evaluation.measure",
    "find_prompts": "store.remove",
    "load_model": "model.base",
    "read_edits": "edits.files",
    "remove_edits": "store.remove",
}


def __getattr__(name: str) -> Any:
    # Reading a store or printing help must not cost the seconds that importing torch takes.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
