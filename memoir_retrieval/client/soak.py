"""A soak that compares: many clients at a running server for long, every answer against the reference of the generation
that it reports.

The reference is the server itself while nobody else asks: before each round every question is asked alone, in a cache
of its own. What matches no edit must have the tokens of the same question opted out. Then clients of all kinds ask at
once, and in the middle of a round the store may change; what was answered by the new generation is compared once that
one has been asked in the quiet, too.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from random import Random
from typing import Any

import msgspec

from memoir_retrieval.background import unrelated_prompts
from memoir_retrieval.client.traffic import (
    KINDS,
    OPTED_OUT,
    NoAnswer,
    Reference,
    ServedAnswer,
    SoakClient,
    SoakQuestion,
    difference,
)
from memoir_retrieval.client.verify import Check
from memoir_retrieval.errors import ConfigError, MemoirError, ServerError
from memoir_retrieval.question.prompts import Prompt, as_messages
from memoir_retrieval.store.read import EditStore

__all__ = ["NEAR", "Soak", "SoakReport", "soak_prompts"]

ROUNDS = 20  # at least, so that what grows is seen to
SHOWN = 10  # differences and errors that a report quotes
GROWTH = 0.02
LEAST_SAMPLES = 3
"""Of a size, before the second quarter and the last are two of them."""
NEAR = {"float32": 0.002, "float16": 0.05, "bfloat16": 0.2}
"""By dtype: some times what a log-probability differs by from one shape of a batch to another, in nats."""
# Names end like this. Sizes may grow by GROWTH after the warm-up, counts of what is held may not grow at all.
SIZES, HELD = ("resident_memory_bytes", "resident_bytes"), ("open_fds", "memoir_older_generations")
PREEMPTIONS = "vllm:num_preemptions_total"


class SoakReport(msgspec.Struct, frozen=True):
    """What a soak has seen.

    server: its address.
    seconds: how long it took.
    requests: how many were sent, by kind, those that opted out and those with a span beside.
    generations: how many answered.
    answers: how many were compared.
    tokens: how many of them were compared.
    unclear: how many were not, behind a token that has another one near.
    preemptions: of requests, or None where the server does not say.
    differing: answers that differ from their reference.
    differences: the first of them.
    failed: requests that got no answer, and changes that failed.
    errors: the first of them.
    sizes: gauges of the server after the warm-up and at the end, by name.
    checks: what must hold.
    """

    server: str
    seconds: float
    requests: dict[str, int]
    generations: int
    answers: int
    tokens: int
    unclear: int
    preemptions: int | None
    differing: int
    differences: tuple[str, ...]
    failed: int
    errors: tuple[str, ...]
    sizes: dict[str, tuple[float, float]]
    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """False where a check failed."""
        return all(check.state != "fail" for check in self.checks)


def soak_prompts(store: EditStore, prompts: int, *, chat: bool, length: int, more: Sequence[str] = ()) -> list[Prompt]:
    """What to ask a server about its store: newest edits and unrelated prompts, and both at the end of a long text.

    store: that the server serves.
    prompts: of each kind.
    chat: as user messages, else as raw text.
    length: tokens that the server takes.
    more: texts to ask, too.
    """
    edits, unrelated = [edit.prompt for edit in store.edits[-prompts:]], unrelated_prompts()[:prompts]
    filler = " ".join(unrelated_prompts())[: 2 * length]  # half of the room or so
    texts = [*edits, *unrelated, *(f"{filler} {text}" for text in (*edits[:2], unrelated[0])), *more]
    return [as_messages(text) for text in texts] if chat else list(texts)


class Soak:
    """One soak of one server.

    references: by generation and question, what the quiet server answers, as far as it was asked.
    """

    def __init__(
        self,
        url: str,
        *,
        tokens: int = 8,
        clients: int = 8,
        near: float = NEAR["bfloat16"],
        seed: int = 0,
    ):
        """Nothing is sent yet.

        url: with or without /v1.
        tokens: of an answer.
        clients: how many ask at once.
        near: nats between the two best tokens: where they are nearer, rounding decides, and anything may follow.
        seed: of what is asked when.
        """
        self._traffic = SoakClient(url, tokens=tokens, clients=clients, near=near)
        self._clients, self._dice = clients, Random(seed)
        self.references: dict[int, list[Reference]] = {}
        self._base: dict[int, Reference] = {}  # by number of the question without its span
        self._questions: list[SoakQuestion] = []
        self._spans: dict[int, int] = {}
        self._waiting: list[tuple[int, bool, ServedAnswer]] = []
        self._requests: Counter[str] = Counter()
        self._sizes: defaultdict[str, list[float]] = defaultdict(list)
        self._answers = self._tokens = self._unclear = self._differing = self._failed = 0
        self._generations: set[int] = set()
        self._differences: list[str] = []
        self._errors: list[str] = []

    async def length(self) -> int:
        """The most tokens that the server takes. Raises ServerError where no server answers."""
        await self._traffic.begin()
        return self._traffic.length

    async def run(
        self,
        prompts: Sequence[Prompt],
        *,
        minutes: float,
        requests: int,
        changes: int = 0,
        change: Callable[[], Awaitable[None]] | None = None,
        measure: Callable[[], Mapping[str, float]] = dict,
        watch: Callable[[str], None] = lambda _: None,
    ) -> SoakReport:
        """Ask until the time is over or all requests are sent.

        prompts: texts for /v1/completions, messages for /v1/chat/completions.
        minutes: the most.
        requests: the most.
        changes: how often the store changes.
        change: changes it, and returns when the server has taken that up; MemoirError where it has not.
        measure: gauges beside those of /metrics, by name.
        watch: called with a line after each round.

        Raises ServerError where no server with edits answers, ConfigError where others change its store.
        """
        started = time.monotonic()
        until = started + 60 * minutes
        await self._traffic.begin()
        try:
            await self._ask_base(prompts)
            rounds = max(changes, ROUNDS)
            sent = number = 0
            while sent < requests and time.monotonic() < until:
                await self._quiet()
                await self._sample(measure)
                quota = min(requests - sent, math.ceil(requests / rounds))
                sent += await self._round(quota, change if number < changes else None, until)
                number += 1
                watch(
                    f"{sent}/{requests} requests, {len(self._generations)} generations, {self._differing} of "
                    f"{self._answers} answers differ, {self._failed} errors"
                )
            await self._quiet()
            await self._sample(measure)
            return self._report(time.monotonic() - started)
        finally:
            await self._traffic.close()

    async def _ask_base(self, prompts: Sequence[Prompt]) -> None:
        for number, prompt in enumerate(prompts):
            self._base[number] = await self._refer(SoakQuestion(prompt), off=True)
        self._questions = [SoakQuestion(prompt) for prompt in prompts]
        for number, reference in list(self._base.items())[:4]:
            if reference.length > 3:  # the same words with their second half as the question, and with their first
                half = reference.length // 2
                for span in (f"{half}:{reference.length}", f"0:{half}"):
                    self._spans[len(self._questions)] = number
                    self._questions.append(SoakQuestion(prompts[number], span))

    async def _refer(self, question: SoakQuestion, *, off: bool = False) -> Reference:
        try:
            return await self._traffic.refer(question, off=off)
        except NoAnswer as error:
            raise ServerError(f"{self._traffic.url} cannot be soaked: {error}") from None

    async def _quiet(self) -> None:
        """Ask every question alone, unless this generation has been asked, and compare what waits for it."""
        references = [await self._refer(self._questions[0])]
        generation = references[0].decision.generation
        if generation not in self.references:
            references += [await self._refer(question) for question in self._questions[1:]]
            if {reference.decision.generation for reference in references} != {generation}:
                raise ConfigError(
                    f"another client changes the store of {self._traffic.url}: soak it when no one else does"
                )
            for number, reference in enumerate(references):
                if reference.decision.result != "matched":
                    self._compare(number, True, ServedAnswer(reference.tokens, self._base_of(number).decision))
            self.references[generation] = references
        for number, off, answer in self._waiting:
            self._compare(number, off, answer)
        self._waiting = []

    def _base_of(self, number: int) -> Reference:
        return self._base[self._spans.get(number, number)]

    def _compare(self, number: int, off: bool, answer: ServedAnswer) -> None:
        references = self.references.get(answer.decision.generation)
        if off:
            reference = self._base_of(number)
        elif references is None:
            self._fail(f"an answer reports generation {answer.decision.generation}, which the quiet server never did")
            return
        else:
            reference = references[number]
        self._answers += 1
        self._tokens += reference.clear
        self._unclear += len(reference.tokens) - reference.clear
        self._generations.add(answer.decision.generation)
        wrong = difference(answer, reference)
        if wrong is not None:
            self._differing += 1
            question = self._questions[number]
            about = f"{question.prompt!r:.80} span {question.span or 'none'}{', opted out' if off else ''}"
            if len(self._differences) < SHOWN:
                self._differences.append(f"{about}, generation {answer.decision.generation}: {wrong}")

    def _fail(self, error: str) -> None:
        self._failed += 1
        if len(self._errors) < SHOWN:
            self._errors.append(error)

    async def _round(self, quota: int, change: Callable[[], Awaitable[None]] | None, until: float) -> int:
        """Requests of all clients, and a change once half of them are sent. Returns how many were sent."""
        sent = 0
        middle = asyncio.Event()

        async def client() -> None:
            nonlocal sent
            while sent < quota and time.monotonic() < until:
                sent += 1
                if 2 * sent >= quota:
                    middle.set()
                await self._send()

        async def changing() -> None:
            await middle.wait()
            if change is not None:
                try:
                    await change()
                except MemoirError as error:
                    self._fail(f"a change: {error}")

        changed = asyncio.create_task(changing())
        await asyncio.gather(*(client() for _ in range(self._clients)))
        middle.set()  # where the time ends a round before
        await changed
        return sent

    async def _send(self) -> None:
        dice = self._dice
        number, kind = dice.randrange(len(self._questions)), dice.choice(KINDS)
        question = self._questions[number]
        off = not question.span and dice.random() < OPTED_OUT
        self._requests[kind] += 1
        self._requests["opted out"] += off
        self._requests["with a span"] += bool(question.span)
        try:
            answers = await self._traffic.ask(question, kind, off, dice)
        except NoAnswer as error:
            self._fail(str(error))
            return
        for answer in answers:
            if off or answer.decision.generation in self.references:
                self._compare(number, off, answer)
            else:
                self._waiting.append((number, off, answer))

    async def _sample(self, measure: Callable[[], Mapping[str, float]]) -> None:
        names = (*SIZES, *HELD, PREEMPTIONS, "memoir_remembered_decisions")
        for name, value in {**await self._traffic.metrics(), **measure()}.items():
            if name.endswith(names):
                self._sizes[name].append(value)

    def _report(self, seconds: float) -> SoakReport:
        preemptions = self._sizes.pop(PREEMPTIONS, None)
        sizes = {name: _after_warm_up(values) for name, values in self._sizes.items() if len(values) >= LEAST_SAMPLES}
        checks = [
            _none("no answer differs from its reference", self._differing, self._answers, self._differences),
            _none("no request and no change fails", self._failed, self._requests_sent(), self._errors),
            *_flat(sizes),
        ]
        return SoakReport(
            server=self._traffic.url,
            seconds=round(seconds, 1),
            requests=dict(sorted(self._requests.items())),
            generations=len(self._generations),
            answers=self._answers,
            tokens=self._tokens,
            unclear=self._unclear,
            preemptions=None if preemptions is None else int(preemptions[-1] - preemptions[0]),
            differing=self._differing,
            differences=tuple(self._differences),
            failed=self._failed,
            errors=tuple(self._errors),
            sizes=sizes,
            checks=tuple(checks),
        )

    def _requests_sent(self) -> int:
        return sum(self._requests[kind] for kind in set(KINDS))


def _none(name: str, wrong: int, count: int, examples: Sequence[str]) -> Check:
    if wrong or not count:
        return Check(name, "fail", f"{wrong} of {count}" + (f", such as {examples[0]}" if examples else ""))
    return Check(name, "ok", f"0 of {count}")


def _after_warm_up(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the second quarter and of the last."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[quarter : 2 * quarter] or values[:1]), statistics.median(values[-quarter:])


def _flat(sizes: Mapping[str, tuple[float, float]]) -> list[Check]:
    checks = []
    for name, (first, last) in sorted(sizes.items()):
        if name.endswith(SIZES):
            grown = last / first - 1 if first else 0.0
            state: Any = "ok" if grown <= GROWTH else "fail"
            checks.append(Check(f"{name} is flat", state, f"{first:.0f}, then {last:.0f}: {grown:+.1%}"))
        elif name.endswith(HELD):
            checks.append(Check(f"{name} is flat", "ok" if last <= first else "fail", f"{first:.0f}, then {last:.0f}"))
    why = f"the server shows no /metrics, or fewer than {LEAST_SAMPLES} rounds were run: let it last longer"
    return checks or [Check("sizes are flat", "skip", why)]
