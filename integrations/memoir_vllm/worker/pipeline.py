"""Decisions on their way through a pipeline of stages (vllm/sequence.py, `IntermediateTensors`).

The stage that holds the edited layer decides and applies; only the last stage's output reaches the scheduler. So a
decision travels with the activations of its step, as one more tensor, which each stage takes out before its model runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from memoir_vllm.requests import Routed

if TYPE_CHECKING:
    from vllm.sequence import IntermediateTensors

__all__ = ["load", "unload", "values_of_stages"]

_KEY = "memoir_routed"


def load(tensors: IntermediateTensors, routed: Mapping[str, Routed], ranks: int) -> None:
    """Put what is known of requests among the tensors for the next stage.

    tensors: for the next stage.
    routed: by the id of the request.
    ranks: of tensor parallelism.
    """
    if not routed:
        return
    text = bytearray(msgspec.json.encode(routed))
    # vLLM splits what it can between the ranks and gathers it again on the device: this one stays whole, on the CPU.
    while ranks > 1 and len(text) % ranks == 0:
        text += b" "
    tensors.tensors[_KEY] = torch.frombuffer(text, dtype=torch.uint8)


def unload(tensors: IntermediateTensors | None) -> dict[str, Routed]:
    """Take out what the stages before have put there.

    tensors: of the stage before; None in the first.
    """
    held = None if tensors is None else tensors.tensors.pop(_KEY, None)
    return {} if held is None else msgspec.json.decode(held.numpy().tobytes(), type=dict[str, Routed])


def values_of_stages(value: Any) -> list[Any]:
    """The value of this rank's counterpart in every stage, in order of stages; all of them must call this.

    value: this rank's own.
    """
    from vllm.distributed import get_pp_group

    stages = get_pp_group()
    values = [value] * stages.world_size
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value, group=stages.cpu_group)
    return values
