"""Making the table of words by which questions are judged (`edits.judge`): about two minutes on one core.

    python -m memoir_retrieval.evaluation.train_judge memoir_retrieval/data/judge.safetensors --data DIR

It is made once, of the embedded model's token embeddings, for questions of any model. What it learns from: the
questions in `data/judge_questions.json`, written for this library; and in DIR, where they are, published questions
with their rephrasings (ZsRE's training part, CounterFact's, patterns and facts of ParaRel: all under the MIT licence).
From each come questions that are the same and questions that are not: about another name, asking something else about
the same one, with an opposite in it, or with something to be done about the question.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from memoir_retrieval.edits.judge import NEGATIONS, SCALE, Judge, Weights, has_digit, read
from memoir_retrieval.evaluation.messages import framed
from memoir_retrieval.evaluation.train_task_words import LearntWords, learn_words
from memoir_retrieval.model.base import load_model

__all__ = ["Pair", "pairs", "train"]

VERSION = 11
DECISIVE = 8.0  # nats, more than can speak for an edit
WIDTH = 64
BATCH = 512  # pairs
FEATURES = 256  # principal components of the embeddings
SMALL = 2e-6  # weight of what a word has of its own, beside its embedding
WORDS = 24  # of a question, in training
BIAS = 0.2  # this and the four below: chosen on the part "tune" of `memoir bench routing`
NAME = 0.35
KIND = 3.0
MANY, CREDIT = 12.0, 0.5


class Pair(NamedTuple):
    """Two questions.

    edit: the one that an edit would have.
    question: another.
    same: whether they are one question.
    """

    edit: str
    question: str
    same: bool


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _cut(question: str, subject: str) -> str | None:
    """A question with {} for its subject, or None."""
    at = question.lower().find(subject.lower())
    return None if at < 0 else question[:at] + "{}" + question[at + len(subject) :]


def _key(template: str) -> str:
    return " ".join(read(template.replace("{}", " ")).words)


class _Groups:
    """Which texts ask the same, as far as it is known: those that were ever paired."""

    def __init__(self) -> None:
        self._other: dict[str, set[str]] = defaultdict(set)

    def join(self, a: str, b: str) -> None:
        self._other[a].add(b)
        self._other[b].add(a)

    def alike(self, a: str, b: str) -> bool:
        return a == b or b in self._other[a] or not self._other[a].isdisjoint(self._other[b])


def pairs(data: Path, rng: random.Random) -> Iterator[Pair]:
    """What is learnt from; see the module.

    data: folder of the published questions; those that it lacks are left out.
    rng: what chooses among the possible pairs.
    """
    own = json.loads((files("memoir_retrieval") / "data" / "judge_questions.json").read_text())
    own_pairs = list(_own_pairs(own, rng))
    yield from own_pairs
    published = [*_zsre(data, rng), *_pararel(data, rng), *_counterfact(data, rng)]
    yield from published
    yield from _around([pair for pair in (*own_pairs, *published) if pair.same], own, rng)


def _fill(template: str, name: str) -> str:
    return template.replace("{}", name)


def _about(text: str, thing: str, language: str) -> str:
    return _fill(text.replace("{object}", thing), language)


def _own_pairs(own: dict[str, Any], rng: random.Random) -> Iterator[Pair]:
    names, questions = own["names"], own["questions"]
    of_kind = defaultdict(list)
    for question in questions:
        of_kind[question["name"]].append(question["wordings"])
    contrary = own["contraries"] + own["opposites"]
    opposites = {tuple(read(x).words): y for a, b in contrary for x, y in ((a, b), (b, a))}
    for question in questions:
        kind, wordings = question["name"], question["wordings"]
        for _ in range(40):
            a, b = rng.sample(wordings, 2)
            name, other = rng.sample(names[kind], 2)
            yield Pair(_fill(a, name), _fill(b, name), True)
            yield Pair(_fill(a, name), _fill(rng.choice((a, a, b)), other), False)
            yield Pair(_fill(a, name), _fill(b, _half(name, other)), False)
            for _ in range(2 if len(of_kind[kind]) > 1 else 0):
                c = rng.choice(rng.choice([w for w in of_kind[kind] if w is not wordings]))
                yield Pair(_fill(a, name), _fill(c, name), False)
            if rng.random() < 0.15:
                year, later = rng.sample(names["year"], 2)
                yield Pair(_with(_fill(a, name), f"in {year}"), _with(_fill(b, name), f"in {later}"), False)
                yield Pair(_with(_fill(a, name), f"in {year}"), _with(_fill(b, name), f"in {year}"), True)
            if rng.random() < 0.1:
                yield Pair(_fill(a, name), _negated(_fill(b, name)), False)
        for wording in wordings:
            words = wording.split()
            for at, word in enumerate(words):
                if (opposite := opposites.get(read(word).words)) is not None:
                    turned = _fill(" ".join([*words[:at], opposite, *words[at + 1 :]]), rng.choice(names[kind]))
                    yield from [Pair(_fill(wording, rng.choice(names[kind])), turned, False)] * 2
    for list_, same in ((contrary, False), (own["synonyms"], True)):
        for a, b in list_:
            for slot in own["slots"]:
                for x, y in ((a, b), (b, a)):
                    first, other = rng.choice(slot), rng.choice(slot)
                    if rng.random() < 0.5:
                        yield Pair(_fill(first, x), _fill(other, y), same)
                    if rng.random() < 0.25:
                        yield Pair(_fill(slot[0], x), _fill(slot[1], x), True)
    # Words of the lists in place of each other: two things of a kind are never one.
    common = [
        word for kind in ("service", "department", "product", "plan", "month", "day", "element") for word in names[kind]
    ]
    for _ in range(4000):
        a, b = rng.sample(common, 2)
        first, other = rng.choice(own["slots"][:10]), rng.choice(own["slots"][:10])
        yield Pair(_fill(rng.choice(first), a), _fill(rng.choice(first), b), False)
        yield Pair(_fill(first[0], a), _fill(first[1], a), True)


def _half(name: str, other: str) -> str:
    """A name of which one word is that of another name."""
    words = name.split()
    return " ".join([*words[:-1], other.split()[-1]]) if len(words) > 1 else other


def _with(question: str, end: str) -> str:
    return f"{question[:-1]} {end}?" if question.endswith("?") else f"{question} {end}"


def _negated(question: str) -> str:
    words = question.split()
    verbs = {"is", "are", "was", "were", "do", "does", "did", "can", "has", "have", "should", "may"}
    at = next((i for i, word in enumerate(words) if word.lower() in verbs), 0)
    return " ".join([*words[: at + 1], "not", *words[at + 1 :]])


def _zsre(data: Path, rng: random.Random) -> Iterator[Pair]:
    rows = []
    groups = _Groups()
    for line in _lines(data / "zsre" / "zsre_mend_train_10000.jsonl"):
        a, b = _cut(line["src"], line["subject"]), _cut(line["rephrase"], line["subject"])
        if a and b:
            rows.append((a, b, line["subject"]))
            groups.join(_key(a), _key(b))
    own = json.loads((files("memoir_retrieval") / "data" / "judge_questions.json").read_text())["names"]
    common = [name for kind in ("person", "country", "city", "company", "work") for name in own[kind]]
    for a, b, name in rows:
        x, y = (a, b) if rng.random() < 0.8 else (b, a)
        if rng.random() < 0.5:
            first, second = rng.sample(common, 2)
            yield Pair(_fill(x, first), _fill(y, first), True)
            yield Pair(_fill(x, first), _fill(rng.choice((x, y)), second), False)
        yield Pair(_fill(x, name), _fill(y, name), True)
        c, d, other = rng.choice(rows)
        yield Pair(
            _fill(x, name), _fill(rng.choice((x, y)), other if rng.random() < 0.6 else _half(name, other)), False
        )
        for wording in (c, d):
            if not any(groups.alike(_key(p), _key(q)) for p in (a, b) for q in (c, d)):
                yield Pair(_fill(x, name), _fill(wording, name), False)


def _pararel(data: Path, rng: random.Random) -> Iterator[Pair]:
    patterns = defaultdict(list)
    for line in _lines(data / "pararel" / "patterns.jsonl"):
        head, sign, tail = line["pattern"].partition("[Y]")
        if sign and "[X]" in head and len(tail) < 4:
            patterns[line["relation"]].append(head.replace("[X]", "{}").strip())
    names = defaultdict(list)
    for line in _lines(data / "pararel" / "tuples.jsonl"):
        names[line["relation"]].append(line["sub_label"])
    relations = [relation for relation in patterns if len(patterns[relation]) > 1]
    for relation in relations:
        for _ in range(150):
            a, b = rng.sample(patterns[relation], 2)
            name, other = rng.sample(names[relation], 2)
            yield Pair(_fill(a, name), _fill(b, name), True)
            yield Pair(_fill(a, name), _fill(rng.choice((a, b)), other), False)
            away = rng.choice([r for r in relations if r != relation])
            yield Pair(_fill(a, name), _fill(rng.choice(patterns[away]), name), False)


def _counterfact(data: Path, rng: random.Random) -> Iterator[Pair]:
    for line in _lines(data / "counterfact" / "counterfact-train.jsonl")[:6000]:
        # What stands before the last sentence has nothing to do with it.
        said = line["rephrase_prompt"]
        start = said.rfind(". ", 0, max(0, said.lower().find(line["subject"].lower())))
        yield Pair(line["prompt"], said[start + 2 :] if start >= 0 else said, True)
        yield Pair(line["prompt"], line["locality_prompt"], False)


def _around(same: Sequence[Pair], own: dict[str, Any], rng: random.Random) -> Iterator[Pair]:
    """Questions with something around them: a request to answer, or something to be done with the question."""
    languages = own["names"]["language"]
    for pair in rng.sample(same, min(len(same), 9000)):
        task = _about(rng.choice(own["tasks"] + own["about"]), rng.choice(own["objects"]), rng.choice(languages))
        frame = _about(rng.choice(own["frames"]), rng.choice(own["objects"]), "")
        question = rng.choice((pair.edit, pair.question))
        yield Pair(pair.edit, f"{task} {question}", False)
        yield Pair(pair.edit, rng.choice((f"{frame} {question}", f"{question} {frame}")), True)
        if rng.random() < 0.15:
            words = pair.edit.rstrip("?").split()
            names = [word for word in words if word[:1].isupper()][1:]
            if names:
                yield Pair(pair.edit, f"{rng.choice(own['about'])} {' '.join(names)}", False)


class _Table(nn.Module):
    """What is learnt. features: float32 [V + 1, E], the embeddings of the words, zeros for what is no word."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features
        v, e = features.shape
        self.map = nn.Linear(e, WIDTH, bias=False)
        self.more = nn.Embedding(v, WIDTH)
        nn.init.normal_(self.more.weight, std=0.02)
        self.heads = nn.Linear(e, 3)
        nn.init.zeros_(self.heads.weight)
        self.own = nn.Embedding(v, 3)
        nn.init.zeros_(self.own.weight)
        self.bias = nn.Parameter(torch.tensor(2.0))
        self.relation = nn.Parameter(torch.tensor(3.0))
        self.steep = nn.Parameter(torch.tensor(8.0))
        self.least = nn.Parameter(torch.tensor(0.5))
        self.fixed = nn.Parameter(torch.tensor([2.5, 5.5]))  # unknown, digits

    def vectors(self, words: Tensor) -> Tensor:
        return functional.normalize(self.map(self.features[words]) + self.more(words), dim=-1)

    def weights(self, words: Tensor) -> Tensor:
        return functional.softplus(self.heads(self.features[words]) + self.own(words))

    def forward(self, batch: _Batch) -> Tensor:
        words, places = torch.unique(torch.stack([batch.a, batch.b]), return_inverse=True)
        (va, vb), (wa, wb) = self.vectors(words)[places], self.weights(words)[places]
        known_a, known_b = batch.a > 0, batch.b > 0
        ra = functional.normalize((va * (wa[..., 2] * known_a)[..., None]).sum(1), dim=-1)
        rb = functional.normalize((vb * (wb[..., 2] * known_b)[..., None]).sum(1), dim=-1)
        near = va @ vb.transpose(1, 2)
        away = -2.0 * torch.ones(())
        best_a = torch.where(known_b[:, None, :], near, away).amax(2)
        best_b = torch.where(known_a[:, :, None], near, away).amax(1)
        against_a = self._against(best_a, wa[..., 0], known_a, batch.digits_a)
        against_b = self._against(best_b, wb[..., 1], known_b, batch.digits_b)
        score = self.bias + self.relation * (ra * rb).sum(-1)
        return score - (against_a * batch.only_a).sum(1) - (against_b * batch.only_b).sum(1)

    def _against(self, best: Tensor, weight: Tensor, known: Tensor, digits: Tensor) -> Tensor:
        weight = weight * (1 - torch.sigmoid(self.steep * (best - self.least)))
        fixed = functional.softplus(self.fixed)
        return torch.where(digits, fixed[1], torch.where(known, weight, fixed[0]))


