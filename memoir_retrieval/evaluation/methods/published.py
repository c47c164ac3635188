"""The published MEMOIR: the training loop and the routing of the paper's code.

Wang et al. 2025 (arXiv 2506.07899): the mask is Eq. 3 over all tokens of the prompt, each counted alike, minus the mean
of unrelated prompts; the residual of Eq. 2 is trained on the prompt and the prompt after 10 prefixes that the model
wrote, and looked up by Eq. 4. SGD with learning rate 1.0 on all of the memory, gradients clipped to norm 1.0, 70
steps at most: training ends once the loss is at most .02 and moves by at most 1e-4.

Deviations: 70 steps, as WISE has them here; the authors' configuration for LLaMA-3-8B has 30, as `published_loop.py`.
The twelfth row of the published batch, an unrelated prompt that has no part in the loss, is left out; the blocks below
the layer are run once. No weight decay: the published optimiser shrinks every column a little. The request is looked up
once, where the published code looks up each generated token again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from memoir_index import unpack
from memoir_retrieval.background import background_prompts
from memoir_retrieval.edits.record import Edit
from memoir_retrieval.evaluation.methods.descent import Settled, descend
from memoir_retrieval.evaluation.methods.method import SEED, PrefixedMethod
from memoir_retrieval.evaluation.methods.rows import Rows
from memoir_retrieval.evaluation.published_loop import CLIP, RATE
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.model.forward import question_means
from memoir_retrieval.model.presets import preset_for
from memoir_retrieval.question.fingerprint import Fingerprint, permutation
from memoir_retrieval.question.span import Span

__all__ = ["PublishedLoop"]

STEPS = 70


class PublishedLoop(PrefixedMethod):
    """See the module."""

    name = "published"

    def __init__(self, base: BaseModel, **options: Any):
        """base, options: see `Method`."""
        super().__init__(base, **options)
        self.preset = preset_for(base.model.config).at(base.place, base.d)
        self.memory = torch.zeros(base.h, base.d, device=base.device)
        self.masks = torch.zeros(0, base.d, device=base.device)
        mean = self.once("mean activation", self._mean).cpu().numpy()
        self.fingerprint = Fingerprint(mean, permutation(base.d, SEED), self.preset.k, base.device)

    def _mean(self) -> torch.Tensor:
        """Of the tokens of unrelated prompts, each prompt counted alike: [D]."""
        rows = [self.ids(text) for text in background_prompts()]
        return question_means(self.base, rows, [Span(0, len(row)) for row in rows]).mean(0)

    @property
    def settings(self) -> dict[str, Any]:
        """See `Method`."""
        fixed = {"steps": STEPS, "rate": RATE, "clip": CLIP, "prefixes": len(self.prefixes)}
        return {"layer": self.base.layer, "k": self.preset.k, "tau": self.preset.tau, **fixed}

    @property
    def bytes(self) -> int:
        """See `Method`: the memory, and a mask in bits for each edit."""
        return 4 * self.memory.numel() + self.masks.numel() // 8

    def _masks(self, means: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(unpack(self.fingerprint.codes(means), self.base.d), device=means.device).float()

    def edit(self, edits: Sequence[Edit]) -> None:
        """See `Method`."""
        for edit in edits:
            prompts = [edit.prompt, *(f"{prefix} {edit.prompt}" for prefix in self.prefixes)]
            rows = Rows(self.base, [self.ids(text) for text in prompts], [self.answer_ids(edit)] * len(prompts))
            mask = self._masks(rows.activations[:1, : rows.starts[0]].mean(1))
            memory = self.memory.clone().requires_grad_()
            with self.training(), self._added(mask.expand(len(prompts), -1), memory):
                descend(
                    torch.optim.SGD([memory], lr=RATE),
                    rows.loss,
                    STEPS,
                    enough=Settled(),
                    gradients=partial(torch.nn.utils.clip_grad_norm_, [memory], CLIP),
                )
            self.memory = memory.detach()
            self.masks = torch.cat([self.masks, mask])

    @contextmanager
    def acting(self, prompts: torch.Tensor) -> Iterator[None]:
        """See `Method`."""
        with self._added(None, self.memory, prompts.shape[1]):
            yield

    @contextmanager
    def _added(self, masks: torch.Tensor | None, memory: torch.Tensor, length: int = 0) -> Iterator[None]:
        """Within the context the memory acts under masks [B, D], or those that the first pass looks up (Eq. 4)."""
        acting = masks

        def add(_module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            nonlocal acting
            if acting is None:
                acting = self._nearest(args[0][:, :length].mean(1))
            return output + functional.linear(args[0] * acting[:, None], memory)

        handle = self.base.projection.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    def _nearest(self, means: torch.Tensor) -> torch.Tensor:
        if not len(self.masks):
            return torch.zeros_like(means)
        overlap, nearest = (self._masks(means) @ self.masks.T / self.preset.k).max(1)
        return self.masks[nearest] * (overlap >= self.preset.tau)[:, None]
