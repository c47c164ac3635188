"""A store of made-up edits, for benchmarks whose figures follow from its size. Not to be run by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.model.base import Identity
from memoir_retrieval.question.span import SpanRule
from memoir_retrieval.store.manifest import draft_manifest
from memoir_retrieval.store.read import Content
from memoir_retrieval.store.write import write_generation


def write_made_up(
    folder: Path,
    codes: NDArray[np.uint8],
    prompt: Callable[[int], str],
    memory: NDArray[np.float32],
    permutation: NDArray[np.int64],
    k: int,
    tau: float,
    span: SpanRule,
    judge: str = "",
) -> None:
    """Write a store with one mask an edit.

    folder: where; it exists.
    codes: uint8 [N, D/8], the masks.
    prompt: of an edit, by its number.
    memory: float32 [H, D], the one residual memory.
    permutation: int64 [D], of the fingerprint.
    k: ones of a mask.
    tau: least overlap that matches.
    span: how a question is found.
    judge: name of what judges it; "" for masks alone.
    """
    n, (h, d) = len(codes), memory.shape
    write_generation(
        folder,
        draft_manifest(
            generation=1,
            model="synthetic",
            base=Identity(config="0" * 64, layer="0" * 64, tokenizer="0" * 64),
            module="model.layers.24.mlp.down_proj",
            layer=24,
            d=d,
            h=h,
            k=k,
            tau=tau,
            span=span,
            chat=True,
            dtype="bfloat16",
            seed=0,
            contexts=(),
            training={},
            next_id=n,
            judge=judge,
        ),
        Content(
            memories=memory[None],
            background=np.zeros(d, np.float32),
            permutation=permutation,
            codes=codes,
            ids=np.arange(n),
            memory_of=np.zeros(n, np.int32),
            edits=(
                StoredEdit(
                    id=i,
                    prompt=prompt(i),
                    target=f"The answer with number {i}",
                    created="2026-01-01T00:00:00+00:00",
                    loss=0.01234,
                    steps=7,
                )
                for i in range(n)
            ),
        ),
    )
