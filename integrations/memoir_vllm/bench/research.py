"""The published way to serve edits, to compare with: Hugging Face, one request at a time, float products of masks.

Kept to what the method's published script does per request, with this project's span and fingerprint, so that only the
way of serving differs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from memoir_index import unpack
from memoir_retrieval.model.forward import span_mean
from memoir_retrieval.question.fingerprint import Fingerprint
from memoir_retrieval.question.span import find_span
from memoir_retrieval.store.base_model import load_model_of
from memoir_retrieval.store.read import EditStore

__all__ = ["ResearchModel"]


class ResearchModel:
    """A loaded model with a store's edits."""

    def __init__(self, store: str | Path, model: str):
        """store: its folder.
        model: its name or folder.
        """
        self._store = EditStore.open(store)
        manifest = self._store.manifest
        self._base = load_model_of(manifest, model, dtype="float32")
        self._fingerprint = Fingerprint(self._store.background, self._store.permutation, manifest.k, self._base.device)
        self._masks = torch.from_numpy(unpack(self._store.codes, manifest.d))
        self._memories = torch.from_numpy(self._store.memories)

    @torch.no_grad()
    def run(self, prompt: list[int], tokens: int) -> float:
        """Seconds to generate greedily, edits on.

        prompt: token ids.
        tokens: how many are generated.
        """
        span = find_span(prompt, self._store.manifest.span)
        acting: list[tuple[torch.Tensor, torch.Tensor]] = []
        first = True

        def add(_module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            nonlocal first
            x = args[0]
            if first:
                mean = span_mean(x[0], span)[None]
                query = torch.from_numpy(unpack(self._fingerprint.codes(mean), x.shape[-1])).float()
                overlaps = (self._masks.float() @ query[0]) / self._store.manifest.k
                best = int(overlaps.argmax())
                if overlaps[best] >= self._store.manifest.tau:
                    acting.append((self._masks[best].float(), self._memories[self._store.memory_of[best]]))
            start = span.acts_from if first else 0
            first = False
            for mask, memory in acting:
                output[:, start:] += functional.linear(x[:, start:] * mask, memory)
            return output

        handle = self._base.projection.register_forward_hook(add)
        try:
            began = time.perf_counter()
            self._base.model.generate(
                input_ids=torch.tensor([prompt], device=self._base.device),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=self._base.device),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
            )
            return time.perf_counter() - began
        finally:
            handle.remove()
