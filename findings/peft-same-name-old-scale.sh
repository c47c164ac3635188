#!/usr/bin/env bash
# peft 0.21.2 (torch 2.13.0+cpu, transformers 5.19.0): an adapter that is loaded under a name that is in use gets the
# new weights, and keeps the old adapter's scale and those of its layers that the new one lacks.
#
# Seen: a folder's adapter has rank 4 and lora_alpha 64, so its product counts 16 times. Loaded into the plain model, it
# does. Loaded by `load_adapter(folder, "default")` where an adapter with lora_alpha 4 has that name, it counts once,
# and a layer that only the old adapter changed stays changed. `merge_and_unload` puts this into the model's weights,
# and `save_pretrained` writes lora_alpha 4 beside the new weights. No warning.
# Expected: the adapter as the folder has it, or an error, since the name is taken.
# Cause: where the name is known, the settings in the folder do not count. The value that `load_adapter` returns names
# the missing layers, and nothing names the scale. transformers' Trainer loads its best checkpoint in this way, where
# the settings are the same.
# Why it matters here: an adapter that was trained again is tried under its old name. The model is then that of neither
# adapter. Merged, it is another one than vLLM and `memoir edit --model MODEL+FOLDER` make of the folder, so a store
# made on it does not fit what is served. Load the adapter under a new name, set it, and delete the old one
# (docs/reference/serving.md).
# Source: seen by running. The documentation of `load_adapter` says that the name should be unique, and not what comes
# of one that is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check peft==0.21.2 torch==2.13.0+cpu transformers==5.19.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import json
import warnings

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        for layer in (self.one, self.two):
            nn.init.zeros_(layer.weight)


def save(seed, alpha, layers, folder):
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=layers, init_lora_weights=False)
    get_peft_model(Layers(), config).save_pretrained(folder)


def merged(model):
    """What the adapter adds to the two layers: the plain model's weights are 0."""
    plain = model.merge_and_unload()
    return plain.one.weight.detach().clone(), plain.two.weight.detach().clone()


def close(a, b):
    return torch.allclose(a, b, atol=1e-5)


def replaced():
    model = PeftModel.from_pretrained(Layers(), "old")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = model.load_adapter("new", "default")
    return model, said


print("peft", peft.__version__)
save(1, 4, ["one", "two"], "old")
save(2, 64, ["one"], "new")
old, new = merged(PeftModel.from_pretrained(Layers(), "old")), merged(PeftModel.from_pretrained(Layers(), "new"))
model, said = replaced()
model.save_pretrained("saved")
one, two = merged(model)
with open("saved/adapter_config.json") as file:
    alpha = json.load(file)["lora_alpha"]
print(f"layer one: {(one.norm() / new[0].norm()).item():.4f} times the new adapter; lora_alpha as saved: {alpha}")
print(f"layer two, which the new adapter does not change, is the old adapter's: {close(two, old[1])}")
print("load_adapter returns", said)
assert close(one * 16, new[0]) and not close(one, old[0]), "changed: the scale of the new adapter"
assert close(two, old[1]) and new[1].abs().max() == 0, "changed: layers that the new adapter lacks"
assert alpha == 4, "changed: the settings as saved"

model, _ = replaced()
model.load_adapter("new", "another")
model.set_adapter("another")
model.delete_adapter("default")
one, two = merged(model)
assert close(one, new[0]) and two.abs().max() == 0, "changed: an adapter under a name of its own"
print("under a name of its own: as the folder has it")
PY
