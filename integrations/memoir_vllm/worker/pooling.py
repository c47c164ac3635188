"""Weighted sums of the rows of several questions: what their means, and so their fingerprints, are made of.

On a CPU each question is summed as `span_mean` does it. On a GPU, where every operation costs its launch, all are
summed together, each over its own rows from first to last.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from memoir_retrieval.model.forward import squared_norms, weighted_sum

__all__ = ["pooled"]


def pooled(
    x: torch.Tensor, ranges: Sequence[tuple[int, int]], weighted: Sequence[bool], ranks: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerators, float32 [P, D/ranks], and denominators, float32 [P] and above 0, of the means of P questions.

    x: [tokens, D/ranks]. ranges: the rows [first, last) of each, never empty. weighted: see `Span`.
    """
    return (_one_by_one if x.device.type == "cpu" else _together)(x, ranges, weighted, ranks)


def _one_by_one(
    x: torch.Tensor, ranges: Sequence[tuple[int, int]], weighted: Sequence[bool], ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [x[first:last].float() for first, last in ranges]
    weights = [torch.ones(len(rows)) for rows in parts]
    if any(weighted):
        norms = _of_all_ranks(torch.cat([squared_norms(rows) for rows in parts]), ranks)
        split = norms.split([len(rows) for rows in parts])
        weights = [own if heavy else one for own, one, heavy in zip(split, weights, weighted, strict=True)]
    sums = [weighted_sum(rows, own) for rows, own in zip(parts, weights, strict=True)]
    return torch.stack([total for total, _ in sums]), torch.stack([weight for _, weight in sums])


def _together(
    x: torch.Tensor, ranges: Sequence[tuple[int, int]], weighted: Sequence[bool], ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    first = np.array([first for first, _ in ranges])
    counts = np.array([last for _, last in ranges]) - first
    rows = int(counts.sum())
    index = np.arange(rows) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    told = np.concatenate([index, np.repeat(weighted, counts), counts])
    at, heavy, lengths = torch.from_numpy(told).to(x.device, non_blocking=True).split([rows, rows, len(counts)])
    values = x[at].float()
    weights = torch.ones(rows, device=x.device)
    if any(weighted):
        weights = torch.where(heavy.bool(), _of_all_ranks(squared_norms(values), ranks), weights)
        values *= weights[:, None]
    # Each number of a sum is added up by itself, in the order of the rows, whoever else is asked.
    total, weight = (torch.segment_reduce(part, "sum", lengths=lengths, unsafe=True) for part in (values, weights))
    return total, weight.clamp_min(torch.finfo(torch.float32).tiny)


def _of_all_ranks(norms: torch.Tensor, ranks: int) -> torch.Tensor:
    """Each rank has a share of every activation, and of its squared norm."""
    if ranks == 1:
        return norms
    from vllm.distributed import tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(norms)
