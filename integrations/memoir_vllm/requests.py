"""What one request may ask of us, and what the answer says.

Options come in as `vllm_xargs` of the OpenAI API (`SamplingParams.extra_args`). They are checked in the front end, by
a wrapper of `InputProcessor.process_inputs` (vllm/v1/engine/input_processor.py): the last place that knows the prompt's
length and whose VLLMValidationError becomes a 400 for the one client.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from memoir_retrieval.errors import ConfigError, MemoirError
from memoir_retrieval.lookup.decision import Decision
from memoir_retrieval.question.candidates import Pieces, find_candidates
from memoir_retrieval.question.span import Span, SpanRule, find_span
from memoir_retrieval.question.tasks import pooled_spans
from memoir_vllm import config
from memoir_vllm.patches import wrap_once

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor

__all__ = [
    "Decision",
    "Options",
    "Query",
    "Routed",
    "install",
    "parse_options",
    "put_queries",
    "put_routed",
    "queries_of",
    "query_of",
    "routed_of",
    "store_of",
]

# The most edits that one response may name.
NEAREST = 20
_SPAN = re.compile(r"(\d{1,9}):(\d{1,9})")


class Routed(NamedTuple):
    """The decision of one request, as it goes from the workers to the scheduler, and back to a request of its prompt.

    decision: what the response says.
    row: of the matched mask in the store's codes, or -1. An edit may have several masks, so it is the row that says
        which residual acted.
    store: of a match, the digest of the generation that the row belongs to.
    """

    decision: Decision
    row: int = -1
    store: str = ""


class Query(NamedTuple):
    """What the scheduler sends the workers of a request that begins.

    span: the message to look up; empty where the prompt holds no question.
    off: opted out.
    nearest: how many of the nearest edits the decision names.
    routed: the decision where the prompt was decided before, else None.
    parts: of the message, which are looked up too.
    adapter: a LoRA adapter answers that has no store. Its activations are others than those of the model on which edits
        were made, so nothing is looked up.
    image: the prompt holds an image, a video or sound. Edits are made on text, so nothing is looked up.
    store: name of the one that is asked.
    reason: why nothing is looked up, where more is known.
    """

    span: Span
    off: bool = False
    nearest: int = 0
    routed: Routed | None = None
    parts: tuple[Span, ...] = ()
    adapter: bool = False
    image: bool = False
    store: str = ""
    reason: str = ""

    @property
    def pooled(self) -> list[Span]:
        """What is pooled of it, see `pooled_spans`."""
        return pooled_spans((self.span, *self.parts))

    @property
    def computed_from(self) -> int:
        """The position from which on every token passes the layer: where a part begins, a KV block's sum is no use."""
        return min((self.span.decided_from, *(part.start for part in self.parts)))

    def summed(self, prompt: int) -> int:
        """How many of a prompt's tokens count in the sums of KV blocks: none of an adapter's that has no store.

        prompt: how many it has.
        """
        return 0 if self.adapter else prompt

    @property
    def is_looked_up(self) -> bool:
        """Whether there is something to decide."""
        return not self.off and self.span.start < self.span.end


# What travels goes as an attribute beside the dataclass' fields: the object is pickled between the processes, so it
# arrives.


def put_queries(step: Any, queries: Mapping[str, Query]) -> Any:
    """Send queries of requests that begin along with a step. Returns the step.

    step: a SchedulerOutput.
    queries: by the id of the request.
    """
    step.memoir_queries = queries
    return step


def queries_of(step: Any) -> Mapping[str, Query]:
    """What `put_queries` has put, or nothing.

    step: a SchedulerOutput.
    """
    return getattr(step, "memoir_queries", {})


def put_routed(output: Any, routed: Mapping[str, Routed]) -> Any:
    """Send what was decided of requests along with the output of a step. Returns the output.

    output: a ModelRunnerOutput.
    routed: by the id of the request.
    """
    output.memoir_routed = routed
    return output


def routed_of(output: Any) -> Mapping[str, Routed]:
    """What `put_routed` has put, or nothing.

    output: a ModelRunnerOutput.
    """
    return getattr(output, "memoir_routed", {})


class Options(NamedTuple):
    """What a client asks of one request.

    off: serve the base model.
    span: the question's tokens as the client gives them, or None to find them.
    nearest: how many of the nearest edits the response names.
    store: name of the one that is asked; "" for that of the adapter, or the default one.
    """

    off: bool = False
    span: Span | None = None
    nearest: int = 0
    store: str = ""


def parse_options(extra_args: Mapping[str, Any] | None, prompt_len: int) -> Options:
    """Read `vllm_xargs`.

    extra_args: as the client sent them.
    prompt_len: tokens of the prompt.

    Raises ConfigError for a value or a key `memoir*` that is not known.
    """
    ours = {key: value for key, value in (extra_args or {}).items() if key.startswith("memoir")}
    off = ours.pop("memoir", None)
    if off not in (None, "off"):
        raise ConfigError(f'vllm_xargs memoir is {off!r}: use "off" to be served without edits, or leave it out')
    span = _parse_span(ours.pop("memoir_span", None), prompt_len)
    nearest = ours.pop("memoir_nearest", 0)
    if type(nearest) is not int or not 0 <= nearest <= NEAREST:
        raise ConfigError(f"vllm_xargs memoir_nearest is {nearest!r}: use a number of edits, 1 to {NEAREST}")
    report = ours.pop("memoir_report", 1)  # read by front/responses.py
    if report != 1:
        raise ConfigError(f"vllm_xargs memoir_report is {report!r}: use 1 to have a stream end with the decision")
    store = ours.pop("memoir_store", "")
    if not isinstance(store, str):
        raise ConfigError(f"vllm_xargs memoir_store is {store!r}: use the name of a store, or leave it out")
    if ours:
        known = "memoir, memoir_span, memoir_nearest, memoir_store or memoir_report"
        raise ConfigError(f"vllm_xargs {next(iter(ours))!r} is not known: use {known}")
    return Options(off == "off", span, nearest, store)


