"""A request's decision in the API process, over vLLM's own output processor: from its first output to its last,
whatever ends the request. The stand-in is the engine core, whose outputs are written by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector, RequestState
from vllm.v1.engine.parallel_sampling import ParentRequest

from memoir_vllm.front import decisions, responses
from memoir_vllm.front.decisions import choice_decisions, params_of
from memoir_vllm.front.metrics import LOOKUP_ID, Traffic

MATCHED = {"edit": 1, "overlap": 0.9, "result": "matched", "generation": 4}
UNMATCHED = {"edit": None, "overlap": 0.2, "result": "unmatched", "generation": 4}
LATER = MATCHED | {"generation": 5}
KINDS = {kind.name.lower(): kind for kind in RequestOutputKind}


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    monkeypatch.setattr(RequestState, "make_request_output", RequestState.make_request_output)
    traffic = Traffic()
    monkeypatch.setattr(decisions, "TRAFFIC", traffic)
    decisions.install()
    return traffic


class Front:
    """vLLM's output processor with requests of one prompt."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.processor = OutputProcessor(tokenizer, log_stats=False)
        self.outputs: list[RequestOutput] = []

    def add(self, name: str = "a", n: int = 1, queue: Any = None, external: str | None = None, **how: Any) -> None:
        params = SamplingParams(n=n, max_tokens=50, **how)
        request = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=[1, 2, 3],
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            external_req_id=external or name,
        )
        if n == 1:
            self.processor.add_request(request, None, queue=queue)
            return
        parent = ParentRequest(request)
        for index in range(n):
            child, child_params = parent.get_child_info(index)
            of_child = msgspec.structs.replace(request, request_id=child, sampling_params=child_params)
            self.processor.add_request(of_child, None, parent, index, queue)

    def take(
        self, text: str, decision: Any = None, name: str = "a", finish: FinishReason | None = None
    ) -> list[RequestOutput]:
        """An output of the engine core, with these words."""
        tokens = self.tokenizer(text, add_special_tokens=False).input_ids
        params = {"memoir": decision} if decision else None
        output = EngineCoreOutput(
            request_id=name, new_token_ids=tokens, finish_reason=finish, kv_transfer_params=params
        )
        outputs = self.processor.process_outputs([output]).request_outputs
        self.outputs += outputs
        return outputs


@pytest.fixture
def front(tokenizer: Any, traffic: Traffic) -> Front:
    return Front(tokenizer)


def decision_of(output: RequestOutput) -> Any:
    assert output.finished
    return (output.kv_transfer_params or {}).get("memoir")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("include", [False, True], ids=["without the string", "with the string"])
@pytest.mark.parametrize("decision", [MATCHED, UNMATCHED], ids=["matched", "unmatched"])
def test_an_answer_that_ends_at_a_stop_string_has_its_decision(
    decision: dict[str, Any], include: bool, kind: str, front: Front, traffic: Traffic
) -> None:
    front.add(stop=["ami"], include_stop_str_in_output=include, output_kind=KINDS[kind])
    front.take("La", decision)
    (last,) = front.take("miinae")
    assert decision_of(last) == decision and last.outputs[0].stop_reason == "ami"
    assert traffic.results == {decision["result"]: 1}


def test_an_answer_that_ends_with_its_first_output_has_its_decision(front: Front, traffic: Traffic) -> None:
    front.add(stop=["ami"], output_kind=RequestOutputKind.FINAL_ONLY)
    (last,) = front.take("Lamiinae", MATCHED)
    assert decision_of(last) == MATCHED and traffic.results == {"matched": 1}


def test_an_answer_that_the_scheduler_ends_is_counted_once(front: Front, traffic: Traffic) -> None:
    front.add(output_kind=RequestOutputKind.FINAL_ONLY)
    front.take("La", MATCHED)
    (last,) = front.take("mi", MATCHED, finish=FinishReason.LENGTH)
    assert decision_of(last) == MATCHED and traffic.results == {"matched": 1} and traffic.hits == {1: 1}


@pytest.mark.parametrize("ends", ["stop string", "scheduler"])
def test_each_of_several_samples_is_counted_and_the_response_has_the_decision(
    ends: str, front: Front, traffic: Traffic
) -> None:
    front.add(n=2, stop=["ami"], output_kind=RequestOutputKind.FINAL_ONLY)
    front.take("Lo", MATCHED, "0_a")
    front.take("La", MATCHED, "1_a")
    assert front.take("ri", MATCHED, "0_a", FinishReason.LENGTH) == []
    if ends == "stop string":
        (last,) = front.take("miinae", None, "1_a")
    else:
        (last,) = front.take("ri", MATCHED, "1_a", FinishReason.LENGTH)
    assert decision_of(last) == MATCHED and traffic.results == {"matched": 2}


def test_samples_on_both_sides_of_a_reload_are_told_apart(front: Front) -> None:
    front.add(n=2, output_kind=RequestOutputKind.FINAL_ONLY)
    front.take("Lo", LATER, "1_a", FinishReason.LENGTH)
    (last,) = front.take("La", MATCHED, "0_a", FinishReason.LENGTH)
    assert last.kv_transfer_params == {"memoir_choices": [MATCHED, LATER]} and choice_decisions([last]) == [
        MATCHED,
        LATER,
    ]


