"""Where edits can live in a model: the blocks of its text tower, and the projection that closes a part of a block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from memoir_retrieval.errors import ModelError

if TYPE_CHECKING:
    import torch

__all__ = ["PLACES", "Place", "in_out", "place_of", "projection_of", "text_blocks"]

Place = Literal["ffn", "attention"]
PLACES: tuple[Place, ...] = get_args(Place)

# Kinds of blocks, by their `layer_types`, whose state is keys and values.
_KEYS_AND_VALUES = {"full_attention", "sliding_attention", "chunked_attention"}
# What attention's output projection is called, where other layers of it end in the hidden size too.
_OUTPUTS = {"o_proj", "out_proj", "c_proj", "dense", "wo"}


def in_out(module: Any) -> tuple[int, int]:
    """(inputs, outputs) of a linear module; GPT-2's Conv1D stores its weight with its axes exchanged.

    module: of torch or transformers.
    """
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)
    return int(module.weight.shape[0]), int(module.weight.shape[1])


def place_of(module: str) -> Place:
    """The place of a projection.

    module: its dotted name.
    """
    return "attention" if any(_is_attention(part) for part in module.split(".")) else "ffn"


def _is_attention(name: str) -> bool:
    return "attn" in name or "attention" in name


def text_blocks(model: Any) -> Any:
    """The decoder blocks of the text tower: the list, as long as the text configuration says, beside the embedding.

    model: of transformers.

    Raises ModelError where there is none, and for blocks whose state is not keys and values.
    """
    import torch

    kind = type(model).__name__
    missing = ModelError(f"{kind} has no list of decoder blocks: only decoder-only models can be edited")
    if not hasattr(model, "get_input_embeddings"):
        raise missing
    text, embedding = model.config.get_text_config(), model.get_input_embeddings()
    states = set(getattr(text, "layer_types", None) or ()) - _KEYS_AND_VALUES
    if states:
        raise ModelError(
            f"{kind} has blocks of {', '.join(sorted(states))}, whose state cannot be frozen as keys and values can: "
            "this architecture cannot be edited"
        )
    if getattr(text, "num_kv_shared_layers", 0):
        raise ModelError(
            f"the last {text.num_kv_shared_layers} blocks of {kind} share keys and values of blocks below them, which "
            "are not run while an edit is trained: this architecture cannot be edited"
        )
    lists = [
        child
        for owner in model.modules()
        if any(child is embedding for child in owner.children())
        for child in owner.children()
        if isinstance(child, torch.nn.ModuleList) and len(child) == text.num_hidden_layers
    ]
    if len(lists) != 1:
        raise missing
    return lists[0]


def projection_of(model: Any, block: Any, place: Place | None = None) -> tuple[str, Any, Place]:
    """Path, module and place of the projection of a block that edits act on.

    model: of transformers.
    block: one of its `text_blocks`.
    place: None: the FFN where it is dense, else attention.

    Raises ModelError where the block has no such projection, or several.
    """
    if place not in (None, *PLACES):
        raise ModelError(f"place {place!r} is not known: choose {' or '.join(PLACES)}")
    experts = _has_experts(block)
    if place == "ffn" and experts:
        raise ModelError(
            f"place ffn cannot be edited in {type(model).__name__}: a block of it is a mixture of experts, which has "
            "no dense second projection: choose place attention or a layer with a dense FFN"
        )
    chosen: Place = place or ("attention" if experts else "ffn")
    hidden = model.get_input_embeddings().weight.shape[1]
    find = _attention_outputs if chosen == "attention" else _ffn_outputs
    layers = find(block, hidden)
    if len(layers) != 1:
        what = "attention's output projection" if chosen == "attention" else "the FFN's second projection"
        raise ModelError(
            f"a block of {type(model).__name__} has {len(layers)} linear layers that may be {what} (to the hidden size "
            f"{hidden}), so it is not plain: this architecture is not supported at place {chosen}"
        )
    return next(name for name, module in model.named_modules() if module is layers[0]), layers[0], chosen


def _linear(block: Any, hidden: int) -> list[tuple[str, torch.nn.Module]]:
    """The linear layers of a block that end in the hidden size."""
    import torch
    from transformers.pytorch_utils import Conv1D

    return [
        (name, module)
        for name, module in block.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and in_out(module)[1] == hidden
    ]


def _ffn_outputs(block: Any, hidden: int) -> list[torch.nn.Module]:
    # Attention's may be wide as well: that of Qwen3 and Gemma 2 is, whose heads together are wider than the stream.
    return [m for name, m in _linear(block, hidden) if place_of(name) == "ffn" and in_out(m)[0] > hidden]


def _attention_outputs(block: Any, hidden: int) -> list[torch.nn.Module]:
    layers = [(name, m) for name, m in _linear(block, hidden) if place_of(name) == "attention"]
    if len(layers) > 1:
        layers = [(name, m) for name, m in layers if name.rsplit(".", 1)[-1] in _OUTPUTS]
    return [m for _, m in layers]


def _has_experts(block: Any) -> bool:
    """Whether a part of the block is a mixture of experts: a list of modules, or weights of three axes."""
    import torch

    convolution = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return any(
        isinstance(module, torch.nn.ModuleList)
        or (
            not isinstance(module, convolution)
            and any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
        )
        for module in block.modules()
    )