def store_of(
    extra_args: Mapping[str, Any] | None, adapter: LoRARequest | None, stores: Mapping[str, config.ServedStore]
) -> str | None:
    """Name of the store that a request asks; None where an adapter answers that has none.

    extra_args: as the client sent them.
    adapter: that answers, or None.
    stores: of this server, by name.

    Raises ConfigError for a store that is not there, or that was made on another model than answers; ModelError for an
    adapter that cannot be read.
    """
    name = (extra_args or {}).get("memoir_store", "")
    if adapter is not None:
        if name not in ("", adapter.lora_name):
            raise ConfigError(
                f"vllm_xargs memoir_store is {name!r}, but adapter {adapter.lora_name} answers, whose edits are in the "
                "store of its name: leave memoir_store out"
            )
        name = adapter.lora_name
        if name not in stores and "memoir_store" not in (extra_args or {}):
            return None
    if name not in stores:
        raise ConfigError(f"vllm_xargs memoir_store is {name!r}: this server has {', '.join(map(repr, stores))}")
    stores[name].require(name, adapter)
    return str(name)


def query_of(prompt: Sequence[int], extra_args: Mapping[str, Any] | None, rule: SpanRule, pieces: Pieces) -> Query:
    """What is looked up of a request, which is judged here and nowhere else.

    prompt: its token ids.
    extra_args: as the client sent them.
    rule: how the question is found.
    pieces: of the served tokenizer.
    """
    try:
        options = parse_options(extra_args, len(prompt))
    except ConfigError:  # a front end of another language let it pass; the response will say "unroutable"
        return Query(Span(0, 0))
    if options.span:
        # What is looked up is the client's choice. Where a template ends the message, the residual acts where it does
        # for the message as a whole; of raw text nobody but the client knows where the question ends.
        span = options.span._replace(weighted=rule.weighted, acts=rule.acts)
        message = find_span(prompt, rule)
        behind = max(0, message.acts_from - span.acts_from) if message.behind else 0
        return Query(span._replace(behind=behind), options.off, options.nearest)
    if options.off:  # nothing of it is looked up, so its parts need not be read
        return Query(find_span(prompt, rule), True, options.nearest)
    message, *parts = (candidate.span for candidate in find_candidates(prompt, rule, pieces))
    return Query(message, options.off, options.nearest, parts=tuple(parts))


def _parse_span(option: Any, prompt_len: int) -> Span | None:
    if option is None:
        return None
    numbers = _SPAN.fullmatch(option) if isinstance(option, str) else None
    span = Span(int(numbers[1]), int(numbers[2])) if numbers else None
    if span is None or not 0 <= span.start < span.end <= prompt_len:
        raise ConfigError(
            f'vllm_xargs memoir_span is {option!r}: use "start:end" with 0 <= start < end <= {prompt_len}, '
            "the number of prompt tokens"
        )
    return span


def install() -> None:
    """Wrap `InputProcessor.process_inputs` once; called in a process that has seen a `memoir` section.

    Engines of the same process that have no such section are passed through.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    wrap_once(InputProcessor, "process_inputs", _checking)


def _checking(original: Any) -> Any:
    def process_inputs(
        self: InputProcessor, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> EngineCoreRequest:
        request = original(self, request_id, prompt, params, *args, **kwargs)
        if "memoir" in (self.vllm_config.additional_config or {}):
            _check(request, params, _stores_of(self))
        return request

    return process_inputs


def _stores_of(processor: Any) -> Mapping[str, config.ServedStore]:
    """Of a processor's engine. They never change, so their table is made for its first request."""
    stores: Mapping[str, config.ServedStore] | None = getattr(processor, "_memoir_stores", None)
    if stores is None:
        stores = processor._memoir_stores = config.served_stores(processor.vllm_config)
    return stores


def _check(request: EngineCoreRequest, params: SamplingParams, stores: Mapping[str, config.ServedStore]) -> None:
    """params: as they came in; the request holds a copy that vLLM has completed."""
    from vllm.exceptions import VLLMValidationError

    if request.resumable:
        raise VLLMValidationError(
            "memoir cannot serve streaming input: its prompt has no end to look up; send the whole prompt at once"
        )
    if params.max_tokens == 1 and params.watermarking is False and not params.detokenize:
        # Only beam search asks so: each beam comes back as a prompt, whose raw text would be pooled as a question.
        raise VLLMValidationError("memoir cannot serve beam search: use sampling (use_beam_search false)")
    try:
        parse_options(params.extra_args, len(request.prompt_token_ids or ()))
        store_of(params.extra_args, request.lora_request, stores)
    except MemoirError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