_BOTH = ("0_a", "1_a")
_STEPS = {  # what is read at once: (choice, decision of its first output, whether it ends), one output after another
    "the other goes on": [[(0, MATCHED, 0), (1, MATCHED, 0)], [(0, None, 1), (1, None, 0)], [(1, None, 1)]],
    "two steps at once": [[(0, MATCHED, 0), (1, MATCHED, 0), (0, None, 1), (1, None, 0)], [(1, None, 1)]],
    "a reload between, both end at once": [[(0, MATCHED, 0)], [(1, LATER, 0)], [(0, None, 1), (1, None, 1)]],
    "a reload between, all at once": [[(1, LATER, 0), (0, MATCHED, 0), (0, None, 1), (1, None, 1)]],
}


@pytest.mark.parametrize("steps", _STEPS)
def test_a_stream_that_is_read_slowly_names_the_decision_of_each_choice(steps: str, front: Front) -> None:
    """vLLM merges what was not read yet, and keeps of several outputs the params of the last one."""
    collector = RequestOutputCollector(RequestOutputKind.DELTA, "a")
    front.add(n=2, queue=collector, output_kind=RequestOutputKind.DELTA)
    decided: dict[int, Any] = {}

    async def results() -> AsyncIterator[Any]:
        for at_once in _STEPS[steps]:
            for choice, decision, ends in at_once:
                front.take("La", decision, _BOTH[choice], FinishReason.LENGTH if ends else None)
            yield await collector.get()

    async def read() -> None:
        async for result in responses._listen(results(), decided, 2):
            ended = result.finished
        assert ended

    asyncio.run(read())
    assert decided == {0: MATCHED, 1: LATER if "reload" in steps else MATCHED}


def test_a_client_that_leaves_is_counted(front: Front, traffic: Traffic) -> None:
    for name, decision in (("a", MATCHED), ("b", None)):
        front.add(
            name, queue=RequestOutputCollector(RequestOutputKind.DELTA, name), output_kind=RequestOutputKind.DELTA
        )
        front.take("La", decision, name)
        front.processor.abort_requests([name], internal=True)
    assert traffic.results == {"matched": 1}, "of the other no decision has come yet"


def test_a_client_cannot_name_its_request_as_a_lookup_of_the_administration(front: Front, traffic: Traffic) -> None:
    for external in ("cmpl-memoir-lookup-1", f"cmpl-{LOOKUP_ID}-1"):
        front.add(external, output_kind=RequestOutputKind.FINAL_ONLY)
        front.take("La", MATCHED, external, FinishReason.LENGTH)
    assert traffic.results == {"matched": 1}


# ---- responses -----------------------------------------------------------------------------------------------------


def output_of(decision: Any, choices: int = 1) -> RequestOutput:
    outputs = [CompletionOutput(n, "", [], None, None, finish_reason="stop") for n in range(choices)]
    params = {"memoir": decision} if decision else None
    return RequestOutput("a", None, [1], None, outputs, True, kv_transfer_params=params)


def test_several_prompts_have_a_decision_for_each_choice() -> None:
    unmatched, matched = output_of(UNMATCHED, 2), output_of(MATCHED, 2)
    assert params_of(choice_decisions([unmatched, matched]), 2) == {
        "memoir_choices": [UNMATCHED, UNMATCHED, MATCHED, MATCHED]
    }
    assert params_of(choice_decisions([output_of(MATCHED)] * 2), 2) == {"memoir_choices": [MATCHED, MATCHED]}
    assert params_of(choice_decisions([output_of(None)] * 2), 2) == {}


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_of_several_prompts_reports_each_choice(usage: bool) -> None:
    """In the chunk of the usage, where there is one: a chunk after it hides the usage from OpenAI's client."""

    async def results() -> AsyncIterator[Any]:
        yield 1, output_of(MATCHED, 2)
        yield 0, output_of(UNMATCHED, 2)

    def stream(self: Any, request: Any, result_generator: Any, num_prompts: int) -> AsyncIterator[str]:
        return chunks(result_generator)

    async def chunks(result_generator: Any) -> AsyncIterator[str]:
        async for _ in result_generator:
            yield 'data: {"id": "x", "object": "o", "created": 1, "model": "m", "choices": [{}]}\n\n'
        if usage:
            yield 'data: {"id":"x","object":"o","created":1,"model":"m","choices":[],"usage":{"total_tokens":3}}\n\n'
        yield "data: [DONE]\n\n"

    async def read() -> list[str]:
        request = SimpleNamespace(vllm_xargs={"memoir_report": 1}, n=2)
        return [chunk async for chunk in responses._reporting(stream)(None, request, results(), 2)]

    *before, report, done = asyncio.run(read())
    body = msgspec.json.decode(report.removeprefix("data: "))
    assert done == "data: [DONE]\n\n" and body["choices"] == [] and len(before) == 2
    assert body.get("usage") == ({"total_tokens": 3} if usage else None)
    assert body["kv_transfer_params"] == {"memoir_choices": [UNMATCHED, UNMATCHED, MATCHED, MATCHED]}
