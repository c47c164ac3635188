"""Quantised base models on a real engine: edits are made on the quantised model and answered by it.

vLLM quantises a layer's input in the layer or, where a fused kernel can, before it; the op needs what was there before.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from engines import PROMPTS, Engine, Reply, flags, small_model, small_store
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from memoir_retrieval.lookup.reference import Answer, EditedModel

pytestmark = [pytest.mark.engine, pytest.mark.slow]

GROUP = 32


class Scheme(NamedTuple):
    """A way to quantise, in the words of a compressed-tensors checkpoint, and the dtype that vLLM's kernel has it in.

    close: by how much log-probabilities may differ from the reference's, which multiplies in another order: an input at
    the edge between two integers goes to either, and the layers of this model carry it far.
    """

    format: str
    weights: dict[str, Any]
    inputs: dict[str, Any] | None
    dtype: str
    close: float


INTS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
SCHEMES = {
    "8 bit integers": Scheme(
        "int-quantized", INTS | {"strategy": "channel"}, INTS | {"strategy": "tensor"}, "float32", 0.15
    ),
    "4 bit weights": Scheme(
        "pack-quantized", INTS | {"num_bits": 4, "strategy": "group", "group_size": GROUP}, None, "bfloat16", 0.4
    ),
}


@pytest.fixture(scope="module", params=SCHEMES)
def quantised(
    request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Scheme]:
    """A small random model, every linear layer of its blocks quantised."""
    scheme = SCHEMES[request.param]
    folder = tmp_path_factory.mktemp("quantised") / "model"
    model = small_model(folder, model_folder)
    tensors = _quantise(model, scheme)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    group = {"targets": ["Linear"], "weights": scheme.weights, "input_activations": scheme.inputs}
    settings["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder, scheme


def _quantise(model: LlamaForCausalLM, scheme: Scheme) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    largest = _largest_inputs(model)
    tensors = {}
    for key, weight in model.state_dict().items():
        layer = key.removesuffix(".weight")
        if key == "lm_head.weight":
            continue
        if layer not in largest:
            tensors[key] = weight.contiguous()
        elif scheme.format == "pack-quantized":
            grouped = weight.view(len(weight), -1, GROUP)
            scale = grouped.abs().amax(2, keepdim=True) / 7
            numbers = (grouped / scale).round().clamp(-8, 7).to(torch.int8).view_as(weight)
            tensors |= {
                f"{layer}.weight_packed": pack_to_int32(numbers, 4),
                f"{layer}.weight_scale": scale.squeeze(2),
                f"{layer}.weight_shape": torch.tensor(weight.shape),
            }
        else:
            scale = weight.abs().amax(1, keepdim=True) / 127
            tensors |= {
                f"{layer}.weight": (weight / scale).round().to(torch.int8),
                f"{layer}.weight_scale": scale,
                f"{layer}.input_scale": torch.tensor([largest[layer] / 127]),
            }
    return tensors


def _largest_inputs(model: LlamaForCausalLM) -> dict[str, float]:
    """Of every linear layer of the blocks, over a few hundred tokens."""
    largest: dict[str, float] = {}

    def look(name: str) -> Callable[..., None]:
        return lambda _module, args: largest.update({name: max(largest.get(name, 0.0), float(args[0].abs().max()))})

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    handles = [module.register_forward_pre_hook(look(name)) for name, module in layers]
    with torch.no_grad():
        model(torch.randint(0, 49152, (4, 100), generator=torch.Generator().manual_seed(1)))
    for handle in handles:
        handle.remove()
    return largest


def test_answers_are_the_quantised_references(
    quantised: tuple[Path, Scheme], start: Callable[..., Engine], tmp_path: Path
) -> None:
    path, scheme = quantised
    folder = small_store(path, tmp_path / "edits", dtype=scheme.dtype)
    model = EditedModel.open(folder, str(path))
    prompts = {name: model.prompt_ids(prompt) for name, prompt in PROMPTS.items()}
    engine = start(
        **flags(path, folder, max_num_seqs=16, max_num_batched_tokens=26, block_size=32) | {"dtype": scheme.dtype}
    )
    matches = 0
    for off in (False, True):
        replies = engine.ask(list(prompts.values()), [{"memoir": "off"} if off else None] * len(prompts))
        for (name, ids), reply in zip(prompts.items(), replies, strict=True):
            acting, plain = (model.predict([ids], [reply.tokens], edited=edited)[0] for edited in (True, False))
            assert reply.memoir["edit"] == (None if off else acting.edit), name
            if not off and acting.edit is not None and acting.overlap < 0.9:
                continue  # known by its words: which of the edit's masks is nearest to this noise is noise, too
            assert _apart(reply, plain if off else acting) < scheme.close, name
            if acting.edit is not None:
                assert _apart(reply, acting if off else plain) > 3 * scheme.close, name
                matches += not off
    assert 2 < matches < len(PROMPTS)


def _apart(reply: Reply, answer: Answer) -> float:
    return max(abs(a - b) for a, b in zip(reply.logprobs, answer.logprobs, strict=True))