class _Batch(NamedTuple):
    """Words of two questions, int64 [N, WORDS]; 0 is none of the table. only: float [N, WORDS], 1 where only one of the
    two has the word. digits: bool [N, WORDS]."""

    a: Tensor
    b: Tensor
    only_a: Tensor
    only_b: Tensor
    digits_a: Tensor
    digits_b: Tensor

    def rows(self, at: Tensor) -> _Batch:
        return _Batch(*(column[at] for column in self))


def _encode(examples: Sequence[Pair], row: dict[str, int]) -> _Batch:
    n = len(examples)
    ids = np.zeros((2, n, WORDS), np.int64)
    only = np.zeros((2, n, WORDS), np.float32)
    digits = np.zeros((2, n, WORDS), bool)
    for i, pair in enumerate(examples):
        texts = [tuple(dict.fromkeys(read(text).words))[:WORDS] for text in (pair.edit, pair.question)]
        for side, words in enumerate(texts):
            other = set(texts[1 - side])
            for at, word in enumerate(words):
                ids[side, i, at] = row.get(word, -1) + 1
                only[side, i, at] = word not in other
                digits[side, i, at] = has_digit(word) or word in NEGATIONS
    a, b = (torch.from_numpy(part) for part in ids)
    return _Batch(a, b, *map(torch.from_numpy, only), *map(torch.from_numpy, digits))


