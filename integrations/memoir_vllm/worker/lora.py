"""Requests without an adapter beside those with one, on a CPU (vllm/lora/ops/torch_ops/lora_ops.py of vLLM 0.32).

Rows without an adapter have the number -1. The functions for a CPU take it for an index, and add what the adapter in
the last slot gives. So a request for the base model that shares a step with an adapter's gets tokens of that adapter,
and its question other activations. The kernels for a GPU skip such rows, and so does a CPU from vLLM 0.33 on
(`findings/vllm-cpu-lora-beside-base.sh`).
"""

from __future__ import annotations

from typing import Any

import torch

from memoir_vllm.patches import wrap_once

__all__ = ["install"]


def install() -> None:
    """Wrap `bgmv_expand` and `bgmv_expand_slice` once, wherever they were imported to."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name in ("bgmv_expand", "bgmv_expand_slice"):
        wrap_once(lora_ops, name, _on_rows_of_adapters)
        setattr(punica_cpu, name, getattr(lora_ops, name))


def _on_rows_of_adapters(original: Any) -> Any:
    def expand(
        inputs: torch.Tensor,
        lora_b_weights: torch.Tensor,
        output_tensor: torch.Tensor,
        lora_indices_tensor: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # Some 200 calls a step: where every row has an adapter, as often, a minimum is all that is asked.
        if not len(lora_indices_tensor) or int(lora_indices_tensor.min()) >= 0:
            original(inputs, lora_b_weights, output_tensor, lora_indices_tensor, *args, **kwargs)
            return
        rows = torch.nonzero(lora_indices_tensor >= 0).flatten()
        if len(rows):
            outputs = output_tensor[rows]
            original(inputs[rows], lora_b_weights, outputs, lora_indices_tensor[rows], *args, **kwargs)
            output_tensor[rows] = outputs

    return expand
