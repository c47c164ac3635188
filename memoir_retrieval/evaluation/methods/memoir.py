"""Ours: `Editor` and `EditedModel`, with the settings of a new raw store.

Edits that the audit refuses are stored all the same, so that they count.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from memoir_retrieval.editing.editor import Editor
from memoir_retrieval.edits.record import Edit
from memoir_retrieval.evaluation.methods.method import Method
from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.lookup.retriever import Retriever
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.store.read import EditStore
from memoir_retrieval.store.settings import Settings

__all__ = ["Memoir"]


class Memoir(Method):
    """See the module. The end token is always trained."""

    name = "memoir"
    batch = None

    def __init__(self, base: BaseModel, **options: Any):
        """base, options: see `Method`."""
        super().__init__(base, **options)
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "store"
        self._model: EditedModel | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """See `Method`."""
        return {"layer": self.base.layer} | msgspec.to_builtins(Settings.of(self.model.retriever.store.manifest))

    @property
    def bytes(self) -> int:
        """See `Method`: of everything in the store."""
        return sum(file.stat().st_size for file in self._path.rglob("*") if file.is_file())

    def edit(self, edits: Sequence[Edit]) -> None:
        """See `Method`."""
        self._model = None
        with Editor(self.base, self._path, chat=False) as editor:
            editor.add(edits, on_conflict="both", keep_failed=True)

    @property
    def model(self) -> EditedModel:
        """The model with the edits on."""
        if self._model is None:
            self._model = EditedModel(Retriever(EditStore.open(self._path), self.base))
        return self._model

    def choices(self, prompts: Sequence[list[int]], targets: Sequence[list[int]]) -> list[list[int]]:
        """See `Method`."""
        return [list(answer.tokens) for answer in self.model.predict(prompts, targets)]

    def answers(self, prompts: Sequence[list[int]], tokens: int) -> list[str]:
        """See `Method`."""
        texts = [answer.text for answer in self.model.generate(prompts, max_new_tokens=tokens)]
        return [(text.strip().splitlines() or [""])[0].strip() for text in texts]

    def loss(self, texts: Sequence[list[int]]) -> float:
        """See `Method`."""
        pairs = zip(*self.model.compare(texts), strict=True)
        return self.changed_loss(texts, [sum(before.logprobs) - sum(after.logprobs) for after, before in pairs])

    def close(self) -> None:
        """See `Method`."""
        self._folder.cleanup()
