"""Running parts of a decoder: up to the edited layer once, and from there on as often as training needs.

Everything below the edited layer, and every token before the question, is frozen during an edit. A Hugging Face
model is cut there without knowing its architecture: blocks below the edited one are skipped, and the model's own
forward runs the rest with its own masks, rotary embeddings, final norm and head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.question.span import Span
from memoir_retrieval.question.tasks import Pooled

__all__ = [
    "Before",
    "FrozenPast",
    "candidate_means",
    "first_block",
    "frozen_past",
    "frozen_run",
    "frozen_states",
    "question_means",
    "right_pad",
    "run_from_block",
    "run_with_added",
    "span_mean",
    "span_sum",
    "squared_norms",
    "weighted_sum",
]


class _FrozenLayer(DynamicLayer):
    """Keys and values of a fixed past. Reading does not store: one past serves any number of passes."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def _hollow(like: torch.Tensor, rows: int, width: int) -> _FrozenLayer:
    """A layer as wide as others, with nothing in it, for a block that is not run. like: a tensor of another."""
    nothing = like.new_zeros(1, 1, 1, 1).expand(rows, 1, width, 1)
    return _FrozenLayer(nothing, nothing)


class FrozenPast:
    """The key-value cache of several contexts, side by side. `lengths`: int64 [B], tokens of each context."""

    def __init__(self, cache: Cache | None, lengths: torch.Tensor):
        """cache: keys and values of each block, [B, heads, T, width], padded on the left; None without any token.
        lengths: int64 [B], tokens of each context.
        """
        self.cache = cache
        self.lengths = lengths
        self.width = int(lengths.max())
        self._parts: dict[tuple[int, ...], FrozenPast] = {}

    def take(self, rows: Sequence[int]) -> FrozenPast:
        """Some of the contexts, in the order and as often as they are named. Each choice is copied once.

        rows: their places.
        """
        key = tuple(rows)
        if key not in self._parts:
            self._parts[key] = self._copy(key)
        return self._parts[key]

    def _copy(self, rows: Sequence[int]) -> FrozenPast:
        lengths = self.lengths[list(rows)]
        n = int(lengths.max())
        if self.cache is None or n == 0:
            return FrozenPast(None, lengths)
        order, skip = list(rows), self.width - n
        kept = [_FrozenLayer(x.keys[order, :, skip:], x.values[order, :, skip:]) for x in self.cache.layers]
        return FrozenPast(Cache(layers=kept), lengths)

    def repeated(self, n: int) -> FrozenPast:
        """A single context as that of several rows. Nothing is copied.

        n: how many rows.
        """
        if self.cache is None:
            return FrozenPast(None, self.lengths.expand(n))
        kept = [_FrozenLayer(x.keys.expand(n, -1, -1, -1), x.values.expand(n, -1, -1, -1)) for x in self.cache.layers]
        return FrozenPast(Cache(layers=kept), self.lengths.expand(n))

    def beside(self, other: FrozenPast) -> FrozenPast:
        """The contexts of both.

        other: whose contexts come behind these.
        """
        lengths = torch.cat([self.lengths, other.lengths])
        width = int(lengths.max())
        known = self.cache or other.cache
        if known is None:
            return FrozenPast(None, lengths)

        def states(past: FrozenPast, layer: int, name: str) -> torch.Tensor:
            like = getattr(known.layers[layer], name)
            if past.cache is None:
                return like.new_zeros(len(past.lengths), like.shape[1], width, like.shape[3])
            return functional.pad(getattr(past.cache.layers[layer], name), (0, 0, width - past.width, 0))

        layers = [
            _FrozenLayer(*(torch.cat([states(past, i, name) for past in (self, other)]) for name in ("keys", "values")))
            for i in range(len(known.layers))
        ]
        return FrozenPast(Cache(layers=layers), lengths)

    def from_block(self, first: int) -> FrozenPast:
        """The same contexts for who runs the model from a block on: of the blocks below it nothing is held.

        first: that block.
        """
        if self.cache is None:
            return self
        layers = self.cache.layers
        hollow = _hollow(layers[0].keys, len(self.lengths), self.width)
        return FrozenPast(Cache(layers=[*[hollow] * first, *layers[first:]]), self.lengths)

    @property
    def nbytes(self) -> int:
        """What keys and values take."""
        layers = self.cache.layers if self.cache else []
        return sum(states.untyped_storage().nbytes() for layer in layers for states in (layer.keys, layer.values))

    def growing(self) -> DynamicCache:
        """The same cache as one that generation may append to; this one stays as it is."""
        cache = DynamicCache()
        for i, layer in enumerate(self.cache.layers if self.cache else []):
            cache.update(layer.keys, layer.values, i)
        return cache

    def inputs(self, ids: torch.Tensor) -> dict[str, Any]:
        """Model inputs that continue every context.

        ids: int64 [B, T].
        """
        b, t = ids.shape
        steps = torch.arange(t, device=ids.device)
        inputs = {"input_ids": ids, "position_ids": self.lengths[:, None] + steps, "use_cache": False}
        if self.cache is None:
            return inputs
        seen = torch.arange(self.width, device=ids.device) >= self.width - self.lengths[:, None]
        mask = torch.cat([seen, seen.new_ones(b, t)], dim=1).long()
        return inputs | {"attention_mask": mask, "past_key_values": self.cache}


