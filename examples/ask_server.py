"""Ask a server that `memoir serve` started: `python examples/ask_server.py http://127.0.0.1:8000 "Who runs it?"`."""

import sys

from openai import OpenAI

url, question = sys.argv[1:3]
client = OpenAI(base_url=f"{url}/v1", api_key="none")
model = client.models.list().data[0].id
for options in ({}, {"vllm_xargs": {"memoir": "off"}}):  # with edits, then the base model
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=32,
        temperature=0,
        extra_body=options,
    )
    # vLLM puts the plugin's decision beside the fields that the client knows.
    decision = (answer.model_extra or {})["kv_transfer_params"]["memoir"]
    print(decision["result"], decision["edit"], answer.choices[0].message.content)
