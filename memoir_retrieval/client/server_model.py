"""Asking a running vLLM server over HTTP, as evaluation asks the reference model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from memoir_retrieval.client.server import Reply, Server
from memoir_retrieval.errors import ServerError
from memoir_retrieval.lookup.reference import Answer
from memoir_retrieval.model.base import load_tokenizer, resolve
from memoir_retrieval.question.prompts import Prompt, given_ids, prompt_ids, target_ids
from memoir_retrieval.question.span import find_span
from memoir_retrieval.question.thinking import behind_thinking
from memoir_retrieval.store.read import EditStore

__all__ = ["ServerModel"]

T = TypeVar("T")
# Requests in flight: enough for the server to batch, few enough for its queue.
CONCURRENCY = 16


class ServerModel:
    """A server that serves `store`; the same calls as `EditedModel`.

    Prompts go as token ids to /v1/completions, so client and server cannot render them differently.
    """

    def __init__(self, url: str, store: EditStore, model: str | None = None):
        """Reach a server.

        url: with or without /v1.
        store: what the server serves; its settings render the prompts.
        model: whose tokenizer renders them, a name or a folder (default: the model that the store names).

        Raises ServerError where no server answers, or it wants another key; ConfigError where `openai` is missing.
        """
        self._server = Server(url, retries=2)
        self._store = store
        self._tokenizer = load_tokenizer(resolve(model or store.manifest.model))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt as the store's settings render it.

        prompt: text or messages.
        """
        return prompt_ids(self._tokenizer, prompt, chat=self._store.manifest.chat)

    def target_ids(self, target: str) -> list[int]:
        """Token ids of an answer, without the end token.

        target: the answer's text.
        """
        return target_ids(self._tokenizer, target, chat=self._store.manifest.chat)

    def generate(
        self,
        prompts: Sequence[Prompt | list[int]],
        *,
        max_new_tokens: int = 32,
        edited: bool = True,
        wanted: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Greedy answers with natural stop.

        prompts: text, messages or token ids.
        max_new_tokens: the most tokens of an answer.
        edited: False asks the base model.
        wanted: as for `EditedModel.generate`, but a server gives nothing up.

        Raises ServerError where the server refuses, has no plugin, or serves another generation.
        """

        def ask(prompt: Prompt | list[int]) -> Answer:
            reply = self._ask(given_ids(prompt, self.prompt_ids), max_new_tokens, edited)
            return self._answer(reply.tokens, reply, edited)

        return self._many(ask, prompts)

    def predict(
        self, prompts: Sequence[Prompt | list[int]], targets: Sequence[Sequence[int]], *, edited: bool = True
    ) -> list[Answer]:
        """Teacher forcing: the server reads prompt and target at once, and is given the question's span.

        prompts: text, messages or token ids.
        targets: token ids of each answer.
        edited: False asks the base model.
        """

        def ask(pair: tuple[Prompt | list[int], Sequence[int]]) -> Answer:
            ids, target = given_ids(pair[0], self.prompt_ids), pair[1]
            rule = self._store.manifest.span
            start, end = find_span(ids, rule)[:2]
            # Where parts of a message are looked up the server finds them itself, and a template ends the message.
            given = edited and start < end and not rule.candidates
            span = {"vllm_xargs": {"memoir_span": f"{start}:{end}"}} if given else {}
            reply = self._ask([*ids, *target], 1, edited, prompt_logprobs=1, **span)
            return self._predictions(reply, target, edited)

        return self._many(ask, list(zip(prompts, targets, strict=True)))

    def score(self, prompts: Sequence[Prompt | list[int]], *, edited: bool = True) -> list[Answer]:
        """How likely the server's model finds the questions themselves, from their second token on.

        prompts: text, messages or token ids.
        edited: False asks the base model.
        """

        def ask(prompt: Prompt | list[int]) -> Answer:
            ids = given_ids(prompt, self.prompt_ids)
            start, end = find_span(ids, self._store.manifest.span)[:2]
            reply = self._ask(ids, 1, edited, prompt_logprobs=1)
            return self._predictions(reply, ids[start + 1 : end], edited, len(ids) - end)

        return self._many(ask, prompts)

    def compare(
        self, prompts: Sequence[Prompt | list[int]], targets: Sequence[Sequence[int]] | None = None
    ) -> tuple[list[Answer], list[Answer]]:
        """`predict`, or `score` where there are no targets, with edits on and off.

        prompts: text, messages or token ids.
        targets: token ids of each answer.
        """
        if targets is None:
            return self.score(prompts), self.score(prompts, edited=False)
        return self.predict(prompts, targets), self.predict(prompts, targets, edited=False)

    def _predictions(self, reply: Reply, tokens: Sequence[int], edited: bool, after: int = 0) -> Answer:
        """What was expected where the prompt has `tokens`, which `after` others follow."""
        end = len(reply.prompt_logprobs) - after
        positions = reply.prompt_logprobs[end - len(tokens) : end]
        best = [next(int(t) for t, entry in position.items() if entry["rank"] == 1) for position in positions]
        logprobs = [position[str(t)]["logprob"] for position, t in zip(positions, tokens, strict=True)]
        return self._answer(tuple(best), reply, edited, tuple(logprobs))

    def _ask(self, ids: list[int], tokens: int, edited: bool, **fields: Any) -> Reply:
        return self._server.ask(ids, chat=False, tokens=tokens, off=not edited, **fields)

    def _answer(self, tokens: tuple[int, ...], reply: Reply, edited: bool, logprobs: tuple[float, ...] = ()) -> Answer:
        decision = reply.decision
        if decision is None:
            raise ServerError("the server answers without edits: start it with `memoir serve MODEL --store DIR`")
        if edited and decision.generation != self._store.manifest.generation:
            raise ServerError(
                f"the server has generation {decision.generation} of the store, {self._store.path} is at "
                f"{self._store.manifest.generation}: restart the server, or POST /memoir/reload"
            )
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        if self._store.manifest.chat:
            text = behind_thinking(self._tokenizer, text)
        return Answer(text, tokens, decision.edit, decision.overlap, logprobs)

    @staticmethod
    def _many(ask: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            return list(pool.map(ask, items))
