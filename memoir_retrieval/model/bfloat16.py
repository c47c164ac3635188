"""Matrix products in bfloat16 on a CPU that has instructions for them: several times faster than in float32.

Only the products: weights and inputs are rounded, sums are made in float32 by the instruction, and everything between
two products (norms, attention, the residual stream) stays in float32. Weights that were published in bfloat16 lose
nothing. Training uses it; fingerprints and the question whether an edit is learnt are in the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from memoir_retrieval.model.base import BaseModel

__all__ = ["HalfProducts", "half_is_faster"]


def half_is_faster(base: BaseModel) -> bool:
    """Whether the model is in float32 on a CPU with bfloat16 instructions (AVX512-BF16 or AMX).

    base: the model.
    """
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    known = has.get("avx512_bf16", False) or has.get("amx_bf16", False)
    return bool(known) and base.device.type == "cpu" and base.model.dtype == torch.float32


class HalfProducts:
    """The linear layers of a model, with a copy of each weight in bfloat16 that is made when it is first used."""

    def __init__(self, base: BaseModel, without: Container[torch.Tensor] = ()):
        """base: the model.
        without: weights that are not multiplied in bfloat16, since they change.
        """
        from transformers.pytorch_utils import Conv1D

        self._layers: list[tuple[torch.nn.Module, Any]] = []
        for module in base.model.modules():
            # A class of its own may give more than the product: Llama 4's router gives scores beside it.
            if type(module).forward in (torch.nn.Linear.forward, Conv1D.forward) and module.weight not in without:
                weight = module.weight.T if isinstance(module, Conv1D) else module.weight
                self._layers.append((module, _Product(weight, module.bias)))

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


class _Product:
    """x W^T and its gradient, with weights in the order in which the processor's instructions read them.

    Ordered again in each product, as `functional.linear` does it, weights take as long as a product with few rows.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self._weight = weight.detach()
        self._bias = bias

    @cached_property
    def _forth(self) -> torch.Tensor:
        return _packed(self._weight)

    @cached_property
    def _back(self) -> torch.Tensor:
        return _packed(self._weight.T)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _Differentiable.apply(x, self) if x.requires_grad else self.forward(x)
        return out if self._bias is None else out + self._bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _times(x.to(torch.bfloat16), self._forth).to(x.dtype)

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        if len(self._weight) < _WIDE:
            return _times(gradient.to(torch.bfloat16), self._back).to(gradient.dtype)
        rows = gradient.flatten(0, -2)
        chosen = (rows.abs().amax(0) > _LEAST).nonzero()[:, 0]
        back = rows[:, chosen].to(torch.bfloat16) @ self._weight[chosen].to(torch.bfloat16)
        return back.to(gradient.dtype).view(*gradient.shape[:-1], -1)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, product: _Product) -> torch.Tensor:
        ctx.product = product
        return product.forward(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.product.backward(gradient), None


_ROWS = 64  # of a product, about: the order of the weights is chosen for so many


def _packed(weight: torch.Tensor) -> torch.Tensor:
    half = weight.to(torch.bfloat16).contiguous()  # not kept: the products read the ordered one
    ordered: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(half, _ROWS)
    return ordered


def _times(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return out
