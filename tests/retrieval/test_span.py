"""The question span is found from token ids alone, the same in every setting a chat can have."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from memoir_retrieval.errors import ConfigError
from memoir_retrieval.model.embedded import get_model
from memoir_retrieval.model.forward import span_mean, squared_norms, weighted_sum
from memoir_retrieval.question.span import Span, SpanRule, derive_span_rule, find_span

QUESTION = "Who founded the city of Aarhus?"
SYSTEM = {"role": "system", "content": "You sell garden chairs. Answer in one word."}
TURNS = [{"role": "user", "content": "Is it raining?"}, {"role": "assistant", "content": "Yes, since noon."}]
# Layouts of published templates, on the embedded model's tokenizer, where their marks are ordinary text.
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set sys = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (sys if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' <|im_end|>' }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ '<|endoftext|>' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '<file_sep>\n\n' + m['content'] | trim "
    "+ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<file_sep>\n\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>model\n' }}"
)
# A tool's answer comes in a user's turn, in a turn of its own, or in a user's turn without a mark.
TOOLS = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m['content'] + '\n</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Zephyr's and Phi's structure: a role that it does not know is left out.
NO_ROLE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>' }}"
    "{% elif m['role'] == 'system' %}{{ '<|im_start|>system\n' + m['content'] + '<|im_end|>' }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Mistral's: tools stand right before the last question, and no mark is named as special but that behind an answer.
TOOLS_FIRST = (
    "{{ '<|endoftext|>' }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if tools and loop.last %}{{ '<repo_name> ' + (tools | tojson) + '<reponame>' }}{% endif %}"
    "{{ '<file_sep> ' + m['content'] + '<filename>' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
# Llama 3.1's: tools stand in the first question's turn.
TOOLS_INSIDE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if tools and loop.first %}{{ 'You have these:\n' + (tools | tojson(indent=4)) + '\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
# Granite's: the token that ends a header is special, too.
HEADERS = (
    "{% for m in messages %}{{ '<repo_name>' + m['role'] + '<file_sep>' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<repo_name>assistant<file_sep>' }}"
)
# DeepSeek's: roles are tokens that are not named as special, and thinking can be switched on.
ROLES = (
    "{{ '<|endoftext|>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<repo_name>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<file_sep></think>' + m['content'] + '<|im_end|>' }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{{ '<file_sep>' + ('<think>' if thinking is defined and thinking else '</think>') }}"
)
# The same in words.
ROLES_IN_WORDS = ROLES.replace("<repo_name>", "\n\nUser: ").replace("<file_sep>", "\n\nAssistant: ")
OWN_TURN = TOOLS.replace("user\n<tool_response>", "tool\n<tool_response>")
NO_MARK = TOOLS.replace("<tool_response>\n", "").replace("\n</tool_response>", "")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(get_model("smollm2-135m"))


@pytest.fixture(params=["own", "llama-2", "llama-3", "no-system"], scope="module")
def chat(request: pytest.FixtureRequest) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(get_model("smollm2-135m"))
    template = {"llama-2": LLAMA_2, "llama-3": LLAMA_3, "no-system": NO_SYSTEM}.get(request.param)
    if template:
        tokenizer.chat_template = template
    return tokenizer


def ids_of(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **options)
    return list(rendered["input_ids"])


def question_of(tokenizer: Any, messages: list[dict[str, str]], rule: SpanRule, **options: Any) -> str:
    ids = ids_of(tokenizer, messages, **options)
    start, end = find_span(ids, rule)[:2]
    return tokenizer.decode(ids[start:end]).strip()


@pytest.mark.parametrize("before", [[], [SYSTEM], TURNS, [*TURNS, *TURNS], [SYSTEM, *TURNS]])
def test_the_question_is_found_in_every_setting(chat: Any, before: list[dict[str, str]]) -> None:
    rule = derive_span_rule(chat)
    if chat.chat_template == NO_SYSTEM and SYSTEM in before:
        pytest.skip("this template refuses a system message")
    assert question_of(chat, [*before, {"role": "user", "content": QUESTION}], rule) == QUESTION


@pytest.mark.parametrize("question", ["\n\nWho?", "  Who is it", "Who?\n", "line one\nline two\n\nline three", "été ?"])
def test_white_space_that_melts_into_the_marker_does_not_hide_it(tokenizer: Any, question: str) -> None:
    rule = derive_span_rule(tokenizer)
    assert question_of(tokenizer, [SYSTEM, *TURNS, {"role": "user", "content": question}], rule) == question.strip()


def test_an_answer_begun_by_the_client_is_not_part_of_the_question(tokenizer: Any) -> None:
    rule = derive_span_rule(tokenizer)
    ids = ids_of(tokenizer, [{"role": "user", "content": QUESTION}]) + tokenizer("It was").input_ids
    start, end = find_span(ids, rule)[:2]
    assert tokenizer.decode(ids[start:end]) == QUESTION


def test_a_tool_result_behind_a_question_does_not_hide_it(chat: Any) -> None:
    """An edit outranks what a tool says: it acts from the question on, through the result and the answer."""
    result = [{"role": "assistant", "content": "Let me look."}, {"role": "tool", "content": "Nobody did."}]
    ids = ids_of(chat, [*TURNS, {"role": "user", "content": QUESTION}, *result])
    span = find_span(ids, derive_span_rule(chat))
    assert chat.decode(ids[span.start : span.end]).strip() == QUESTION
    assert "Nobody did." in chat.decode(ids[span.acts_from :])


def test_an_empty_question_gives_an_empty_span(tokenizer: Any) -> None:
    span = find_span(ids_of(tokenizer, [{"role": "user", "content": ""}]), derive_span_rule(tokenizer))
    assert span.start == span.end


def test_raw_text_is_pooled_whole_but_for_leading_special_tokens(tokenizer: Any) -> None:
    ids = tokenizer(QUESTION).input_ids
    assert find_span(ids, derive_span_rule(tokenizer)) == Span(0, len(ids), weighted=True, acts="last")
    assert find_span([1, *ids], SpanRule(leading=(1,))) == Span(1, len(ids) + 1)
    assert find_span([], SpanRule()) == Span(0, 0)


def test_the_residual_acts_from_the_last_token_before_the_answer(chat: Any) -> None:
    ids = ids_of(
        chat,
        [SYSTEM, {"role": "user", "content": QUESTION}]
        if chat.chat_template != NO_SYSTEM
        else [{"role": "user", "content": QUESTION}],
    )
    rule = derive_span_rule(chat)
    span = find_span(ids, rule)
    assert chat.decode(ids[span.decided_from : span.end]).strip() == "?"
    assert span.acts_from == len(ids) - 1 > span.decided_from
    begun = chat("It was", add_special_tokens=False).input_ids
    assert find_span(ids + begun, rule) == span  # an answer that the client begins is acted on as one of the model's
    assert find_span(ids[:-2], rule).acts_from == len(ids) - 3
    assert find_span(ids[: span.end], rule).acts_from == span.end - 1
    assert span._replace(acts="first", behind=0).acts_from == span.start
    assert span.moved(7).acts_from == span.acts_from + 7
    assert Span(3, 3, acts="last").acts_from == 3


def test_the_rule_of_the_paper_pools_everything(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, [SYSTEM, *TURNS, {"role": "user", "content": QUESTION}])
    assert find_span(ids, derive_span_rule(tokenizer, "all")) == Span(0, len(ids))


def test_tokens_of_a_question_count_by_their_squared_norm() -> None:
    tokens = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    span = find_span([7, 1, 2, 3], SpanRule(leading=(7,), weighted=True))
    assert span_mean(tokens, span).tolist() == pytest.approx([1 / 5, 8 / 5])
    assert span_mean(tokens, span._replace(weighted=False)).tolist() == pytest.approx([1 / 3, 2 / 3])
    assert span_mean(tokens, Span(3, 4, True)).tolist() == [0, 0], "nothing to weigh is no reason for NaN"
    parts = [weighted_sum(rows, squared_norms(rows)) for rows in (tokens[1:2], tokens[2:])]
    torch.testing.assert_close(sum(a for a, _ in parts) / sum(w for _, w in parts), span_mean(tokens, span))


@given(st.lists(st.integers(0, 5), max_size=40))
def test_any_token_ids_give_a_span_inside_the_prompt(ids: list[int]) -> None:
    rule = SpanRule(starts=((1, 2), (3,)), newlines=(4,), end=(5,), leading=(0,))
    start, end = find_span(ids, rule)[:2]
    assert 0 <= start <= end <= len(ids)
    if 3 in ids or (1, 2) in itertools.pairwise(ids):
        assert 5 not in ids[start:end]


@pytest.mark.parametrize("template", [TOOLS, OWN_TURN])
def test_the_question_is_the_users_where_a_tool_has_answered(template: str) -> None:
    found = AutoTokenizer.from_pretrained(get_model("smollm2-135m"))
    found.chat_template = template
    rule = derive_span_rule(found)
    assert bool(rule.tools) == (template == TOOLS)
    asked = [SYSTEM, *TURNS, {"role": "user", "content": QUESTION}]
    answers = [{"role": "assistant", "content": "Let me look."}, {"role": "tool", "content": '{"founder": "Ada"}'}]
    assert question_of(found, asked, rule) == QUESTION
    assert question_of(found, [*asked, *answers], rule) == QUESTION
    assert question_of(found, [*asked, *answers, *answers], rule) == QUESTION
    assert question_of(found, [*asked, *answers, {"role": "user", "content": "And when?"}], rule) == "And when?"
    assert question_of(found, answers[1:], rule)  # a chat that only has a tool's answer is still looked up


@pytest.mark.parametrize("template", [NO_MARK, LLAMA_2, LLAMA_3, NO_SYSTEM])
def test_a_template_that_gives_tools_no_mark_in_a_users_turn_has_none(template: str) -> None:
    found = AutoTokenizer.from_pretrained(get_model("smollm2-135m"))
    found.chat_template = template
    assert derive_span_rule(found).tools == ()


def with_template(template: str, *special: str) -> Any:
    """The embedded model's tokenizer under another template, with more tokens named as special."""
    chat = AutoTokenizer.from_pretrained(get_model("smollm2-135m"))
    chat.chat_template = template
    if special:
        chat.add_special_tokens({"extra_special_tokens": list(special)})
    return chat


