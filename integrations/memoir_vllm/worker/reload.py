"""Taking up a new generation of the store in a running worker.

Two calls, so that steps wait for neither disk nor checks: `stage` reads the store's present generation in a thread
while the engine goes on, `reload` adopts it between two steps. `reload` alone reads and adopts in one go.

The thread reads the store and copies weights. What changes from step to step, the table of requests, is read by the
worker's own thread alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from memoir_retrieval.errors import MemoirError, StoreError, StoreMismatch
from memoir_retrieval.store.manifest import Manifest
from memoir_retrieval.store.read import EditStore
from memoir_vllm.worker.routing import Router

if TYPE_CHECKING:
    from memoir_retrieval.lookup.masks import Decode
    from memoir_vllm.config import MemoirConfig
    from memoir_vllm.worker.residual import Generation, ResidualLayer

__all__ = ["Reloader", "require_same", "values_of_ranks"]

# A child of vLLM's logger, so that vLLM's logging configuration applies to it.
logger = init_logger("vllm.memoir")

# Generations that may be held beside the present one: each is a residual memory as long as one request needs it.
OLDER = 2
# What must stay as it was when the engine started; the rest of a manifest may change from one generation to the next.
_FIXED = ("base", "module", "d", "h", "span", "chat")

_Loaded = tuple[Manifest, "Generation"]


class Reloader:
    """The store of one worker. manifest: of the generation that acts."""

    def __init__(
        self,
        ours: MemoirConfig,
        manifest: Manifest,
        layer: ResidualLayer,
        ranks: int,
        device: Any,
        decode: Decode,
        name: str = "",
    ):
        """ours: the section of the configuration.
        manifest: of the generation that acts.
        layer: on which generations act.
        ranks: of tensor parallelism.
        device: of the layer.
        decode: reads text back from token ids.
        name: of the store on this server.
        """
        self.manifest = manifest
        self._name, self._folder = name, ours.folders[name]
        self._decode = decode
        self._ours, self._layer, self._ranks, self._device = ours, layer, ranks, device
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="memoir-reload")
        self._staged: Future[_Loaded | None] | None = None

    def stage(self) -> None:
        """Begin to read the store's present generation, unless it acts already. Raises nothing: `reload` does."""
        self._staged = self._begin()

    def staged(self) -> bool:
        """Whether `reload` would not have to wait."""
        return self._staged is None or self._staged.done()

    def reload(self) -> int:
        """Adopt what was staged, or the store's present generation. Returns the number of the one that acts.

        Raises StoreError, on every tensor-parallel rank and before anything changes, where one of them cannot, for
        whatever reason: a rank that raised alone would leave the others waiting for its answer.
        """
        staged, self._staged = self._staged or self._begin(), None
        failure = staged.exception()
        loaded = None if failure else staged.result()
        refusals = [reason for reason in values_of_ranks(failure and _reason(failure), self._ranks) if reason]
        if refusals:
            raise StoreError(refusals[0])
        require_same([loaded[0] if loaded else self.manifest], self._ranks, "reload again")
        if loaded is not None:
            self.manifest = loaded[0]
            self._layer.adopt(loaded[1], self._name)
        return self.manifest.generation

    def _begin(self) -> Future[_Loaded | None]:
        try:
            return self._threads.submit(self._read, self._layer.older(self._name))
        except RuntimeError as error:  # the system starts no further thread
            failed: Future[_Loaded | None] = Future()
            failed.set_exception(error)
            return failed

    def _read(self, older: int) -> _Loaded | None:
        """The store's present generation, or None where it is the one that acts.

        older: how many generations before that one still answer requests.
        """
        store = EditStore.open(self._folder)
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
        if older >= OLDER:
            raise StoreError(
                f"{OLDER} older generations of store {store.path} still answer requests: reload when those are done"
            )
        router = Router(store, self._ours.tau, self._device, self._decode, self._name)
        now = self._layer.stores[self._name]
        return theirs, self._layer.load(router, torch.from_numpy(store.memories), now)


def _reason(failure: BaseException) -> str:
    """One line; the log has the rest of what is no refusal of ours."""
    text = " ".join(str(failure).split())
    if isinstance(failure, MemoirError):
        return text
    logger.error("memoir: a new generation of the store cannot be taken up", exc_info=failure)
    return f"{type(failure).__name__}: {text:.300}"


def require_same(manifests: Sequence[Manifest], ranks: int, cure: str) -> None:
    """Raise StoreError, on every tensor-parallel rank, where they have not read the same: each holds a share of it.

    manifests: of the generations that this rank has read.
    ranks: how many there are.
    cure: what else may help.
    """
    for read in zip(*values_of_ranks([(m.generation, m.sha256[:12]) for m in manifests], ranks), strict=True):
        if len(set(read)) > 1:
            every = ", ".join(f"{generation} ({digest})" for generation, digest in read)
            raise StoreError(
                f"the workers have read generations {every} of one store: give all hosts the same copy of it, or, "
                f"where it was written meanwhile, {cure}"
            )


def values_of_ranks(value: Any, ranks: int) -> list[Any]:
    """The value of every tensor-parallel rank, in order of rank; all of them must call this.

    value: this rank's own.
    ranks: how many there are.
    """
    if ranks == 1:
        return [value]
    from vllm.distributed import get_tp_group

    values = [value] * ranks
    torch.distributed.all_gather_object(values, value, group=get_tp_group().cpu_group)
    return values
