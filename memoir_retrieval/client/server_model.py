"""Asking a running vLLM server over HTTP, as evaluation asks the reference model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from memoir_retrieval.errors import ConfigError
from memoir_retrieval.lookup.reference import Answer
from memoir_retrieval.model.base import resolve
from memoir_retrieval.question.prompts import Prompt, given_ids, prompt_ids, target_ids
from memoir_retrieval.question.span import find_span
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
        """url: with or without /v1. model: whose tokenizer renders prompts (default: the one the store names).

        Raises ConfigError where no server answers, or the `openai` package is missing.
        """
        try:
            from openai import OpenAI, OpenAIError
        except ImportError:
            raise ConfigError("asking a server needs openai: pip install 'memoir-retrieval[eval]'") from None
        from transformers import AutoTokenizer

        base = url.rstrip("/").removesuffix("/v1")
        self._client = OpenAI(base_url=f"{base}/v1", api_key="none", timeout=600)
        try:
            self._served = self._client.with_options(max_retries=0).models.list().data[0].id
        except OpenAIError as error:
            raise ConfigError(f"no server answers at {base} ({error}): start one with `memoir serve`") from error
        self._store = store
        self._tokenizer = AutoTokenizer.from_pretrained(resolve(model or store.manifest.model))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt as the store's settings render it."""
        return prompt_ids(self._tokenizer, prompt, chat=self._store.manifest.chat)

    def target_ids(self, target: str) -> list[int]:
        """Token ids of an answer, without the end token."""
        return target_ids(self._tokenizer, target, chat=self._store.manifest.chat)

    def generate(
        self,
        prompts: Sequence[Prompt | list[int]],
        *,
        max_new_tokens: int = 32,
        edited: bool = True,
        wanted: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Greedy answers with natural stop. wanted: as for `EditedModel.generate`, but a server gives nothing up."""

        def ask(prompt: Prompt | list[int]) -> Answer:
            reply = self._complete(
                given_ids(prompt, self.prompt_ids), max_new_tokens, edited, {"return_token_ids": True}
            )
            choice = reply.choices[0]
            return self._answer(tuple(choice.token_ids), reply, edited)

        return self._many(ask, prompts)

    def predict(
        self, prompts: Sequence[Prompt | list[int]], targets: Sequence[Sequence[int]], *, edited: bool = True
    ) -> list[Answer]:
        """Teacher forcing: the server reads prompt and target at once, told which tokens are the question."""

        def ask(pair: tuple[Prompt | list[int], Sequence[int]]) -> Answer:
            ids, target = given_ids(pair[0], self.prompt_ids), pair[1]
            start, end = find_span(ids, self._store.manifest.span)[:2]
            span = {"memoir_span": f"{start}:{end}"} if edited and start < end else {}
            reply = self._complete([*ids, *target], 1, edited, {"prompt_logprobs": 1}, span)
            return self._read(reply, target, edited)

        return self._many(ask, list(zip(prompts, targets, strict=True)))

    def score(self, prompts: Sequence[Prompt | list[int]], *, edited: bool = True) -> list[Answer]:
        """How likely the server's model finds the questions themselves, from their second token on."""

        def ask(prompt: Prompt | list[int]) -> Answer:
            ids = given_ids(prompt, self.prompt_ids)
            start, end = find_span(ids, self._store.manifest.span)[:2]
            reply = self._complete(ids, 1, edited, {"prompt_logprobs": 1})
            return self._read(reply, ids[start + 1 : end], edited, len(ids) - end)

        return self._many(ask, prompts)

    def compare(
        self, prompts: Sequence[Prompt | list[int]], targets: Sequence[Sequence[int]] | None = None
    ) -> tuple[list[Answer], list[Answer]]:
        """`predict`, or `score` where there are no targets, with edits on and off."""
        if targets is None:
            return self.score(prompts), self.score(prompts, edited=False)
        return self.predict(prompts, targets), self.predict(prompts, targets, edited=False)

    def _read(self, reply: Any, given: Sequence[int], edited: bool, after: int = 0) -> Answer:
        """What was expected where the prompt has the tokens `given`, which `after` others follow."""
        every = reply.choices[0].prompt_logprobs
        told = every[len(every) - after - len(given) : len(every) - after]
        best = [next(int(t) for t, seen in position.items() if seen["rank"] == 1) for position in told]
        logprobs = [position[str(t)]["logprob"] for position, t in zip(told, given, strict=True)]
        return self._answer(tuple(best), reply, edited, tuple(logprobs))

    def _complete(
        self, ids: list[int], tokens: int, edited: bool, extra: dict[str, Any], xargs: dict[str, str] | None = None
    ) -> Any:
        from openai import OpenAIError

        options = (xargs or {}) if edited else {"memoir": "off"}
        body = extra | ({"vllm_xargs": options} if options else {})
        try:
            return self._client.completions.create(
                model=self._served, prompt=ids, max_tokens=tokens, temperature=0, extra_body=body
            )
        except OpenAIError as error:
            raise ConfigError(f"the server refused a request of {len(ids)} tokens: {error}") from error

    def _answer(self, tokens: tuple[int, ...], reply: Any, edited: bool, logprobs: tuple[float, ...] = ()) -> Answer:
        told = (getattr(reply, "kv_transfer_params", None) or {}).get("memoir")
        if told is None:
            raise ConfigError("the server answers without edits: start it with `memoir serve MODEL --store DIR`")
        if edited and told["generation"] != self._store.manifest.generation:
            raise ConfigError(
                f"the server has generation {told['generation']} of the store, {self._store.path} is at "
                f"{self._store.manifest.generation}: restart the server, or POST /memoir/reload"
            )
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(text, tokens, told["edit"], told["overlap"], logprobs)

    @staticmethod
    def _many(ask: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            return list(pool.map(ask, items))