def _vocabulary(tokenizer: Any, counted: Counter[str]) -> dict[str, list[int]]:
    """Words and the tokens of each: those that the tokenizer has as one token, and those that questions often have."""
    vocabulary: dict[str, list[int]] = {}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        text = token[1:] if token[:1] in "Ġ▁" else ""
        words = read(text).words if text.isalpha() and not (len(text) > 1 and text.isupper()) else ()
        if len(words) == 1 and words[0] not in vocabulary:
            vocabulary[words[0]] = [number]
    for word, times in counted.items():
        if times >= 8 and word not in vocabulary and word.isalpha():
            vocabulary[word] = tokenizer(" " + word, add_special_tokens=False).input_ids
    return vocabulary


def _weighted(vocabulary: Iterable[Pair]) -> Tensor:
    same = torch.tensor([pair.same for pair in vocabulary])
    share = same.float().mean()
    return torch.where(same, 0.5 / share, 0.5 / (1 - share))


def train(data: Path, model: str, *, seed: int = 0, epochs: int = 4, say: Any = print) -> dict[str, np.ndarray]:
    """The tensors of a judge's file, by name.

    data: folder of the published questions.
    model: name or folder of the model whose embeddings are used.
    seed: of all chance.
    epochs: passes over the pairs.
    say: called with each line of progress.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    examples = list(dict.fromkeys(pairs(data, rng)))
    rng.shuffle(examples)
    base = load_model(model)
    counted = Counter(word for pair in examples for text in pair[:2] for word in read(text).words)
    vocabulary = _vocabulary(base.tokenizer, counted)
    words = list(vocabulary)
    row = {word: at for at, word in enumerate(words)}
    features = _features(base.model.get_input_embeddings().weight.detach().float(), vocabulary.values())
    say(f"{len(examples)} pairs, {sum(pair.same for pair in examples)} of them the same, {len(words)} words")
    held = max(1, len(examples) // 25)
    table = _Table(features)
    _descend(table, examples, row, held, epochs, say)
    around = _learn_tasks(seed, say)
    with torch.no_grad():
        all_words = torch.arange(1, len(words) + 1)
        vectors = (table.vectors(all_words) * SCALE).round().to(torch.int8).numpy()
        heads = table.weights(all_words).numpy()
    asks = heads[:, 2]
    tensors = {
        "vectors": vectors,
        "needed": heads[:, 0].astype(np.float32),
        "extra": heads[:, 1].astype(np.float32),
        "asks": np.clip(np.round(asks * (255 / np.quantile(asks, 0.999))), 0, 255).astype(np.uint8),
        "tasks": around.table,
        "contraries": _contraries(words),
    }
    numbers = _numbers(table, around)
    judge = Judge(words, **tensors, weights=numbers)
    passes: dict[bool, list[bool]] = {True: [], False: []}
    for pair in examples[:held]:
        passes[pair.same].append(judge.verdict(pair.edit, pair.question).same)
    say(f"held back, passing of the same and of the others: {np.mean(passes[True]):.3f}, {np.mean(passes[False]):.3f}")
    return {
        **tensors,
        "words": _bytes("\n".join(words).encode()),
        "weights": _bytes(msgspec.json.encode(numbers)),
    }


def _contraries(words: Sequence[str]) -> np.ndarray:
    """Rows of words that say the opposite of each other, as far as a table has both: int32 [P, 2]. words: of it."""
    row = {word: at for at, word in enumerate(words)}
    own = json.loads((files("memoir_retrieval") / "data" / "judge_questions.json").read_text())
    opposed = [tuple(word for text in pair for word in read(text).words) for pair in own["contraries"]]
    return np.array([[row[a], row[b]] for a, b in opposed if a in row and b in row], np.int32)


def with_tasks(tensors: dict[str, np.ndarray], around: LearntWords) -> dict[str, np.ndarray]:
    """The tensors of a judge that tells tasks in another way, with the contraries that are known now.

    tensors: of a judge's file, which may be of an earlier version.
    around: what was learnt of tasks.
    """
    weights = msgspec.json.decode(tensors["weights"].tobytes())
    numbers = Weights(**{**weights, "version": VERSION, "task": around.bias, "task_step": around.step})
    contraries = _contraries(tensors["words"].tobytes().decode().split("\n"))
    return {
        **tensors,
        "tasks": around.table,
        "contraries": contraries,
        "weights": _bytes(msgspec.json.encode(numbers)),
    }


def _learn_tasks(seed: int, say: Any) -> LearntWords:
    around = learn_words(list(framed(seed)))
    say(f"tasks held back, taken for tasks: {around.caught:.3f}, and of the forms: {around.lost:.3f}")
    return around


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8).copy()


def _features(embeddings: Tensor, tokens: Iterable[list[int]]) -> Tensor:
    """What is known of each word before training: float32 [W + 1, FEATURES], zeros for none.

    embeddings: [V, H]. tokens: of each word, whose embeddings are averaged.
    """
    features = torch.stack([embeddings.new_zeros(embeddings.shape[1]), *(embeddings[t].mean(0) for t in tokens)])
    features = features - features[1:].mean(0)
    features[0] = 0
    features = functional.normalize(features, dim=1)
    return 4 * (features @ torch.linalg.eigh(features.T @ features).eigenvectors[:, -FEATURES:])


def _descend(
    table: _Table, examples: Sequence[Pair], row: dict[str, int], held: int, epochs: int, say: Callable[[str], None]
) -> None:
    """Train on all pairs but the first `held`."""
    started = time.monotonic()
    encoded, labels = _encode(examples, row), torch.tensor([float(pair.same) for pair in examples])
    weights = _weighted(examples)
    optimiser = torch.optim.Adam(
        [
            {"params": [*table.map.parameters(), *table.heads.parameters()], "weight_decay": 1e-5},
            {"params": [table.more.weight, table.own.weight], "weight_decay": 0.0},
            {"params": [table.bias, table.relation, table.steep, table.least, table.fixed], "lr": 1e-2},
        ],
        lr=3e-3,
    )
    batches = (len(examples) - held) // BATCH
    most = [3e-3, 3e-3, 2e-2]
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=most, total_steps=epochs * batches + 1)
    for epoch in range(epochs):
        order = torch.randperm(len(examples) - held) + held
        total = 0.0
        for at in range(batches):
            chosen = order[BATCH * at : BATCH * (at + 1)]
            score = table(encoded.rows(chosen))
            loss = functional.binary_cross_entropy_with_logits(score, labels[chosen], weight=weights[chosen])
            own_part = table.more.weight[encoded.a[chosen]], table.own.weight[encoded.a[chosen]]
            loss = loss + SMALL * sum(part.pow(2).sum() for part in own_part)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rates.step()
            total += loss.item()
        say(f"epoch {epoch + 1}: loss {total / batches:.4f}, {time.monotonic() - started:.0f} s")


def _numbers(table: _Table, around: LearntWords) -> Weights:
    """The judge's numbers that belong to no word. around: what was learnt of tasks."""
    return Weights(
        version=VERSION,
        bias=BIAS,
        relation=table.relation.item(),
        steep=table.steep.item(),
        least=table.least.item(),
        unknown=functional.softplus(table.fixed).tolist()[0],
        # A number or a negation that only one of two questions has always tells them apart.
        digits=DECISIVE,
        task=around.bias,
        task_step=around.step,
        name=NAME,
        kind=KIND,
        many=MANY,
        credit=CREDIT,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the published questions")
    parser.add_argument("--model", default="smollm2-135m", help="whose embeddings are used")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks-only", action="store_true", help="keep the words of OUT, learn what tells tasks")
    options = parser.parse_args()
    if options.tasks_only:
        tensors = with_tasks(load_file(options.out), _learn_tasks(options.seed, print))
    else:
        tensors = train(options.data, options.model, seed=options.seed)
    save_file(tensors, options.out)
    print(f"{options.out}: {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