class Before(NamedTuple):
    """What stands before the tokens of a row on which the residual acts: a context, and the question up to there.

    past: holds the context.
    context: its place there.
    states: of every block from the edited one on, or the one above it (see `first_block`), keys and values of the
        question's tokens, [heads, n, width] each.
    own: whether `past` is this edit's alone, not shared with others.
    """

    past: FrozenPast
    context: int
    states: list[tuple[torch.Tensor, torch.Tensor]]
    own: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens of the question."""
        return self.states[0][0].shape[1] if self.states else 0

    @staticmethod
    def side_by_side(rows: Sequence[Before], first: int) -> FrozenPast:
        """What stands before several rows.

        rows: each with its own.
        first: the block from which on they can be run.
        """
        contexts = [int(row.past.lengths[row.context]) for row in rows]
        lengths = torch.tensor([n + row.tokens for n, row in zip(contexts, rows, strict=True)])
        lengths = lengths.to(rows[0].past.lengths.device)
        width = int(lengths.max())
        if width == 0:
            return FrozenPast(None, lengths)
        blocks = max(len(row.past.cache.layers) if row.past.cache else first + len(row.states) for row in rows)
        layers: list[_FrozenLayer] = []
        for block in range(first, blocks):
            both: list[torch.Tensor] = []
            for part, name in enumerate(("keys", "values")):
                pieces: list[tuple[torch.Tensor | None, torch.Tensor | None]] = []
                for n, row in zip(contexts, rows, strict=True):
                    context = getattr(row.past.cache.layers[block], name) if row.past.cache and n else None
                    pieces.append(
                        (
                            None if context is None else context[row.context, :, row.past.width - n :],
                            row.states[block - first][part] if row.tokens else None,
                        )
                    )
                like = next(piece for pair in pieces for piece in pair if piece is not None)
                out = like.new_zeros(len(rows), like.shape[0], width, like.shape[2])
                for row_out, n, pair in zip(out, lengths.tolist(), pieces, strict=True):
                    position = width - n
                    for piece in pair:
                        if piece is not None:
                            row_out[:, position : position + piece.shape[1]] = piece
                            position += piece.shape[1]
                both.append(out)
            layers.append(_FrozenLayer(*both))
        skipped = [_hollow(layers[0].keys, len(rows), width)] * first if layers else []
        return FrozenPast(Cache(layers=[*skipped, *layers]), lengths)


@torch.no_grad()
def frozen_past(base: BaseModel, contexts: Sequence[Sequence[int]]) -> FrozenPast:
    """Run each context once. Shorter ones are padded on the left with keys that the attention mask hides.

    base: the model.
    contexts: token ids of each.
    """
    lengths = torch.tensor([len(c) for c in contexts], device=base.device)
    width = int(lengths.max())
    if width == 0:
        return FrozenPast(None, lengths)
    rows: list[list[tuple[torch.Tensor, torch.Tensor]] | None] = []
    for context in contexts:
        if not context:
            rows.append(None)
            continue
        cache = DynamicCache()
        ids = torch.tensor([list(context)], device=base.device)
        base.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        rows.append([(layer.keys, layer.values) for layer in cache.layers])
    shape = next(row for row in rows if row is not None)

    def padded(layer: int, which: int) -> torch.Tensor:
        like = shape[layer][which]
        out = like.new_zeros(len(rows), like.shape[1], width, like.shape[3])
        for b, row in enumerate(rows):
            if row is not None:
                states = row[layer][which]
                out[b, :, width - states.shape[2] :] = states[0]
        return out

    layers = [_FrozenLayer(padded(i, 0), padded(i, 1)) for i in range(len(shape))]
    return FrozenPast(Cache(layers=layers), lengths)


def right_pad(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """ids int64 [B, T] and lengths int64 [B]. Causal attention keeps padding on the right out of real tokens.

    rows: token ids of each.
    device: of the result.
    """
    lengths = torch.tensor([len(r) for r in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(list(row))
    return ids.to(device), lengths.to(device)


class _Reached(Exception):
    """Unwinds a forward pass that has seen what it was run for."""


@torch.no_grad()
def frozen_run(base: BaseModel, inputs: dict[str, Any], above: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the model up to the edited projection, and nothing above it.

    base: the model.
    inputs: of the model, for B rows of T tokens.
    above: whether the hidden states are those that leave the edited block, not those that enter it.

    Returns hidden states [B, T, H] and activations [B, T, D], which enter the projection.
    """
    hidden: list[torch.Tensor] = []
    activations: list[torch.Tensor] = []

    def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append((args[0] if args else kwargs["hidden_states"]).detach())

    def reach(_module: Any, args: tuple[Any, ...]) -> None:
        activations.append(args[0].detach())
        if not above:
            raise _Reached

    def leave(_module: Any, _args: tuple[Any, ...], output: Any) -> None:
        hidden.append((output[0] if isinstance(output, tuple) else output).detach())
        raise _Reached

    block = base.blocks[base.layer]
    with ExitStack() as hooks:
        handle = (
            block.register_forward_hook(leave) if above else block.register_forward_pre_hook(enter, with_kwargs=True)
        )
        hooks.callback(handle.remove)
        hooks.callback(base.projection.register_forward_pre_hook(reach).remove)
        hooks.enter_context(suppress(_Reached))
        base.model(**inputs, logits_to_keep=1)
    return hidden[0], activations[0]


