"""The editing methods that `memoir bench methods` compares, each in a module of its own, from its paper's equations."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memoir_retrieval.evaluation.methods.method import Method
    from memoir_retrieval.model.base import BaseModel

__all__ = ["LOCATED", "METHODS", "open_method"]

METHODS = {
    "base": "method.Unedited",
    "memoir": "memoir.Memoir",
    "ft": "ft.FineTuning",
    "lora": "lora.Lora",
    "grace": "grace.Grace",
    "defer": "defer.Defer",
    "wise": "wise.Wise",
    "rome": "rome.Rome",
    "memit": "memit.Memit",
    "alphaedit": "alphaedit.AlphaEdit",
    "ultraedit": "ultraedit.UltraEdit",
    "published": "published.PublishedLoop",
    "reading": "reading.FactReading",
    "retrieval": "reading.Retrieval",
}
"""Name -> module and class."""

LOCATED = ("rome", "memit", "alphaedit")
"""Methods that take statistics of a corpus."""


def open_method(
    name: str,
    base: BaseModel,
    *,
    end: bool = True,
    texts: Sequence[str] = (),
    known: dict[Hashable, Any] | None = None,
) -> Method:
    """A method on a model, prepared for edits and to be closed when it is not needed any more.

    name: one of `METHODS`.
    base, end, texts, known: see `Method`.
    """
    module, _, kind = METHODS[name].partition(".")
    method: Method = getattr(import_module(f"{__name__}.{module}"), kind)(base, end=end, texts=texts, known=known)
    method.prepare()
    return method
