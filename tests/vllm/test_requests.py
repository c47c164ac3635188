"""Options of one request: what is read and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from memoir_retrieval.errors import ConfigError
from memoir_retrieval.question.candidates import Pieces
from memoir_retrieval.question.span import Span, SpanRule
from memoir_vllm import requests
from memoir_vllm.config import ServedStore
from memoir_vllm.requests import Options, parse_options, query_of


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (None, Options()),
        ({}, Options()),
        ({"top_a": 0.1, "kv_transfer_params": {}}, Options()),
        ({"memoir": "off"}, Options(off=True)),
        ({"memoir_span": "0:1"}, Options(span=Span(0, 1))),
        ({"memoir_nearest": 20}, Options(nearest=20)),
        ({"memoir_report": 1}, Options()),
        ({"memoir_span": "3:10", "memoir": "off"}, Options(off=True, span=Span(3, 10))),
    ],
    ids=str,
)
def test_read(given: dict[str, Any] | None, read: Options) -> None:
    assert parse_options(given, prompt_len=10) == read


@pytest.mark.parametrize("value", ["on", "", "OFF", True, 1, ["off"], "edit:1"])
def test_memoir_is_off_or_nothing(value: Any) -> None:
    with pytest.raises(ConfigError, match='use "off"'):
        parse_options({"memoir": value}, prompt_len=10)


@pytest.mark.parametrize("value", ["5", "5:5", "6:5", "-1:5", "0:11", " 0:5", "0:5\n", "a:b", "0:5:1", 5, [0, 5]])
def test_a_span_lies_in_the_prompt(value: Any) -> None:
    with pytest.raises(ConfigError, match="0 <= start < end <= 10"):
        parse_options({"memoir_span": value}, prompt_len=10)


@pytest.mark.parametrize(
    ("prompt", "behind", "acts_from"),
    [
        ([5, 5, 5, 5, 6, 6, 6, 6], 3, 3),  # raw: what follows may be an answer
        ([1, 5, 5, 5, 5, 5, 2, 3, 3, 6, 6], 3, 8),  # a chat whose answer the client has begun
        ([1, 5, 5, 5, 5, 5, 2, 3, 3, 6, 6], 0, 3),  # a store of format 5 or 6
        ([1, 5, 5, 5, 5, 5, 2], 3, 6),  # a template that writes nothing more
    ],
)
def test_an_edit_acts_before_the_answer_whatever_span_a_client_names(
    prompt: list[int], behind: int, acts_from: int
) -> None:
    rule = SpanRule(starts=((1,),), end=(2,), acts="last", behind=behind)
    span = query_of(prompt, {"memoir_span": "2:4"}, rule, Pieces(str)).span
    assert (span.start, span.end, span.acts_from) == (2, 4, acts_from)


@pytest.mark.parametrize("value", [-1, 21, "5", 5.0, True, None, [5]])
def test_nearest_is_a_number_of_edits(value: Any) -> None:
    with pytest.raises(ConfigError, match="memoir_nearest"):
        parse_options({"memoir_nearest": value}, prompt_len=10)


@pytest.mark.parametrize("value", [0, "1", None, 2])
def test_a_report_is_asked_for_or_not(value: Any) -> None:
    with pytest.raises(ConfigError, match="memoir_report"):
        parse_options({"memoir_report": value}, prompt_len=10)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"resumable": True}, "streaming input: its prompt has no end"),
        ({"max_tokens": 1, "watermarking": False, "detokenize": False}, "beam search: use sampling"),
        ({"extra_args": {"memoir": "on"}}, 'use "off"'),
    ],
    ids=["streaming input", "beam search", "bad option"],
)
def test_requests_that_cannot_be_served_are_refused_to_their_client(options: dict[str, Any], says: str) -> None:
    """The error that vLLM answers with 400."""
    options = dict(options)
    stores = {"": ServedStore(SpanRule(), "")}
    request = SimpleNamespace(resumable=options.pop("resumable", False), prompt_token_ids=[1, 2, 3], lora_request=None)
    with pytest.raises(VLLMValidationError, match=says):
        requests._check(request, SamplingParams(**options), stores)
    sound = SimpleNamespace(resumable=False, prompt_token_ids=[1], lora_request=None)
    requests._check(sound, SamplingParams(max_tokens=1), stores)


def test_unknown_keys_of_ours_are_refused() -> None:
    with pytest.raises(ConfigError, match="'memoir_sapn'"):
        parse_options({"memoir_sapn": "0:1"}, prompt_len=10)


def test_the_stores_are_read_once_for_all_requests_of_an_engine() -> None:
    asked = SimpleNamespace(resumable=False, prompt_token_ids=[1, 2, 3], lora_request=None)
    process = requests._checking(lambda processor, *args: asked)

    def engine(*names: str) -> Any:
        stores = {name: {"span": {}, "chat": False, "adapter": ""} for name in names}
        return SimpleNamespace(vllm_config=SimpleNamespace(additional_config={"memoir": {}, "memoir_stores": stores}))

    first, second, bare = (
        engine("", "laws"),
        engine(""),
        SimpleNamespace(vllm_config=SimpleNamespace(additional_config={})),
    )
    laws = SamplingParams(extra_args={"memoir_store": "laws"})
    for name in ("1", "2"):
        assert process(first, name, "a prompt", laws) is asked
        assert process(bare, name, "a prompt", laws) is asked
        with pytest.raises(VLLMValidationError, match="'laws': this server has ''"):
            process(second, name, "a prompt", laws)
    assert requests._stores_of(first) is requests._stores_of(first) is not requests._stores_of(second)
