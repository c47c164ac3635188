"""Putting the op behind one linear layer of a loaded model (vllm/model_executor/layers/linear.py).

`RowParallelLinear.forward` calls `quant_method.apply` and only then reduces over the tensor-parallel ranks. The layer
keeps its class and its weights; its quant method becomes an instance of a subclass of its own class that calls the op
after the product, so each rank adds the residual of its own shard to its own partial sum.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from memoir_retrieval.errors import ConfigError
from memoir_retrieval.store.read import EditStore
from memoir_vllm.config import MemoirConfig, token_decoder
from memoir_vllm.worker.op import context_key, register_op
from memoir_vllm.worker.pipeline import values_of_stages
from memoir_vllm.worker.reload import Reloader, require_same, values_of_ranks
from memoir_vllm.worker.residual import ResidualLayer
from memoir_vllm.worker.routing import Router

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.linear import RowParallelLinear

    from memoir_vllm.worker.captured import CapturedProduct

__all__ = ["attach"]


def attach(
    ours: MemoirConfig,
    stores: Mapping[str, EditStore],
    vllm_config: VllmConfig,
    model: torch.nn.Module,
    device: torch.device,
) -> tuple[ResidualLayer, dict[str, Reloader]] | None:
    """Make stores act on the model; None where another stage of the pipeline holds the module.

    ours: the section of the configuration.
    stores: by name, "" for the default one, which were checked: all of one module.
    vllm_config: of this worker.
    model: as this worker has loaded it.
    device: where it lies.

    Raises ConfigError where the module is not one that we know how to edit.
    """
    manifest, read = stores[""].manifest, token_decoder(vllm_config.model_config)
    held = values_of_stages(_module_of(model, manifest.module) is not None)
    linear = _find(model, manifest.module, manifest.d, manifest.h, elsewhere=any(held))
    if linear is None:
        return None
    _refuse_fused(model, linear, manifest.module)
    require_same([store.manifest for store in stores.values()], linear.tp_size, "start the engine again")
    register_op()
    layer = ResidualLayer(
        Router(stores[""], ours.tau, device, read),
        torch.from_numpy(stores[""].memories),
        rank=linear.tp_rank,
        ranks=linear.tp_size,
        dtype=vllm_config.model_config.dtype,
        device=device,
    )
    layer.captured = _captured(linear, vllm_config, device)
    if not all(values_of_ranks(layer.captured is not None, linear.tp_size)):
        layer.captured = None  # ranks that replay other graphs than others wait for each other
    reloaders = {}
    for name, store in stores.items():
        if name:
            layer.adopt(layer.load(Router(store, ours.tau, device, read, name), torch.from_numpy(store.memories)), name)
        reloaders[name] = Reloader(ours, store.manifest, layer, linear.tp_size, device, read, name)
    key = context_key(manifest.module)
    vllm_config.compilation_config.static_forward_context[key] = layer
    _hook(linear, key)
    return layer, reloaders


def _module_of(model: torch.nn.Module, module: str) -> Any:
    """The module that transformers gives this name; None where the model has none of it.

    vLLM may name it differently, as the text tower of a vision-language model. Then the model's class says how: by the
    mapper with which it reads the names of a checkpoint.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if module in modules:
        return modules[module]
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    weight = mapper and mapper.map_name(f"{module}.weight")
    return modules.get(weight.removesuffix(".weight")) if weight else None


def _find(model: torch.nn.Module, module: str, d: int, h: int, *, elsewhere: bool = False) -> RowParallelLinear | None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    projection = _module_of(model, module)
    if projection is None and elsewhere:
        return None
    if projection is None:
        raise ConfigError(
            f"the store edits {module}, which {type(model).__name__} has in vLLM under no name that its class maps: "
            "this architecture cannot be served with edits, answer with memoir_retrieval.EditedModel instead"
        )
    projection = getattr(projection, "base_layer", projection)
    if not isinstance(projection, RowParallelLinear):
        raise ConfigError(
            f"the store edits {module}, which is a {type(projection).__name__} in vLLM: only a dense RowParallelLinear "
            "can be served with edits"
        )
    if (projection.input_size, projection.output_size) != (d, h):
        raise ConfigError(
            f"the store edits {module} as {d} -> {h}, vLLM has it as {projection.input_size} -> "
            f"{projection.output_size}: serve the model that the store was made on"
        )
    return projection


def _refuse_fused(model: torch.nn.Module, linear: torch.nn.Module, module: str) -> None:
    """Some models multiply and reduce in one kernel, in steps of some sizes alone (kernels/linear/cute_dsl)."""
    # With LoRA the owner holds a wrapper of the layer.
    layers = (linear, *(part for part in model.modules() if getattr(part, "base_layer", None) is linear))
    owners = [owner for owner in model.modules() if not set(owner.children()).isdisjoint(layers)]
    if any(getattr(owner, name, None) is not None for owner in owners for name in ("gemm_rs_ar", "gemm_rs")):
        raise ConfigError(
            f"the store edits {module}, which this vLLM multiplies and reduces in one kernel, past the edits: set "
            "VLLM_ENABLE_GEMM_RS=0 and VLLM_KIMI_K3_GEMM_AR=0"
        )


def _captured(linear: RowParallelLinear, vllm_config: VllmConfig, device: torch.device) -> CapturedProduct | None:
    if device.type != "cuda":  # Triton, in which the product is written, need not be there
        return None
    from memoir_vllm.worker.captured import captured_product

    d, h, dtype = linear.input_size_per_partition, linear.output_size, vllm_config.model_config.dtype
    return captured_product(d, h, dtype, device, vllm_config.compilation_config)


def _hook(linear: RowParallelLinear, name: str) -> None:
    linear.quant_method = _with_op(linear.quant_method, name)
    # Else a quantised MLP may hand us activations that are packed already (fused_act_quant.py); LoRA does the same.
    linear.requires_unquantized_input = True


def _with_op(quant_method: Any, name: str) -> Any:
    """A shallow copy of the quant method, of a subclass of its own class: `isinstance` checks keep their answer."""
    base = type(quant_method)

    class WithResidual(base):  # type: ignore[misc, valid-type]
        def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            y = super().apply(layer, x, bias)
            rows, out = x, y
            if x.dim() > 2:  # vLLM's own models hand on [tokens, D]; those of its Transformers backend [1, tokens, D]
                rows, out = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
            torch.ops.vllm.memoir_residual(rows, out, name)
            return y

    WithResidual.__name__ = WithResidual.__qualname__ = f"Memoir{base.__name__}"
    method = copy.copy(quant_method)
    method.__class__ = WithResidual
    return method
