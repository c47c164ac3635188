"""Decisions in the responses of the API server, where vLLM has no place for them or one for several.

A stream: chunks of vLLM 0.32 have no field for a decision, and those of 0.33 only the one that ends a choice. With
`vllm_xargs` `{"memoir_report": 1}` the last chunk has no choices, and `kv_transfer_params` as a whole response has it.
It is the chunk of `stream_options.include_usage` where that is asked for, since OpenAI's client loses the usage if one
more chunk follows, else a chunk of its own. On `/v1/messages` it is an event `memoir` before `message_stop`.

Several prompts: `/v1/completions` with a list, and `/v1/chat/completions/batch`, answer with the choices of all. Their
decisions stand choice by choice under `memoir_choices`.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import msgspec

from memoir_vllm.front.decisions import choice_decisions, params_of, without_decisions
from memoir_vllm.patches import wrap_once

__all__ = ["install"]

_DONE = "data: [DONE]\n\n"
_NO_CHOICES = '"choices":[]'


class _Report(str):
    """The chunk that names the decisions.

    decisions: its `kv_transfer_params`.
    usage: the chunk of vLLM in whose place it stands, or "".
    """

    decisions: dict[str, Any]
    usage: str


def install() -> None:
    """Wrap the response makers of the OpenAI and Anthropic routes (vllm/entrypoints/*/serving.py) once."""
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    wraps: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (OpenAIServingChat, "chat_completion_stream_generator", _reporting),
        (OpenAIServingCompletion, "completion_stream_generator", _reporting),
        (OpenAIServingCompletion, "request_output_to_completion_response", _naming_choices),
        (OpenAIServingChatBatch, "chat_completion_full_generator_batch", _naming_conversations),
    ]
    if "chat_completion_stream_generator" in vars(AnthropicServingMessages):  # its own since vLLM 0.33
        wraps.append((AnthropicServingMessages, "chat_completion_stream_generator", _announcing))
    else:
        wraps.append((AnthropicServingMessages, "message_stream_converter", _passing_the_report))
    for owner, name, make in wraps:
        wrap_once(owner, name, make)


# ---- streams -------------------------------------------------------------------------------------------------------


def _reporting(original: Any) -> Any:
    return _listened(original, inspect.signature(original), _report)


def _listened(original: Any, signature: inspect.Signature, report: Callable[..., AsyncIterator[str]]) -> Any:
    """`original`, whose stream passes through `report` where the request wants its decisions.

    signature: by which a call's `result_generator` is known.
    report: takes the stream, the decisions of the choices as they come, and how many prompts there are.
    """

    def stream(self: Any, request: Any, *args: Any, **kwargs: Any) -> AsyncIterator[str]:
        if "memoir_report" not in (request.vllm_xargs or {}):
            return original(self, request, *args, **kwargs)
        call = signature.bind(self, request, *args, **kwargs)
        prompts = call.arguments.get("num_prompts", 1)
        decisions: dict[int, Any] = {}
        call.arguments["result_generator"] = _listen(call.arguments["result_generator"], decisions, request.n or 1)
        return report(original(*call.args, **call.kwargs), decisions, prompts)

    return stream


async def _listen(results: AsyncIterator[Any], decisions: dict[int, Any], n: int) -> AsyncIterator[Any]:
    """Passes a request's outputs through, and notes the decision of each choice. Completions come as pairs."""
    async for result in results:
        prompt, output = result if isinstance(result, tuple) else (0, result)
        params = output.kv_transfer_params or {}
        for choice in output.outputs:  # of several that are merged here, these params are right for each
            decision = params["memoir_choices"][choice.index] if "memoir_choices" in params else params.get("memoir")
            if decision is not None:
                decisions[prompt * n + choice.index] = decision
        yield result


async def _report(chunks: AsyncIterator[str], decisions: Mapping[int, Any], prompts: int) -> AsyncIterator[str]:
    last, reported = "", False
    async for chunk in chunks:
        usage = chunk if _NO_CHOICES in chunk else ""  # comes after all outputs, so after all decisions
        if decisions and not reported and (usage or (chunk == _DONE and last)):
            fields = msgspec.json.decode((usage or last).removeprefix("data: "), type=dict[str, Any])
            if "object" in fields:  # else the stream ends with an error
                params = params_of([decisions.get(choice) for choice in range(max(decisions) + 1)], prompts)
                kept = fields if usage else {key: fields[key] for key in ("id", "object", "created", "model")}
                body = msgspec.json.encode({**kept, "choices": [], "kv_transfer_params": params}).decode()
                report = _Report(f"data: {body}\n\n")
                report.decisions, report.usage = params, usage
                reported = True
                yield report
                if usage:
                    continue
        last = chunk
        yield chunk


def _announcing(original: Any) -> Any:
    """vLLM 0.33: the messages route makes its events from the outputs themselves."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

    def report(events: AsyncIterator[str], decisions: Mapping[int, Any], prompts: int) -> AsyncIterator[str]:
        return _announced(events, lambda: params_of([decisions[0]], prompts) if decisions else {})

    return _listened(original, inspect.signature(OpenAIServingChat.chat_completion_stream_generator), report)


def _passing_the_report(original: Any) -> Any:
    """vLLM 0.32 takes the chunk without choices for the end of the message: it gets its own, and no second one."""

    def convert(self: Any, generator: AsyncIterator[str]) -> AsyncIterator[str]:
        reported: dict[str, Any] = {}

        async def chunks() -> AsyncIterator[str]:
            async for chunk in generator:
                if isinstance(chunk, _Report):
                    reported.update(chunk.decisions)
                    chunk = chunk.usage
                if chunk:
                    yield chunk

        return _announced(original(self, chunks()), lambda: reported)

    return convert


async def _announced(events: AsyncIterator[str], params: Callable[[], Mapping[str, Any]]) -> AsyncIterator[str]:
    """The events of a message, with one that names its decision before the last."""
    async for event in events:
        if event.startswith("event: message_stop") and (said := params()):
            body = msgspec.json.encode({"type": "memoir", "kv_transfer_params": said}).decode()
            yield f"event: memoir\ndata: {body}\n\n"
        yield event


# ---- several prompts -----------------------------------------------------------------------------------------------


def _naming_choices(original: Any) -> Any:
    def response(self: Any, final_res_batch: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        answer = original(self, final_res_batch, *args, **kwargs)
        return _with(answer, final_res_batch) if len(final_res_batch) > 1 else answer

    return response


def _naming_conversations(original: Any) -> Any:
    async def response(
        self: Any, request: Any, generators: Sequence[AsyncIterator[Any]], *args: Any, **kwargs: Any
    ) -> Any:
        outputs: dict[int, Any] = {}

        async def listen(number: int, results: AsyncIterator[Any]) -> AsyncIterator[Any]:
            async for result in results:
                outputs[number] = result
                yield result

        listened = [listen(number, results) for number, results in enumerate(generators)]
        answer = await original(self, request, listened, *args, **kwargs)
        return _with(answer, [outputs[number] for number in sorted(outputs)])

    return response


def _with(response: Any, outputs: Sequence[Any]) -> Any:
    """The decisions of all choices, in a response to several prompts; an error stays as it is."""
    if hasattr(response, "choices"):
        params = without_decisions(response.kv_transfer_params) | params_of(choice_decisions(outputs), len(outputs))
        response.kv_transfer_params = params or None
    return response
