"""The product with a residual memory, by the kernel that vLLM takes for layers of that size (layers/utils.py)."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm, dispatch_unquantized_gemm
from vllm.platforms import current_platform

__all__ = ["ResidualProduct"]


class ResidualProduct:
    """One residual memory on this rank.

    On a CPU vLLM packs weights for its kernel; the packed copy is kept beside the weight.
    """

    def __init__(self, weight: torch.Tensor):
        """weight: [H, D/ranks] in the serving dtype, on the device."""
        self.weight = weight
        self._layer = torch.nn.Module()
        self._layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        if current_platform.is_cpu():
            dispatch_cpu_unquantized_gemm(self._layer, remove_weight=False)
        self._product = dispatch_unquantized_gemm()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, D/ranks]. Returns [rows, H], this rank's partial sum."""
        return self._product(self._layer, x, self.weight, None)
