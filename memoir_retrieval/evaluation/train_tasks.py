"""Learning what a message looks like, to the model, that wants something done with a question: for `question.tasks`.

`memoir calibrate DIR --tasks` learns it for a store. For the one that comes with the library:

    python -m memoir_retrieval.evaluation.train_tasks memoir_retrieval/data/tasks.safetensors --every

The messages are made of what was written for this library: whole ones with a place for a question, which want
something done with it or want its answer (`data/messages.json`), and sentences to the same ends
(`data/judge_questions.json`). They get questions of the latter file, and are pooled as a server pools them.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import nn
from torch.nn import functional

from memoir_retrieval.edits.judge import TASK
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.evaluation.messages import Framed, framed, held_back
from memoir_retrieval.model.base import BaseModel, load_model
from memoir_retrieval.model.bfloat16 import HalfProducts, half_is_faster
from memoir_retrieval.model.forward import candidate_means
from memoir_retrieval.question.candidates import Pieces, find_candidates
from memoir_retrieval.question.prompts import prompt_ids
from memoir_retrieval.question.span import SpanRule, derive_span_rule
from memoir_retrieval.question.tasks import around, pooled_spans, read_tasks, roots, with_leads

__all__ = ["LearntTasks", "fit", "learn_tasks", "scaled"]

# Chosen by messages held back, and on the part "tune" of `memoir bench routing`.
UNITS, LEFT_OUT, DECAY = 128, (0.3, 0.4), 0.3
PASSES, BATCH, RATE = 25, 256, 1e-3
# Most of the time goes into running the model over the messages, and the words of a message say the most.
MESSAGES, LONGEST = 7500, 400  # characters


def features(base: BaseModel, rule: SpanRule, messages: Sequence[Framed]) -> tuple[torch.Tensor, list[int]]:
    """What tells tasks, see `TaskProbe`, of each message: float32 [M, 2 D], and which messages these are.

    base: the model.
    rule: how the question is found in a prompt.
    messages: those in which the question is no part of its own are left out.
    """
    pieces = Pieces(base.tokenizer.decode)
    rows, spans, numbers = [], [], []
    for number, message in enumerate(messages):
        ids = prompt_ids(base.tokenizer, message.text, chat=True)
        whole, *parts = [candidate.span for candidate in find_candidates(ids, rule, pieces)]
        own = [part for part in parts if _same(base.tokenizer.decode(ids[part.start : part.end]), message.question)]
        if own:
            rows.append(ids)
            spans.append([whole, own[0]])
            numbers.append(number)
    if not rows:
        return torch.zeros(0, 2 * base.d), []
    # The template's beginning is a third of most messages; it passes once.
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))
    before = [tokens[0] for tokens in same][: min(parts[0].start for parts in spans)]
    (pooled,) = candidate_means(
        [base],
        [ids[len(before) :] for ids in rows],
        [[span.moved(-len(before)) for span in pooled_spans(parts)] for parts in spans],
        before=before,
    )
    pooled = with_leads(pooled, spans)
    rest = around(pooled, [2] * len(rows))[1::2]
    leads = torch.zeros_like(rest) if pooled.leads is None else pooled.leads
    return torch.cat([roots(rest), roots(leads)], dim=1).cpu(), numbers


def _same(text: str, question: str) -> bool:
    return "".join(filter(str.isalnum, text)) == "".join(filter(str.isalnum, question))


class LearntTasks(NamedTuple):
    """A network, and how it does on messages that it was not learnt from.

    tasks: float32 [K, 2 D + 2], see `question.tasks`.
    messages: how many it was learnt from.
    caught: share of the tasks held back that it takes for tasks by itself.
    lost: share of the forms held back that it takes for tasks by itself.
    """

    tasks: NDArray[np.float32]
    messages: int
    caught: float
    lost: float


def learn_tasks(base: BaseModel, rule: SpanRule, *, every: bool = False) -> LearntTasks:
    """What tells a task from a form by the activations of a model's edited layer.

    base: the model.
    rule: of a chat store, with `candidates`.
    every: whether to learn from every message, in three times the time, and not from `MESSAGES` short ones.

    Raises ConfigError where the model's template leaves too few messages whole.
    """
    messages = list(framed())
    if not every:
        short = [message for message in messages if len(message.text) <= LONGEST]
        messages = random.Random(0).sample(short, min(MESSAGES, len(short)))
    with HalfProducts(base).used() if half_is_faster(base) else nullcontext():
        rows, numbers = features(base, rule, messages)
    if len(numbers) < len(messages) // 2:
        raise ConfigError(
            f"the question is found in only {len(numbers)} of {len(messages)} messages, as {base.name} renders them: "
            "leave out --tasks, and tasks are known by words alone"
        )
    labels = torch.tensor([messages[number].task for number in numbers], dtype=torch.bool)
    held = torch.from_numpy(held_back([messages[number] for number in numbers]))
    scores = scored(fit(rows[~held], labels[~held]), rows[held])
    scale, shift = scaled(scores, labels[held])  # a network is surer of what it was learnt from than of the rest
    alone = (scores * scale + shift >= TASK).float()
    units = fit(rows, labels)
    units[:, -1] *= scale
    units[-1, -1] += shift
    return LearntTasks(
        tasks=units.numpy().astype(np.float16).astype(np.float32),
        messages=len(numbers),
        caught=float(alone[labels[held]].mean()),
        lost=float(alone[~labels[held]].mean()),
    )


def fit(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The units of a network, see `question.tasks`: float32 [UNITS + 1, W + 2]; the last one is always the same.

    rows: float32 [M, W].
    labels: bool [M].
    """
    mean, scale = rows.mean(0), rows.std(0) + 1e-6
    inputs, wanted = (rows - mean) / scale, labels.float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hidden, out = nn.Linear(rows.shape[1], UNITS), nn.Linear(UNITS, 1)
        network = nn.Sequential(nn.Dropout(LEFT_OUT[0]), hidden, nn.ReLU(), nn.Dropout(LEFT_OUT[1]), out)
        search = torch.optim.AdamW(network.parameters(), RATE, weight_decay=DECAY)
        steps = PASSES * -(-len(rows) // BATCH)
        rate = torch.optim.lr_scheduler.OneCycleLR(search, RATE, total_steps=steps)
        for _ in range(PASSES):
            for batch in torch.randperm(len(rows)).split(BATCH):
                loss = functional.binary_cross_entropy_with_logits(network(inputs[batch])[:, 0], wanted[batch])
                search.zero_grad()
                loss.backward()
                search.step()
                rate.step()
    with torch.no_grad():
        # What is the same in all messages says nothing; the search has left its weights as they were drawn.
        weights = torch.where(rows.std(0) < 1e-4, torch.zeros(()), hidden.weight / scale)
        bias = hidden.bias - weights @ mean
        units = torch.cat([weights, bias[:, None], out.weight.T], dim=1)
        return torch.cat([units, torch.tensor([[0.0] * rows.shape[1] + [1.0, float(out.bias)]])])


def scored(units: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """What a network says: float32 [M].

    units: float32 [K, W + 2].
    rows: float32 [M, W].
    """
    return functional.relu(rows @ units[:, :-2].T + units[:, -2]) @ units[:, -1]


def scaled(scores: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """By what scores are to be multiplied, and what to be added, for them to be nats.

    scores: float32 [M].
    labels: bool [M].
    """
    both = torch.tensor([1.0, 0.0], requires_grad=True)
    search = torch.optim.LBFGS([both], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> float:
        search.zero_grad()
        value = functional.binary_cross_entropy_with_logits(scores * both[0] + both[1], labels.float())
        value.backward()
        return value.item()

    search.step(loss)
    scale, shift = both.tolist()
    return scale, shift


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--every", action="store_true", help="learn from every message, in three times the time")
    options = parser.parse_args()
    base = load_model(options.model)
    rule = msgspec.structs.replace(derive_span_rule(base.tokenizer), candidates=True)
    known = read_tasks(options.out.read_bytes()) if options.out.is_file() else {}
    began = time.monotonic()
    learnt = learn_tasks(base, rule, every=options.every)
    known[base.identity.layer] = learnt.tasks
    options.out.write_bytes(save({layer: tasks.astype(np.float16) for layer, tasks in known.items()}))
    shares = f"{learnt.caught:.3f} of the tasks, {learnt.lost:.3f} of the forms"
    print(f"{learnt.messages} messages, {shares}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
