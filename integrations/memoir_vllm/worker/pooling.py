"""Weighted sums of the rows of several questions: what their means, and so their fingerprints, are made of.

On a CPU each question is summed as `span_mean` does it. On a GPU, where every operation costs its launch, all are
summed together, each over its own rows from first to last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from memoir_retrieval.model.forward import squared_norms, weighted_sum

__all__ = ["SLICE", "pooled", "token_weights"]

SLICE = 1024
"""Rows that are brought to float32 at once."""


def token_weights(x: torch.Tensor, weighted: bool, ranks: int = 1) -> torch.Tensor:
    """What each row counts by, see `Span`: float32 [tokens].

    Each rank has a share of every activation, and of its squared norm; all ranks must call this.

    x: [tokens, D/ranks].
    weighted: whether rows count by their squared norm.
    ranks: of tensor parallelism.
    """
    if not weighted:
        return torch.ones(len(x), device=x.device)
    norms = torch.cat([squared_norms(rows.float()) for rows in x.split(SLICE)])
    if ranks == 1:
        return norms
    from vllm.distributed import tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(norms)


def pooled(
    x: torch.Tensor, weights: torch.Tensor, ranges: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerators, float32 [P, D/ranks], and denominators, float32 [P] and above 0, of the means of P questions.

    x: [tokens, D/ranks].
    weights: float32 [tokens].
    ranges: the rows [first, last) of each, never empty.
    """
    return (_one_by_one if x.device.type == "cpu" else _together)(x, weights, ranges)


def _one_by_one(
    x: torch.Tensor, weights: torch.Tensor, ranges: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    sums = [weighted_sum(x[first:last].float(), weights[first:last]) for first, last in ranges]
    return torch.stack([total for total, _ in sums]), torch.stack([weight for _, weight in sums])


def _together(
    x: torch.Tensor, weights: torch.Tensor, ranges: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each number of a sum is added up by itself, in the order of the rows, whoever else is asked: a long range in
    pieces that begin at its first row. So many pieces are brought to float32 at once as have `SLICE` rows."""
    pieces = [(at, min(at + SLICE, last)) for first, last in ranges for at in range(first, last, SLICE)]
    total, weight = (
        torch.cat(parts) for parts in zip(*(_segments(x, weights, g) for g in _groups(pieces)), strict=True)
    )
    if len(pieces) > len(ranges):
        counts = torch.tensor([-(-(last - first) // SLICE) for first, last in ranges]).to(x.device, non_blocking=True)
        total, weight = (torch.segment_reduce(part, "sum", lengths=counts, unsafe=True) for part in (total, weight))
    return total, weight.clamp_min(torch.finfo(torch.float32).tiny)


def _groups(pieces: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Pieces in runs of at most `SLICE` rows."""
    group: list[tuple[int, int]] = []
    rows = 0
    for first, last in pieces:
        if rows + last - first > SLICE:
            yield group
            group, rows = [], 0
        group.append((first, last))
        rows += last - first
    yield group


def _segments(
    x: torch.Tensor, weights: torch.Tensor, ranges: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    first = np.array([first for first, _ in ranges])
    counts = np.array([last for _, last in ranges]) - first
    rows = int(counts.sum())
    index = np.arange(rows) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    both = torch.from_numpy(np.concatenate([index, counts])).to(x.device, non_blocking=True)
    rows_of_parts, lengths = both.split([rows, len(counts)])
    weight = weights[rows_of_parts]
    parts = (x[rows_of_parts].float().mul_(weight[:, None]), weight)
    total, weight = (torch.segment_reduce(part, "sum", lengths=lengths, unsafe=True) for part in parts)
    return total, weight
