"""Which KV blocks a request may take from the prefix cache, publish in it, and under which hash (vllm/v1/core).

A block is found again by the hash of its tokens and of all before it. Rows of a matched request hold its edit from the
question's first token on, so from that token's block on its blocks get the edit's name into their hashes: they are
found by requests of the same edit and by no other. Blocks before the question are shared by all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request

__all__ = ["disown", "guard", "install", "own"]


def guard(
    manager: KVCacheManager, boundary: Callable[[Request], int | None], found: Callable[[Request], int | None]
) -> None:
    """Keep requests that are not decided yet behind their boundaries; None for every other request.

    boundary: the position of such a request's question. No block behind it is published while its hash is not known.
    found: where its cache hit ends at the latest, since the rows behind must be computed to be looked up.
    """
    coordinator: Any = manager.coordinator
    publish, find, look_up = coordinator.cache_blocks, coordinator.find_longest_cache_hit, manager.get_computed_blocks

    @functools.wraps(publish)
    def cache_blocks(request: Request, num_computed_tokens: int) -> None:
        limit = boundary(request)
        publish(request, num_computed_tokens if limit is None else min(num_computed_tokens, limit))

    @functools.wraps(look_up)
    def get_computed_blocks(request: Request, *longest: int | None) -> Any:
        limit = found(request)
        if limit is None:
            return look_up(request, *longest)
        # The coordinator sees hashes only, so what it may find of this request is said to it for this one call.
        coordinator.find_longest_cache_hit = lambda hashes, most: find(hashes, min(most, limit))
        try:
            return look_up(request, *longest)
        finally:
            del coordinator.find_longest_cache_hit

    coordinator.cache_blocks, manager.get_computed_blocks = cache_blocks, get_computed_blocks


def own(request: Request, name: str, start: int, hash_block_size: int) -> None:
    """Put the blocks of a request, from the one that holds token `start` on, under the name of an edit.

    name: says store, generation and mask. That the edit acts from token `start` on becomes part of the name: the same
    tokens under the same edit have other rows where it acts from another token on.
    """
    request._memoir_blocks = (name, start)
    del request.block_hashes[start // hash_block_size :]
    request.update_block_hashes()


def disown(request: Request, hash_block_size: int) -> None:
    """Take back what `own` did, for a request of which nothing is computed yet."""
    _, start = request._memoir_blocks
    del request._memoir_blocks
    del request.block_hashes[start // hash_block_size :]
    request.update_block_hashes()


def install() -> None:
    """Wrap `generate_block_hash_extra_keys` (kv_cache_utils.py) once, wherever it was imported to."""
    from vllm.v1.core import block_pool, kv_cache_utils

    original = kv_cache_utils.generate_block_hash_extra_keys
    if hasattr(original, "_memoir"):
        return

    @functools.wraps(original)
    def generate_block_hash_extra_keys(
        request: Request, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        name, start = getattr(request, "_memoir_blocks", (None, 0))
        if name is None or end_token_idx <= start:
            return keys, mm_idx
        return (*(keys or ()), ("memoir", name, start)), mm_idx

    generate_block_hash_extra_keys._memoir = True  # type: ignore[attr-defined]
    for module in (kv_cache_utils, block_pool):
        module.generate_block_hash_extra_keys = generate_block_hash_extra_keys
