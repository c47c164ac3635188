"""LoRA adapters: edits are made on a model with one in its weights, and served where vLLM adds it in each request.

Such a model is named `MODEL+FOLDER`, wherever a model is named.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from memoir_retrieval.errors import ModelError

__all__ = ["adapter_digest", "merge_adapter", "split_adapter"]

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings of PEFT's LoraConfig that say where an adapter is, how it was trained, or what `_scale` reads: with any value
# of these it is W + scale B A. Others, among them those that later versions will have, must be off.
_PLAIN = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "megatron_core", "eva_config", "loftq_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "ensure_weight_tying", "runtime_config",
}  # fmt: skip
# Values of others that change nothing either. Another way to begin, such as PiSSA, changes the model's own weights.
_OFF = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica", "lora_ga")}


def split_adapter(name: str) -> tuple[str, Path | None]:
    """A model's name and the folder of its adapter, if `name` has one.

    name: of a model, as it was typed.
    """
    if not Path(name).expanduser().exists():
        model, plus, folder = name.rpartition("+")
        if plus and (path := Path(folder).expanduser() / _CONFIG).is_file():
            return model, path.parent.resolve()
    return name, None


def adapter_digest(folder: Path) -> str:
    """The sha256, in hexadecimal, of what an adapter changes: its weights and its scale.

    folder: the adapter's, in PEFT's format.

    Raises ModelError for one that is not there, or that is no plain LoRA adapter.
    """
    scale = _scale(folder)
    try:
        status = (folder / _WEIGHTS).stat()
        return _digest(folder / _WEIGHTS, (status.st_mtime_ns, status.st_size), scale)
    except OSError as error:
        raise _unreadable(folder, error) from error


@functools.lru_cache(256)
def _digest(path: Path, stamp: tuple[int, int], scale: float) -> str:
    """stamp: of the file that is read; another file is read again."""
    with path.open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").digest()
    return hashlib.sha256(weights + repr(scale).encode()).hexdigest()


def merge_adapter(model: Any, folder: Path) -> None:
    """Put W + scale B A in the place of each weight W that an adapter changes, computed in float32.

    model: of transformers, which is changed.
    folder: the adapter's, in PEFT's format.

    Raises ModelError for an adapter that is not there, that is more than such products, or of another model.
    """
    from safetensors.torch import load_file

    scale = _scale(folder)
    try:
        tensors = load_file(folder / _WEIGHTS)
    except Exception as error:  # safetensors has an error class of its own
        raise _unreadable(folder, error) from error
    modules = dict(model.named_modules())
    for name in sorted(tensors):
        module, part, _ = name.removeprefix(_PREFIX).rpartition(".lora_A.weight")
        if name.endswith(".lora_B.weight") and name.replace(".lora_B.", ".lora_A.") in tensors:
            continue
        weight = getattr(modules.get(module), "weight", None) if part else None
        other = tensors.get(name.replace(".lora_A.", ".lora_B."))
        if weight is None or other is None or weight.shape != (other.shape[0], tensors[name].shape[1]):
            raise ModelError(
                f"adapter {folder} has {name}, which is no part of this model that edits can be made behind: use the "
                "model that the adapter was trained on, and an adapter of linear layers alone"
            )
        change = scale * (other.float() @ tensors[name].float())
        weight.data.copy_(weight.data.float() + change.to(weight.device))


def _scale(folder: Path) -> float:
    try:
        config = json.loads((folder / _CONFIG).read_bytes())
        rank, alpha = config["r"], config["lora_alpha"]
        scale = float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise _unreadable(folder, error) from error
    more = [key for key, value in config.items() if value and key not in _PLAIN and value not in _OFF.get(key, ())]
    if config.get("peft_type") != "LORA" or more:
        raise ModelError(
            f"adapter {folder} is no plain LoRA adapter ({', '.join(more) or config.get('peft_type')}): edits can be "
            "made on the model with a plain one only, or on a folder into which you have merged it"
        )
    return scale


def _unreadable(folder: Path, error: Exception) -> ModelError:
    why = " ".join(str(error).split()) or type(error).__name__
    return ModelError(f"adapter {folder} cannot be read ({why:.200}): give a folder in PEFT's format")
