"""Reading: the edit's sentence stands before the question, and no weight changes.

In-context editing without demonstrations, in the words of IKE (Zheng et al. 2023, arXiv 2305.12740): "New Fact: prompt
target", then "Prompt: question". `reading` reads where memoir's router matches an edit (masks and judge), and asks the
plain question elsewhere. `retrieval` always reads the edit whose prompt is nearest by embedding, as plain retrieval
does: the embedding is the model's own mean last hidden state minus its mean over unrelated prompts, at unit length,
since no embedder's weights come with the library.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from memoir_retrieval.background import background_prompts
from memoir_retrieval.editing.build_masks import build
from memoir_retrieval.editing.editor import Editor
from memoir_retrieval.edits.record import Edit
from memoir_retrieval.evaluation.methods.method import Method
from memoir_retrieval.lookup.retriever import Retriever
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.store.read import EditStore

__all__ = ["FactReading", "Retrieval"]


class FactReading(Method):
    """See the module."""

    name = "reading"
    batch = None

    def __init__(self, base: BaseModel, **options: Any):
        """base, options: see `Method`."""
        super().__init__(base, **options)
        self.edits: list[Edit] = []
        self._folder = tempfile.TemporaryDirectory()

    @property
    def bytes(self) -> int:
        """See `Method`: the texts, and what finds them."""
        return sum(len(f"{edit.prompt}{edit.target}".encode()) for edit in self.edits) + len(self.edits) * self.width

    @property
    def width(self) -> int:
        """Bytes of what finds an edit."""
        return self.base.d // 8

    def edit(self, edits: Sequence[Edit]) -> None:
        """See `Method`."""
        self.edits += edits
        path = Path(self._folder.name) / str(len(self.edits))
        with Editor(self.base, path, chat=False) as editor:
            build(editor, self.edits)
        self.retriever = Retriever(EditStore.open(path), self.base)

    def matches(self, prompts: Sequence[list[int]]) -> list[Edit | None]:
        """The edit that is read for each prompt.

        prompts: token ids.
        """
        texts = [self.base.tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
        return [self.edits[match.id] if match else None for match in self.retriever.lookup_batch(texts)]

    def rendered(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """See `Method`."""
        out: list[list[int]] = []
        for prompt, edit in zip(prompts, self.matches(prompts), strict=True):
            question = self.base.tokenizer.decode(prompt, skip_special_tokens=True)
            fact = f"New Fact: {edit.prompt} {edit.target}\nPrompt: {question}" if edit else ""
            out.append(self.ids(fact) if edit else prompt)
        return out

    def close(self) -> None:
        """See `Method`."""
        self._folder.cleanup()
        super().close()


class Retrieval(FactReading):
    """See the module."""

    name = "retrieval"

    def __init__(self, base: BaseModel, **options: Any):
        """base, options: see `Method`."""
        super().__init__(base, **options)
        self.mean = self._states([self.ids(text) for text in background_prompts()]).mean(0)
        self.embeddings = torch.zeros(0, base.h)

    @property
    def width(self) -> int:
        """See `FactReading`."""
        return 4 * self.base.h

    def edit(self, edits: Sequence[Edit]) -> None:
        """See `Method`."""
        self.edits += edits
        self.embeddings = torch.cat([self.embeddings, self._embeddings([self.ids(edit.prompt) for edit in edits])])

    def matches(self, prompts: Sequence[list[int]]) -> list[Edit | None]:
        """See `FactReading`."""
        nearest = (self._embeddings(prompts) @ self.embeddings.T).argmax(1)
        return [self.edits[i] for i in nearest.tolist()]

    def _embeddings(self, rows: Sequence[list[int]]) -> torch.Tensor:
        return functional.normalize(self._states(rows) - self.mean, dim=1)

    @torch.no_grad()
    def _states(self, rows: Sequence[list[int]]) -> torch.Tensor:
        """Mean last hidden state of each row: [N, H]."""
        out = [torch.zeros(0, self.base.h, device=self.base.device)]
        for row in rows:
            ids = torch.tensor([row], device=self.base.device)
            states = self.base.model(input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1)
            out.append(states.hidden_states[-1][0].float().mean(0, keepdim=True))
        return torch.cat(out)