def first_block(base: BaseModel) -> int:
    """The block with which training begins: the edited one, or the next where that passes on what is added to it.

    base: the model.
    """
    return base.layer + base.block_adds


class _Recorded(DynamicLayer):
    """A layer of a cache that keeps what is run after a past, apart from it."""

    def __init__(self, past: _FrozenLayer | None, last: bool):
        super().__init__()
        self._past, self._last = past, last
        self.states: tuple[torch.Tensor, torch.Tensor] | None = None
        if past is not None:
            self.keys, self.values = past.keys, past.values
            self.dtype, self.device, self.is_initialized = past.dtype, past.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.states = key_states, value_states
        if self._last:
            raise _Reached
        if self._past is None:
            return key_states, value_states
        return self._past.update(key_states, value_states)


@torch.no_grad()
def frozen_states(
    base: BaseModel, past: FrozenPast, ids: torch.Tensor, hidden: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of tokens on which no residual acts, of every block from `first_block` on: [B, heads, T, width].

    base: the model.
    past: what stands before each row.
    ids: int64 [B, T].
    hidden: [B, T, H], what enters that block.
    """
    first, blocks = first_block(base), len(base.blocks)
    if first == blocks:
        return []
    known = past.cache.layers if past.cache else [None] * blocks
    layers = [_Recorded(layer, last=i == blocks - 1) for i, layer in enumerate(known)]
    inputs = past.inputs(ids) | {"past_key_values": Cache(layers=layers)}
    with _skipped(base, first, hidden), suppress(_Reached):
        base.model(**inputs, logits_to_keep=1)
    return [layer.states for layer in layers[first:] if layer.states is not None]


class _Skipped(torch.nn.Module):
    """Stands for a block below the edited one. Its output is fixed, so whatever comes in is passed on."""

    def __init__(self, block: torch.nn.Module, hidden: torch.Tensor | None, as_tuple: bool):
        super().__init__()
        self.__dict__.update(_block=block, _hidden=hidden, _as_tuple=as_tuple)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)  # some models ask a block for its attention type

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = hidden_states if self.__dict__["_hidden"] is None else self.__dict__["_hidden"]
        return (out,) if self.__dict__["_as_tuple"] else out


@contextmanager
def _skipped(base: BaseModel, first: int, hidden: torch.Tensor | None = None) -> Iterator[Callable[[Any], None]]:
    """Within the context the model begins at block `first` with `hidden`, or with what the function is given."""
    originals = [base.blocks[i] for i in range(first)]
    stand_ins = [_Skipped(block, None, base.blocks_return_tuples) for block in originals]

    def enter(states: torch.Tensor) -> None:
        if stand_ins:
            stand_ins[-1].__dict__["_hidden"] = states

    if hidden is not None:
        enter(hidden)
    try:
        for i, stand_in in enumerate(stand_ins):
            base.blocks[i] = stand_in
        yield enter
    finally:
        for i, block in enumerate(originals):
            base.blocks[i] = block


@contextmanager
def _logits_of(base: BaseModel, wanted: torch.Tensor | None) -> Iterator[None]:
    """Within the context the logits are those of n tokens alone, [1, n, V], row after row. wanted: bool [B, T]."""

    def choose(_module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0][wanted][None], *args[1:])

    with ExitStack() as hooks:
        if wanted is not None:
            hooks.callback(base.model.get_output_embeddings().register_forward_pre_hook(choose).remove)
        yield


@contextmanager
def run_from_block(
    base: BaseModel,
    hidden: torch.Tensor,
    delta: Callable[[torch.Tensor], torch.Tensor] | None = None,
    wanted: torch.Tensor | None = None,
) -> Iterator[Any]:
    """Within the context the model starts at the edited block and adds to the output of its projection.

    Yields the model; call it with the same inputs as `frozen_run`. Where the first block is edited nothing is skipped.

    base: the model.
    hidden: [B, T, H] from `frozen_run`.
    delta: from the projection's input [B, T, D] to what is added, [B, T, H]; None adds nothing.
    wanted: bool [B, T], n of them: the logits are those of these tokens alone, [1, n, V], row after row.
    """

    def add(_module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output + delta(args[0]) if delta else output

    with ExitStack() as hooks:
        hooks.enter_context(_skipped(base, base.layer, hidden))
        hooks.enter_context(_logits_of(base, wanted))
        if delta:
            hooks.callback(base.projection.register_forward_hook(add).remove)
        yield base.model


@contextmanager
def run_with_added(
    base: BaseModel, before: FrozenPast, ids: torch.Tensor, hidden: torch.Tensor, wanted: torch.Tensor
) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Within the context the yielded function gives the logits of some tokens, n of them: [n, V].

    The function takes what is added to the output of the edited projection: float [B, T, H].

    base: the model.
    before: what stands before each row, from `Before.side_by_side`.
    ids: int64 [B, T].
    hidden: [B, T, H], what enters `first_block`.
    wanted: bool [B, T], the tokens.
    """
    inputs, first = before.inputs(ids), first_block(base)
    current: list[torch.Tensor] = []

    def add(_module: Any, _args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output + current[0]

    with ExitStack() as hooks:
        enter = hooks.enter_context(_skipped(base, first, hidden))
        hooks.enter_context(_logits_of(base, wanted))
        if first == base.layer:
            hooks.callback(base.projection.register_forward_hook(add).remove)

        def run(added: torch.Tensor) -> torch.Tensor:
            current[:] = [added.to(hidden.dtype)]
            if first > base.layer:
                enter(hidden + current[0])
            logits: torch.Tensor = base.model(**inputs).logits[0]
            return logits

        yield run


def question_means(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    spans: Sequence[Span],
    batch_size: int = 16,
    before: Sequence[int] = (),
) -> torch.Tensor:
    """The mean activation of each prompt's span: float32 [N, D] on the model's device.

    Prompts of similar length share a batch.

    base: the model.
    prompts: token ids of each.
    spans: of each, not empty.
    batch_size: how many are run at once.
    before: token ids that stand before each, which are run once.
    """
    return candidate_means([base], prompts, [[span] for span in spans], batch_size, before)[0].means


@torch.no_grad()
def candidate_means(
    bases: Sequence[BaseModel],
    prompts: Sequence[Sequence[int]],
    spans: Sequence[Sequence[Span]],
    batch_size: int = 16,
    before: Sequence[int] = (),
) -> list[Pooled]:
    """The mean activation of each span of each prompt, one after another, at several layers of a model, in one pass.

    bases: the model at each layer, see `BaseModel.at`.
    prompts, batch_size, before: see `question_means`.
    spans: those of each prompt, none of them empty; C in all.
    """
    first_of = [0, *accumulate(len(parts) for parts in spans)]
    out = [
        Pooled(torch.empty(first_of[-1], base.d, device=base.device), torch.empty(first_of[-1], device=base.device))
        for base in bases
    ]
    deepest = max(bases, key=lambda base: base.layer)
    seen: dict[int, torch.Tensor] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    past = frozen_past(deepest, [before]) if before else None
    with ExitStack() as hooks:
        for number, base in enumerate(bases):

            def keep(_module: Any, args: tuple[Any, ...], number: int = number) -> None:
                seen[number] = args[0]

            hooks.callback(base.projection.register_forward_pre_hook(keep).remove)
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            ids, _ = right_pad([prompts[i] for i in batch], deepest.device)
            frozen_run(
                deepest, past.repeated(len(batch)).inputs(ids) if past else {"input_ids": ids, "use_cache": False}
            )
            for number, activations in seen.items():
                for row, i in enumerate(batch):
                    for place, span in enumerate(spans[i], first_of[i]):
                        total, weight = span_sum(activations[row], span)
                        out[number].means[place], out[number].weights[place] = total / weight, weight
    return out


def span_mean(activations: torch.Tensor, span: Span) -> torch.Tensor:
    """Mean over the tokens of a span, in float32 whatever the dtype: float32 [D].

    activations: [T, D].
    span: within them.
    """
    total, weight = span_sum(activations, span)
    return total / weight


def span_sum(activations: torch.Tensor, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator, float32 [D], and denominator, float32, of the mean over the tokens of a span.

    activations, span: see `span_mean`.
    """
    rows = activations[span.start : span.end].float()
    if not span.weighted:
        return rows.sum(0), torch.tensor(float(span.end - span.start), device=rows.device)
    return weighted_sum(rows, squared_norms(rows))


def squared_norms(rows: torch.Tensor) -> torch.Tensor:
    """What each token counts by in a weighted `Span`: float32 [n].

    rows: float32 [n, D].
    """
    return rows.square().sum(1)


def weighted_sum(rows: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator, float32 [D], and denominator, above 0, of a weighted mean. Those of its parts add up to its own.

    rows: float32 [n, D].
    weights: float32 [n].
    """
    return (rows * weights[:, None]).sum(0), weights.sum().clamp_min(torch.finfo(torch.float32).tiny)
