"""Which KV blocks a request may take from the prefix cache, publish in it, and under which hash (vllm/v1/core).

A block is found again by the hash of its tokens and of all before it. Rows before the token from which an edit acts are
the base model's, whatever is decided, so their blocks are shared by all. From that token's block on the blocks of a
matched request get the edit's name into their hashes: they are found by requests of the same edit and by no other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memoir_vllm.patches import wrap_once
from memoir_vllm.requests import Query

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request

__all__ = ["SummedBlocks", "disown", "guard", "install", "own"]


class SummedBlocks:
    """Which blocks the workers' sums are good for (`block_sums.py`), kept where hits are decided.

    A block is counted from its first token on, or from the first token of the question of the request that computes
    it. A block with generated tokens is not counted.
    """

    def __init__(self, blocks: int, block_size: int):
        """blocks: how many KV blocks there are.
        block_size: tokens of each.
        """
        self.block_size = block_size
        self._first = np.full(blocks, -1, np.int32)  # by block, the first token that is counted; -1 for none

    def record(self, blocks: Sequence[int], number: int, question: int, prompt: int) -> None:
        """A request computes some of its blocks.

        blocks: ids of all of them, in order.
        number: the place of the first that it computes itself.
        question: position of the question's first token.
        prompt: position behind the last token of the prompt that is counted.
        """
        numbers = np.arange(number, number + len(blocks))
        first = np.where((numbers + 1) * self.block_size > prompt, -1, 0)
        first[(numbers == question // self.block_size) & (first == 0)] = question % self.block_size
        self._first[list(blocks)] = first

    def forget(self, blocks: Sequence[int]) -> None:
        """Blocks are not computed, but loaded: they have no sums.

        blocks: their ids.
        """
        self._first[list(blocks)] = -1

    def reach(self, blocks: Sequence[int], question: int) -> int:
        """Up to which position cached blocks serve a question.

        blocks: their ids, a prompt's first ones.
        question: position of the question's first token.
        """
        number, offset = divmod(question, self.block_size)
        first = self._first[list(blocks[number:])]
        first[:1] -= offset
        return (min(number, len(blocks)) + int(np.flatnonzero([*first, -1])[0])) * self.block_size


def guard(
    manager: KVCacheManager,
    query: Callable[[Request], Query],
    undecided: Callable[[Request], bool],
    recall: Callable[[Request], None],
    summed: SummedBlocks | None,
) -> None:
    """Keep requests that are not decided yet before the token from which an edit would act.

    No block that holds it or stands behind it is published while its hash is not known, and none is taken from the
    cache. What lies in the cache of the question before it is taken as far as there are sums of it.

    manager: of the KV cache, whose methods are replaced.
    query: what is looked up of a request.
    undecided: whether a request is that.
    recall: called with a request before it looks into the cache.
    summed: the blocks with sums, or None where workers keep none.
    """
    coordinator: Any = manager.coordinator
    publish, find = coordinator.cache_blocks, coordinator.find_longest_cache_hit
    look_up, allocate = manager.get_computed_blocks, manager.allocate_slots

    @functools.wraps(publish)
    def cache_blocks(request: Request, num_computed_tokens: int) -> None:
        limit = query(request).span.acts_from if undecided(request) else num_computed_tokens
        publish(request, min(num_computed_tokens, limit))

    def within(limit: int, request: Request, *longest: int | None) -> Any:
        # The coordinator sees hashes only, so what it may find of this request is said to it for this one call.
        coordinator.find_longest_cache_hit = lambda hashes, most: find(hashes, min(most, limit))
        try:
            return look_up(request, *longest)
        finally:
            del coordinator.find_longest_cache_hit

    @functools.wraps(look_up)
    def get_computed_blocks(request: Request, *longest: int | None) -> Any:
        recall(request)
        if not undecided(request):
            return look_up(request, *longest)
        looked_up = query(request)
        if summed is None:
            return within(looked_up.span.start, request, *longest)
        hit = within(looked_up.computed_from, request, *longest)
        reach = summed.reach([block.block_id for block in hit[0].blocks[0]], looked_up.span.start)
        return hit if reach >= hit[1] else within(reach, request, *longest)

    @functools.wraps(allocate)
    def allocate_slots(request: Request, *args: Any, **kwargs: Any) -> Any:
        slots = allocate(request, *args, **kwargs)
        if summed is None or slots is None:
            return slots
        held = coordinator.get_blocks(request.request_id)[0]
        if any(slots.blocks):
            blocks = [block.block_id for block in slots.blocks[0]]
            looked_up = query(request)
            counted = looked_up.summed(request.num_prompt_tokens)
            summed.record(blocks, len(held) - len(blocks), looked_up.span.start, counted)
        if loaded := kwargs.get("num_external_computed_tokens", 0):  # into blocks that are not among the slots
            begin = request.num_computed_tokens + kwargs.get("num_new_computed_tokens", 0)
            size = summed.block_size
            summed.forget([block.block_id for block in held[begin // size : -(-(begin + loaded) // size)]])
        return slots

    coordinator.cache_blocks, manager.get_computed_blocks = cache_blocks, get_computed_blocks
    manager.allocate_slots = allocate_slots


def own(request: Request, name: str, start: int, hash_block_size: int) -> None:
    """Put the blocks of a request, from the one that holds a token on, under the name of an edit.

    That the edit acts from this token on becomes part of the name: the same tokens under the same edit have other rows
    where it acts from another token on.

    request: whose hashes are replaced.
    name: says store, generation and mask.
    start: position of the token.
    hash_block_size: tokens of a hash.
    """
    request._memoir_blocks = (name, start)
    _hash_again(request, start, hash_block_size)


def disown(request: Request, hash_block_size: int) -> None:
    """Take back what `own` did, for a request of which nothing is computed yet.

    request: whose hashes are made again.
    hash_block_size: tokens of a hash.
    """
    _, start = request._memoir_blocks
    del request._memoir_blocks
    _hash_again(request, start, hash_block_size)


def _hash_again(request: Request, start: int, hash_block_size: int) -> None:
    """Make the hashes again of the blocks from the one that holds token `start` on."""
    del request.block_hashes[start // hash_block_size :]
    request.update_block_hashes()


def install() -> None:
    """Wrap `generate_block_hash_extra_keys` (kv_cache_utils.py) once, wherever it was imported to."""
    from vllm.v1.core import block_pool, kv_cache_utils

    name = "generate_block_hash_extra_keys"
    wrap_once(kv_cache_utils, name, _with_names)
    setattr(block_pool, name, getattr(kv_cache_utils, name))


def _with_names(original: Any) -> Any:
    def generate_block_hash_extra_keys(
        request: Request, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        name, start = getattr(request, "_memoir_blocks", (None, 0))
        if name is None or end_token_idx <= start:
            return keys, mm_idx
        return (*(keys or ()), ("memoir", name, start)), mm_idx

    return generate_block_hash_extra_keys
