"""Making the masks of `build` on the machines of a Ray cluster, by Ray Data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import numpy as np

from memoir_retrieval.editing import build_masks as build
from memoir_retrieval.editing.build_masks import Compute, Shard, shard_codes
from memoir_retrieval.editing.cluster import connect, load_ray, loading
from memoir_retrieval.editing.editor import Editor
from memoir_retrieval.question.span import SpanRule

__all__ = ["on_ray"]


def on_ray(editor: Editor, address: str, workers: int, device: str) -> Compute:
    """What `build` takes as `compute`.

    editor: the open one.
    address: as `ray.init` takes it, "local" for a cluster of this machine alone.
    workers: processes on the cluster.
    device: where they hold the model.
    Every worker loads the model, under the name that this process did, and uses as many threads: the bytes are those of
    a local build wherever the machines are of one kind. Raises ConfigError where Ray is missing or does not answer.
    """
    ray = load_ray("ray.data")
    import torch

    settings: dict[str, Any] = {
        "model": loading(editor.base, device),
        "threads": torch.get_num_threads(),
        "batch": build.BATCH,
        "background": editor.store.background,
        "permutation": editor.store.permutation,
        "k": editor.manifest.k,
        "span": msgspec.json.encode(editor.manifest.span),
    }

    def compute(shards: Iterable[Shard]) -> Iterator[tuple[Shard, np.ndarray]]:
        waiting = {shard.number: shard for shard in shards}
        if not waiting:
            return
        connect(ray, address, "compute")
        items = [{"number": shard.number, "rows": msgspec.json.encode(shard.rows)} for shard in waiting.values()]
        masks = ray.data.from_items(items, override_num_blocks=len(items)).map(
            _MaskWorker,
            fn_constructor_kwargs=settings,
            concurrency=workers,
            num_cpus=settings["threads"],
            num_gpus=1 if device.startswith("cuda") else 0,
        )
        for row in masks.iter_rows():
            shard = waiting.pop(int(row["number"]))
            yield shard, np.frombuffer(row["codes"], np.uint8).reshape(len(shard.rows), -1)

    return compute


class _MaskWorker:
    """One process of the cluster, with the model in it."""

    def __init__(
        self,
        model: dict[str, Any],
        threads: int,
        batch: int,
        span: bytes,
        background: np.ndarray,
        permutation: np.ndarray,
        k: int,
    ):
        import torch

        from memoir_retrieval.model.base import load_model
        from memoir_retrieval.question.fingerprint import Fingerprint

        torch.set_num_threads(threads)
        self._base = load_model(**model)
        self._batch = batch
        self._rule = msgspec.json.decode(span, type=SpanRule)
        self._fingerprint = Fingerprint(background, permutation, k, self._base.device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        rows = msgspec.json.decode(row["rows"], type=list[list[int]])
        shard = Shard(int(row["number"]), rows, np.empty(0, dtype=np.int64))
        codes = shard_codes(self._base, self._fingerprint, self._rule, shard, self._batch)
        return {"number": row["number"], "codes": codes.tobytes()}
