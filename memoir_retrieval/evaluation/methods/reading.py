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
from memoir_retrieval.editing.editor import Editor
from memoir_retrieval.edits.record import Edit, stored_as
from memoir_retrieval.evaluation.methods.method import Method
from memoir_retrieval.lookup.retriever import Retriever
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.model.forward import question_means
from memoir_retrieval.question.span import find_span
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
        self._path = Path(self._folder.name) / "store"

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
        with Editor(self.base, self._path, chat=False) as editor:
            store = editor.store
            rows = [self.ids(edit.prompt) for edit in edits]
            means = question_means(self.base, rows, [find_span(ids, store.manifest.span) for ids in rows])
            for edit, code in zip(edits, store.fingerprint.codes(means), strict=True):
                masked = stored_as(edit, id=store.manifest.next_id, created="", loss=0.0, steps=0, trained=False)
                store.add(masked, code[None], torch.empty(0, dtype=torch.int64), None)
            store.commit()
        self.retriever = Retriever(EditStore.open(self._path), self.base)

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

    @torch.no_grad()
    def loss(self, texts: Sequence[list[int]]) -> float:
        """See `Method`: where a fact is read, the text's tokens behind it."""
        changes: list[float] = []
        for row, text in zip(self.rendered(texts), texts, strict=True):
            n = _common_end(row, text[1:])  # what follows a colon may begin with other tokens
            changes.append(self._surprise(row, n) - self._surprise(text, n) if row != text else 0.0)
        return self.changed_loss(texts, changes)

    def _surprise(self, row: list[int], n: int) -> float:
        """Negative log-likelihood of the last n tokens, in nats."""
        ids = torch.tensor([row], device=self.base.device)
        logits = self.base.model(input_ids=ids, use_cache=False).logits[0, len(row) - 1 - n : -1]
        return float(functional.cross_entropy(logits.float(), ids[0, len(row) - n :], reduction="sum"))

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
        self.mean = self.once("mean state", lambda: self._states([self.ids(t) for t in background_prompts()]).mean(0))
        self.embeddings = torch.zeros(0, base.h, device=base.device)

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


def _common_end(a: Sequence[int], b: Sequence[int]) -> int:
    """How many last tokens of two rows are the same."""
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return n
