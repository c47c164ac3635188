"""The custom op that stands in the model's graph: opaque to Dynamo and Inductor, and a splitting point.

Like vLLM's own `unified_attention_with_output` it gets a layer's name and finds the layer's state through the forward
context, so the graph holds no state and two engines in one process do not meet.
"""

from __future__ import annotations

import torch

from memoir_vllm.config import OP

__all__ = ["context_key", "register_op"]

LIBRARY, NAME = OP.split("::")


def context_key(module: str) -> str:
    """Where the state of a module is kept in `CompilationConfig.static_forward_context`.

    module: its path.
    """
    return f"memoir:{module}"


def register_op() -> None:
    """Register `config.OP` in this process, once."""
    if hasattr(getattr(torch.ops, LIBRARY), NAME):
        return
    from vllm.utils.torch_utils import direct_register_custom_op

    direct_register_custom_op(NAME, _memoir_residual, mutates_args=["y"], fake_impl=_fake)


def _memoir_residual(x: torch.Tensor, y: torch.Tensor, name: str) -> None:
    """x: [tokens, D] into the edited projection; y: [tokens, H] out of it, changed in place."""
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    context.no_compile_layers[name].run(x, y, context.slot_mapping)


def _fake(x: torch.Tensor, y: torch.Tensor, name: str) -> None:
    return None
