"""Taking up a new generation of the store in a running worker.

Two calls, so that steps wait for neither disk nor checks: `stage` reads the store's present generation in a thread
while the engine goes on, `reload` adopts it between two steps. `reload` alone reads and adopts in one go.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from memoir_retrieval.errors import MemoirError, StoreError, StoreMismatch
from memoir_retrieval.store.read import EditStore, Manifest
from memoir_vllm.worker.routing import Router

if TYPE_CHECKING:
    from memoir_retrieval.lookup.masks import Decode
    from memoir_vllm.config import MemoirConfig
    from memoir_vllm.worker.residual import Generation, ResidualLayer

__all__ = ["Reloader", "told_by_all"]

# Generations that may be held beside the present one: each is a residual memory as long as one request needs it.
OLDER = 2
# What must stay as it was when the engine started; the rest of a manifest may change from one generation to the next.
_FIXED = ("base", "module", "d", "h", "span")

_Loaded = tuple[Manifest, "Generation"]


class Reloader:
    """The store of one worker. manifest: of the generation that acts."""

    def __init__(
        self, ours: MemoirConfig, manifest: Manifest, layer: ResidualLayer, ranks: int, device: Any, decode: Decode
    ):
        self.manifest = manifest
        self._decode = decode
        self._ours, self._layer, self._ranks, self._device = ours, layer, ranks, device
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="memoir-reload")
        self._staged: Future[_Loaded | None] | None = None

    def stage(self) -> None:
        """Begin to read the store's present generation, unless it acts already."""
        self._staged = self._threads.submit(self._read)

    def staged(self) -> bool:
        """Whether `reload` would not have to wait."""
        return self._staged is None or self._staged.done()

    def reload(self) -> int:
        """Adopt what was staged, or the store's present generation. Returns the number of the one that acts.

        Raises StoreError, on every tensor-parallel rank and before anything changes, where one of them cannot.
        """
        staged, self._staged = self._staged, None
        read: _Loaded | None = None
        told: int | str
        try:
            read = self._threads.submit(self._read).result() if staged is None else staged.result()
            told = self.manifest.generation if read is None else read[0].generation
        except MemoirError as error:
            told = str(error)
        answers = told_by_all(told, self._ranks)
        refusals = [answer for answer in answers if isinstance(answer, str)]
        if refusals:
            raise StoreError(refusals[0])
        if len(set(answers)) > 1:
            raise StoreError(f"the store changed while the workers read it (generations {answers}): reload again")
        if read is not None:
            self.manifest = read[0]
            self._layer.adopt(read[1])
        return self.manifest.generation

    def _read(self) -> _Loaded | None:
        """The store's present generation, or None where it is the one that acts."""
        store = EditStore.open(self._ours.store)
        ours, theirs = self.manifest, store.manifest
        if theirs == ours:
            return None
        for field in _FIXED:
            if getattr(ours, field) != getattr(theirs, field):
                raise StoreMismatch(
                    f"generation {theirs.generation} of store {store.path} has another {field} than generation "
                    f"{ours.generation}, which is served: start the engine again"
                )
        if theirs.generation <= ours.generation:  # the prefix cache knows generations by their number
            raise StoreError(
                f"store {store.path} is at generation {theirs.generation} with other content than generation "
                f"{ours.generation}, which is served, as after a restore from a backup: start the engine again"
            )
        store.require_trained()
        if self._layer.older() >= OLDER:
            raise StoreError(
                f"{OLDER} older generations of store {store.path} still answer requests: reload when those are done"
            )
        router = Router(store, self._ours.tau, self._device, self._decode)
        return theirs, self._layer.load(router, torch.from_numpy(store.memories))


def told_by_all(value: Any, ranks: int) -> list[Any]:
    """What every tensor-parallel rank tells, in order of rank; a call of all of them."""
    if ranks == 1:
        return [value]
    from vllm.distributed import get_tp_group

    told = [value] * ranks
    torch.distributed.all_gather_object(told, value, group=get_tp_group().cpu_group)
    return told
