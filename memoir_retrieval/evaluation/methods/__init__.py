"""The editing methods that `memoir bench methods` compares, each in a module of its own, from its paper's equations."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from memoir_retrieval.errors import ConfigError, MemoirError, Reason

if TYPE_CHECKING:
    from memoir_retrieval.evaluation.methods.method import Method
    from memoir_retrieval.model.base import BaseModel

__all__ = ["LOCATED", "METHODS", "check_methods", "open_method"]

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


def check_methods(names: Iterable[str], base: BaseModel) -> None:
    """Raise ConfigError where some of the methods cannot edit a model: which, and why.

    names: out of `METHODS`.
    base: the model.
    """
    reasons: dict[str, list[str]] = {}
    for name in names:
        try:
            _kind(name).check(base)
        except MemoirError as error:
            reasons.setdefault(str(error), []).append(name)
    if reasons:
        facts = "; ".join(f"{', '.join(of)}: {reason}" for reason, of in reasons.items())
        raise ConfigError(f"not every method can be run ({facts})", cure="leave these out", reason=Reason.METHODS)


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

    Raises what `Method.check` raises.
    """
    kind = _kind(name)
    kind.check(base)
    method = kind(base, end=end, texts=texts, known=known)
    method.prepare()
    return method


def _kind(name: str) -> type[Method]:
    module, _, kind = METHODS[name].partition(".")
    method: type[Method] = getattr(import_module(f"{__name__}.{module}"), kind)
    return method