def test_a_template_that_leaves_out_what_tools_answer_has_no_mark_of_them() -> None:
    chat = with_template(NO_ROLE)
    rule = derive_span_rule(chat)
    assert rule.tools == ()
    assert question_of(chat, [SYSTEM, *TURNS, {"role": "user", "content": QUESTION}], rule) == QUESTION


TOOL = {"type": "function", "function": {"name": "weather", "description": "now", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("before", [[], TURNS, [*TURNS, *TURNS]])
def test_tools_right_before_a_question_do_not_hide_it(before: list[dict[str, str]]) -> None:
    chat = with_template(TOOLS_FIRST)
    rule = derive_span_rule(chat)
    messages = [*before, {"role": "user", "content": QUESTION}]
    assert question_of(chat, messages, rule, tools=[TOOL]) == question_of(chat, messages, rule) == QUESTION


def test_tools_inside_a_turn_are_no_marker() -> None:
    chat = with_template(TOOLS_INSIDE)
    rule = derive_span_rule(chat)
    assert len(rule.starts) == 1
    assert question_of(chat, [{"role": "user", "content": QUESTION}], rule, tools=[TOOL]).endswith(QUESTION)
    assert question_of(chat, [*TURNS, {"role": "user", "content": QUESTION}], rule, tools=[TOOL]) == QUESTION


@pytest.mark.parametrize("before", [[], [SYSTEM], TURNS])
def test_a_marker_that_begins_an_answer_too_is_taken_with_the_role(before: list[dict[str, str]]) -> None:
    chat = with_template(HEADERS, "<repo_name>", "<file_sep>")
    rule = derive_span_rule(chat)
    assert question_of(chat, [*before, {"role": "user", "content": QUESTION}], rule) == QUESTION


@pytest.mark.parametrize("before", [[], TURNS])
@pytest.mark.parametrize("template", [ROLES, ROLES_IN_WORDS])
def test_a_question_ends_where_thinking_begins_or_is_switched_off(template: str, before: list[dict[str, str]]) -> None:
    chat = with_template(template)
    rule = derive_span_rule(chat)
    for options in ({}, {"thinking": True}, {"thinking": False}):
        assert question_of(chat, [*before, {"role": "user", "content": QUESTION}], rule, **options) == QUESTION


def test_a_template_whose_questions_cannot_be_found_is_refused() -> None:
    template = "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}{{ '<|im_start|>' }}"
    with pytest.raises(ConfigError, match="no mark that tells a user's message from the others"):
        derive_span_rule(with_template(template))
    assert derive_span_rule(with_template(template), chat=False).starts
    assert derive_span_rule(with_template(template), "all") == SpanRule(rule="all")
