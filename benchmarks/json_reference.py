"""Ask a chat store's reference under grammars, and count the answers that are the target exactly; no server is needed.

python benchmarks/json_reference.py STORE FILE [EVERY] [--compact]

The grammars are compiled as vLLM compiles them. EVERY: only every n-th edit of the file is asked, of those that the
store has. --compact: as under `--structured-outputs-config.disable_any_whitespace true`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import xgrammar
from transformers import LogitsProcessor, LogitsProcessorList

from memoir_retrieval import Edit, EditedModel, read_edits

STRING = {"type": "string"}
TOKENS = 96


def fields(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


class Kind(NamedTuple):
    """schema: what the answer must be. path: where the target stands in it, or None for the first string.
    system: whether a system message asks for JSON."""

    schema: dict[str, Any]
    path: tuple[str | int, ...] | None
    system: bool = False


LIST = {"type": "array", "items": STRING, "minItems": 1, "maxItems": 1}
KINDS = {
    "key answer": Kind(fields(answer=STRING), ("answer",)),
    "key result": Kind(fields(result=STRING), ("result",)),
    "key x": Kind(fields(x=STRING), ("x",)),
    "nested": Kind(fields(response=fields(entity=STRING)), ("response", "entity")),
    "a list under a key": Kind(fields(items=LIST), ("items", 0)),
    "a bare list": Kind(LIST, (0,)),
    "a number behind it": Kind(fields(answer=STRING, confidence={"type": "number"}), ("answer",)),
    "a choice before it": Kind(fields(language={"enum": ["en", "de"]}, reply=STRING), ("reply",)),
    "key answer, and a system message": Kind(fields(answer=STRING), ("answer",), True),
    "any object, and a system message": Kind({"type": "object"}, None, True),
}
SYSTEM = {"role": "system", "content": 'Answer with a JSON object like {"answer": "..."}.'}


class Grammar(LogitsProcessor):
    """Lets the rows of a batch say nothing but what one grammar allows."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, rows: int, vocabulary: int):
        self.matchers = [xgrammar.GrammarMatcher(compiled) for _ in range(rows)]
        self.mask = xgrammar.allocate_token_bitmask(rows, vocabulary)
        self.begun = False

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, matcher in enumerate(self.matchers):
            if self.begun and not matcher.is_terminated():
                matcher.accept_token(int(ids[row, -1]))
            if matcher.is_terminated():
                self.mask[row] = -1
            else:
                matcher.fill_next_token_bitmask(self.mask, row)
        self.begun = True
        xgrammar.apply_token_bitmask_inplace(scores, self.mask)
        return scores


def ask(model: EditedModel, prompts: Sequence[Any], schema: dict[str, Any] | None, compact: bool = False) -> list[str]:
    """The free answers to prompts, under a grammar or not."""
    if schema is None:
        return _answers(model, prompts)
    base = model.base.model
    info = xgrammar.TokenizerInfo.from_huggingface(model.base.tokenizer, vocab_size=base.config.vocab_size)
    compiled = xgrammar.GrammarCompiler(info).compile_json_schema(
        json.dumps(schema), any_whitespace=not compact, separators=(",", ":") if compact else None
    )
    generate = base.generate

    def under_grammar(**inputs: Any) -> Any:
        grammar = Grammar(compiled, len(inputs["input_ids"]), base.config.vocab_size)
        return generate(**inputs, logits_processor=LogitsProcessorList([grammar]))

    base.generate = under_grammar
    try:
        return _answers(model, prompts)
    finally:
        del base.generate


def _answers(model: EditedModel, prompts: Sequence[Any]) -> list[str]:
    return [answer.text for answer in model.generate(prompts, max_new_tokens=TOKENS)]


def value_of(text: str, path: tuple[str | int, ...] | None) -> Any:
    """What stands at a path of a JSON text; None for any other text."""
    try:
        value = json.loads(text)
        if path is None:
            return next((part for part in value.values() if isinstance(part, str)), None)
        for key in path:
            value = value[key]
    except (json.JSONDecodeError, KeyError, IndexError, TypeError):
        return None
    return value


def main(store: str, file: str, every: int = 1, compact: bool = False) -> None:
    model = EditedModel.open(store)
    stored = {edit.prompt for edit in model.retriever.store.edits}
    edits = [edit for edit in read_edits(file) if edit.prompt in stored][::every]
    report("plain", edits, ask(model, [edit.prompt for edit in edits], None), None)
    for name, kind in KINDS.items():
        prompts = [[*[SYSTEM] * kind.system, {"role": "user", "content": edit.prompt}] for edit in edits]
        report(name, edits, ask(model, prompts, kind.schema, compact), kind)


def report(name: str, edits: Sequence[Edit], texts: Sequence[str], kind: Kind | None) -> None:
    values = [value_of(text, kind.path) if kind else text for text in texts]
    exact = [value == edit.target for value, edit in zip(values, edits, strict=True)]
    within = [edit.target in text for text, edit in zip(texts, edits, strict=True)]
    wrong = [text for text, right in zip(texts, exact, strict=True) if not right]
    print(
        f"{name}: exact {sum(exact) / len(edits):.2f}, contained {sum(within) / len(edits):.2f}", wrong[:3], flush=True
    )


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--compact"]
    main(*arguments[:2], *map(int, arguments[2:3]), compact="--compact" in sys.argv)
