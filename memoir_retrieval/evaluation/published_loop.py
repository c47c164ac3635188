"""The training loop of the paper's code (arXiv 2506.07899), to compare ours with.

12 sequences an edit: the prompt, the prompt after 10 prefixes that the model wrote, and an unrelated prompt that goes
through the model but not into the loss. 30 passes through the whole model and back, as the authors' configuration for
LLaMA-3-8B has them (`methods/published.py` makes up to 70, until the loss has settled), SGD with learning rate 1.0 on
all of the memory, gradients clipped to norm 1.0. The mask is the edit's own in every sequence and acts on every token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.model.forward import right_pad

__all__ = ["PREFIXES", "accuracy", "train_published"]

PREFIXES = 10
STEPS = 30
RATE = 1.0
CLIP = 1.0


def train_published(
    base: BaseModel,
    weight: torch.Tensor,
    mask: torch.Tensor,
    prompts: Sequence[Sequence[int]],
    answer: Sequence[int],
    unrelated: Sequence[int],
) -> None:
    """Train one edit in place.

    base: the model.
    weight: float32 [H, D], the memory.
    mask: bool [D].
    prompts: token ids, the bare one first.
    answer: token ids.
    unrelated: token ids of an unrelated prompt, which is run beside the others and has no part in the loss.
    """
    ids, _ = right_pad([[*prompt, *answer] for prompt in prompts] + [list(unrelated)], base.device)
    labels = torch.full_like(ids, -100)
    for row, prompt in enumerate(prompts):
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(list(answer), device=base.device)
    trained = weight.clone().requires_grad_()
    optimizer = torch.optim.SGD([trained], lr=RATE)
    with _residual(base, trained, mask), torch.enable_grad():
        for _ in range(STEPS):
            logits = base.model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = functional.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([trained], CLIP)
            optimizer.step()
    weight.copy_(trained.detach())


@torch.no_grad()
def accuracy(
    base: BaseModel, weight: torch.Tensor, mask: torch.Tensor, prompt: Sequence[int], answer: Sequence[int]
) -> float:
    """Share of the answer's tokens that are the edited model's first choice under teacher forcing.

    base: the model.
    weight: float32 [H, D], the memory.
    mask: bool [D].
    prompt: token ids.
    answer: token ids.
    """
    with _residual(base, weight, mask):
        ids = torch.tensor([[*prompt, *answer]], device=base.device)
        chosen = base.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].argmax(-1)
    return float((chosen == ids[0, len(prompt) :]).float().mean())


@contextmanager
def _residual(base: BaseModel, weight: torch.Tensor, mask: torch.Tensor) -> Iterator[None]:
    def add(_module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output + (args[0] * mask) @ weight.T.to(output.dtype)

    handle = base.projection.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
