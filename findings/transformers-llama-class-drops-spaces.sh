#!/usr/bin/env bash
# transformers 5.19.0 (tokenizers 0.23.3): a tokenizer whose configuration names LlamaTokenizerFast loses the spaces
# between words, where its tokenizer.json splits bytes.
#
# Seen: one tokenizer.json, of bytes as those of Llama 3 and DeepSeek are. With the class PreTrainedTokenizerFast,
# AutoTokenizer gives the ids of the file. With LlamaTokenizerFast it gives others, "Who is the mayor?" and
# "Whoisthemayor?" have the same ids, and decoding them gives "Whoisthemayor?". No warning.
# Expected: the ids that tokenizer.json says; transformers 4 gave them.
# Cause: in transformers 5 the class sets its own pre-tokenizer and decoder, those of Llama 2, over the ones in the
# file.
# Why it matters here: models such as DeepSeek-R1-Distill-Llama-70B have such files. Reference and server read prompts
# by the same library, so both agree, on prompts without spaces: edits are trained and found, and the model answers
# worse than it can. `memoir` refuses a tokenizer that loses spaces, and says what to write into tokenizer_config.json.
# Source: https://github.com/huggingface/transformers/issues/45488,
# https://github.com/huggingface/transformers/pull/48317
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.19.0 tokenizers==0.23.3
cd "$folder"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - <<'PY'
import json
from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=300, special_tokens=list(SPECIAL.values()), initial_alphabet=ALPHABET, show_progress=False
)
tokenizer.train_from_iterator(["Who is the mayor of Graz?", "Jane Doe is the mayor."] * 20, trainer)

print("transformers", transformers.__version__)
text = "Who is the mayor?"
seen = {}
for name in ("PreTrainedTokenizerFast", "LlamaTokenizerFast"):
    folder = Path(name)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, **SPECIAL}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    loaded = AutoTokenizer.from_pretrained(folder)
    ids, joined = (loaded(t, add_special_tokens=False)["input_ids"] for t in (text, text.replace(" ", "")))
    seen[name] = ids == tokenizer.encode(text).ids, ids == joined, loaded.decode(ids)
    print(f"{name}: ids of the file {seen[name][0]}, those without spaces {seen[name][1]}, decoded {seen[name][2]!r}")
assert seen["PreTrainedTokenizerFast"] == (True, False, text), "changed: the plain class differs, too"
assert seen["LlamaTokenizerFast"][:2] == (False, True), "changed: spaces are kept"
assert seen["LlamaTokenizerFast"][2] == text.replace(" ", ""), "changed: it decodes otherwise"
PY
