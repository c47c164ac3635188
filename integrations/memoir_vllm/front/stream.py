"""The decision of a streamed response, in one more chunk before `[DONE]`, where the request asks for it.

vLLM's stream chunks have no field for it. With `vllm_xargs` `{"memoir_report": 1}` the chunk that follows the last one
has no choices, as the chunk of `stream_options.include_usage`, and `kv_transfer_params` as a whole response has it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator
from typing import Any

import msgspec

__all__ = ["install"]

_DONE = "data: [DONE]\n\n"


def install() -> None:
    """Wrap the stream generators of the OpenAI server (vllm/entrypoints/openai/*/serving.py) once."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    for handler, name in (
        (OpenAIServingChat, "chat_completion_stream_generator"),
        (OpenAIServingCompletion, "completion_stream_generator"),
    ):
        original = getattr(handler, name)
        if not hasattr(original, "_memoir"):
            setattr(handler, name, _reporting(original))


def _reporting(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def stream(self: Any, request: Any, *args: Any, **kwargs: Any) -> AsyncIterator[str]:
        if "memoir_report" not in (request.vllm_xargs or {}):
            return original(self, request, *args, **kwargs)
        given = signature.bind(self, request, *args, **kwargs)
        said: dict[str, Any] = {}
        given.arguments["result_generator"] = _listen(given.arguments["result_generator"], said)
        return _report(original(*given.args, **given.kwargs), said)

    stream._memoir = True  # type: ignore[attr-defined]
    return stream


async def _listen(results: AsyncIterator[Any], said: dict[str, Any]) -> AsyncIterator[Any]:
    """Passes a request's outputs through. Completions of several prompts come as pairs; the first prompt's counts."""
    async for result in results:
        at, output = result if isinstance(result, tuple) else (0, result)
        if at == 0 and output.kv_transfer_params:
            said.update(output.kv_transfer_params)
        yield result


async def _report(chunks: AsyncIterator[str], said: dict[str, Any]) -> AsyncIterator[str]:
    last = ""
    async for chunk in chunks:
        if chunk == _DONE and said and last:
            about = msgspec.json.decode(last.removeprefix("data: "), type=dict[str, Any])
            if "object" in about:  # else the stream ends with an error
                kept = {key: about[key] for key in ("id", "object", "created", "model")}
                yield f"data: {msgspec.json.encode({**kept, 'choices': [], 'kv_transfer_params': said}).decode()}\n\n"
        last = chunk
        yield chunk
