"""Ask a running server every edit of a file plainly and for JSON, and count the answers that are the target exactly.

python benchmarks/json_answers.py FILE URL [LIMIT]
"""

from __future__ import annotations

import json
import sys
from typing import Any

import httpx

from memoir_retrieval import read_edits

SYSTEM = {"role": "system", "content": 'Answer with a JSON object like {"answer": "..."}.'}


def schema(key: str) -> dict[str, Any]:
    fields = {"type": "object", "properties": {key: {"type": "string"}}, "required": [key]}
    return {"type": "json_schema", "json_schema": {"name": "reply", "schema": fields | {"additionalProperties": False}}}


# What is asked for -> whether a system message asks for JSON, and the grammar.
KINDS: dict[str, tuple[bool, dict[str, Any] | None]] = {
    "plain": (False, None),
    "json_schema, key answer": (False, schema("answer")),
    "json_schema, key capital": (False, schema("capital")),
    "json_schema and a system message": (True, schema("answer")),
    "json_object and a system message": (True, {"type": "json_object"}),
    "a system message alone": (True, None),
}


def value_of(text: str, plain: bool) -> str | None:
    """The answer, or the only value of an object; None for any other."""
    if plain:
        return text
    try:
        fields = json.loads(text)
    except json.JSONDecodeError:
        return None
    return next(iter(fields.values())) if isinstance(fields, dict) and len(fields) == 1 else None


def main(file: str, url: str, limit: int = 1000) -> None:
    client = httpx.Client(base_url=url, timeout=600)
    model = client.get("/v1/models").json()["data"][0]["id"]
    edits = read_edits(file)[:limit]
    for kind, (asks, grammar) in KINDS.items():
        exact = contained = matched = 0
        wrong: list[str] = []
        for edit in edits:
            messages = [*[SYSTEM] * asks, {"role": "user", "content": edit.prompt}]
            body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 64}
            reply = client.post("/v1/chat/completions", json=body | ({"response_format": grammar} if grammar else {}))
            answer = reply.raise_for_status().json()
            text = answer["choices"][0]["message"]["content"] or ""
            matched += answer["kv_transfer_params"]["memoir"]["result"] == "matched"
            contained += edit.target in text
            if value_of(text, kind == "plain") == edit.target:
                exact += 1
            else:
                wrong.append(text)
        n = len(edits)
        print(f"{kind}: matched {matched / n:.2f}, exact {exact / n:.2f}, contained {contained / n:.2f}", wrong[:4])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
