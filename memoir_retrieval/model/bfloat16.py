"""Matrix products in bfloat16 on a CPU that has instructions for them: several times faster than in float32.

Only the products: weights and inputs are rounded, sums are made in float32 by the instruction, and everything between
two products (norms, attention, the residual stream) stays in float32. Weights that were published in bfloat16 lose
nothing. Training uses it; fingerprints and the question whether an edit is learnt are in the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from memoir_retrieval.model.base import BaseModel

__all__ = ["HalfProducts", "half_is_faster"]


def half_is_faster(base: BaseModel) -> bool:
    """Whether the model is in float32 on a CPU with bfloat16 instructions (AVX512-BF16 or AMX)."""
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    known = has.get("avx512_bf16", False) or has.get("amx_bf16", False)
    return bool(known) and base.device.type == "cpu" and base.model.dtype == torch.float32


class HalfProducts:
    """The linear layers of a model, with copies of their weights in bfloat16 that are made once."""

    def __init__(self, base: BaseModel):
        from transformers.pytorch_utils import Conv1D

        self._layers: list[tuple[torch.nn.Module, Any]] = []
        for module in base.model.modules():
            if isinstance(module, (torch.nn.Linear, Conv1D)):
                weight = module.weight.T if isinstance(module, Conv1D) else module.weight
                self._layers.append((module, _product(weight, module.bias)))

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within the context the model multiplies in bfloat16."""
        for module, product in self._layers:
            module.forward = product
        try:
            yield
        finally:
            for module, _ in self._layers:
                del module.forward


# Outputs from which on a layer counts as a vocabulary, and the gradient of one below which it is left out. Gradients of
# a mean cross entropy are probabilities over the number of tokens: what is left out is too little to turn a step.
_WIDE = 8192
_LEAST = 1e-5


class _WideProduct(torch.autograd.Function):
    """A product whose gradient goes back through the few outputs that have any, not through a whole vocabulary."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(half)
        return functional.linear(x.to(torch.bfloat16), half).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (half,) = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        chosen = (rows.abs().amax(0) > _LEAST).nonzero()[:, 0]
        back = rows[:, chosen].to(torch.bfloat16) @ half[chosen]
        return back.to(gradient.dtype).view(*gradient.shape[:-1], -1), None


def _product(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    half = weight.detach().to(torch.bfloat16).contiguous()

    def forward(x: torch.Tensor) -> torch.Tensor:
        if len(half) >= _WIDE and x.requires_grad:
            out: torch.Tensor = _WideProduct.apply(x, half)
        else:
            out = functional.linear(x.to(torch.bfloat16), half).to(x.dtype)
        return out if bias is None else out + bias

    return forward
