"""What our worker classes add to vLLM's (vllm/v1/worker/gpu_worker.py, cpu_worker.py).

`ParallelConfig.worker_cls` names the class that every executor starts (vllm/v1/worker/worker_base.py), so two ordinary
overrides reach both model runners on CPU and GPU: `load_model`, before memory is profiled and the graph compiled, and
`compile_or_warm_up_model`, the last call before requests come in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.worker.gpu_worker import Worker

from memoir_retrieval.errors import ConfigError, StoreError
from memoir_vllm import config, refusals
from memoir_vllm.worker import lora
from memoir_vllm.worker.attach import attach
from memoir_vllm.worker.graphs import keep_full_graphs_from
from memoir_vllm.worker.runner import follow
from memoir_vllm.worker.selftest import dummy_step, self_test

if TYPE_CHECKING:
    from memoir_vllm.worker.reload import Reloader
    from memoir_vllm.worker.residual import ResidualLayer

__all__ = ["MemoirWorker"]

# A child of vLLM's logger, so that vLLM's logging configuration applies to it.
logger = init_logger("vllm.memoir")


class MemoirWorker(Worker):
    """A vLLM worker with edits. Put in front of a subclass of vLLM's it calls that one's methods."""

    _memoir: ResidualLayer | None  # None on a stage of a pipeline that does not hold the edited layer
    _reloaders: dict[str, Reloader]  # by name of a store; none on such a stage

    def load_model(self, **kwargs: Any) -> None:
        """As vLLM's, then with the store's residual memories. Raises ConfigError without a memoir section."""
        if self.vllm_config.lora_config is not None and self.vllm_config.device_config.device_type == "cpu":
            lora.install()
        super().load_model(**kwargs)
        ours = config.section_of(self.vllm_config)
        if ours is None:
            raise ConfigError(f"{type(self).__name__} needs a memoir section in --additional-config")
        stores = config.open_stores(ours, self.vllm_config)
        model = self.model_runner.get_model()
        self._memoir, self._reloaders = attach(ours, stores, self.vllm_config, model, self.device) or (None, {})
        kind = follow(self.model_runner, self._memoir)
        if self._memoir is None:
            return
        for name, store in stores.items():
            logger.info(
                "memoir: serving %s%s, generation %d, %d edits on %s (mode %s, model runner %s)",
                f"{name} from " if name else "",
                store.path,
                store.manifest.generation,
                len(store.edits),
                store.manifest.module,
                ours.mode,
                kind,
            )

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache, less what the sums of its blocks take (`block_sums.py`)."""
        available = super().determine_available_memory()
        if self._memoir is None or not config.keeps_sums(self.vllm_config, 1):
            return available
        block = sum(spec.page_size_bytes for spec in self.model_runner.get_kv_cache_spec().values())
        return available * block // max(1, block + self._memoir.bytes_per_block)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """As vLLM's; sums of blocks are kept where the mode needs them, and full graphs replayed where they may be."""
        super().initialize_from_config(kv_cache_config)
        if self._memoir:
            keep_full_graphs_from(self.model_runner, self._memoir)
        if self._memoir and config.keeps_sums(self.vllm_config, len(kv_cache_config.kv_cache_groups)):
            spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
            self._memoir.watch_blocks(kv_cache_config.num_blocks, spec.block_size)

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM's, then a self-test of the edited layer."""
        if self._memoir is not None:
            self._memoir.warms_up = True
        times = super().compile_or_warm_up_model()
        if self._memoir is not None:
            self._memoir.warms_up = False
            self_test(self.model_runner, self._memoir)
        else:
            # vLLM 0.32, eager on a CPU, warms nothing up: a later stage has no buffers for the first request.
            dummy_step(self.model_runner)
        return times

    def execute_dummy_batch(self) -> None:
        """As vLLM's, on a data-parallel rank without requests while others have some: no edit acts."""
        if self._memoir is not None:
            self._memoir.idle()
        super().execute_dummy_batch()

    def sleep(self, level: int = 1) -> None:
        """Level 1 keeps the weights in host memory, and the residual memory stays where it is.

        level: 2 is refused.
        """
        if refusal := refusals.refusal_of(f"sleep level {level}"):
            raise RuntimeError(refusal)
        super().sleep(level)

    def discard(self, tags: tuple[str, ...]) -> None:
        """Give memory back, as `EngineCore` does with that of the KV cache.

        tags: of what; "weights" is refused.
        """
        if "weights" in tags:
            raise RuntimeError(refusals.refusal_of("discard of weights"))
        super().discard(tags)

    def reset_weights(self) -> None:
        """Refused: the masks belong to the weights that were loaded."""
        raise RuntimeError(refusals.refusal_of("reset_weights"))

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the masks belong to the weights that were loaded."""
        raise RuntimeError(refusals.refusal_of("reload_weights"))

    def start_weight_update(self, *args: Any, **kwargs: Any) -> None:
        """Refused, as `reload_weights`."""
        raise RuntimeError(refusals.refusal_of("start_weight_update"))

    def memoir_stage(self, store: str = "") -> None:
        """Begin to read the present generation of a store in the background.

        store: its name.
        """
        if store in self._reloaders:
            self._reloaders[store].stage()

    def memoir_staged(self, store: str = "") -> bool:
        """Whether the background reading is done.

        store: its name.
        """
        return store not in self._reloaders or self._reloaders[store].staged()

    def memoir_reload(self, store: str = "") -> int | str | None:
        """Adopt a store's present generation for all questions that end from now on; returns its number.

        Call it on all workers at once: `collective_rpc("memoir_reload")` runs between two steps and also makes the
        scheduler forget older decisions. Where one worker cannot, nothing changes and each returns the reason, which
        the engine core raises as StoreError (`core/rpc.py`).

        store: its name.
        """
        if self._memoir is None:
            return None
        reloader = self._reloaders.get(store)
        if reloader is None:
            return f"this server has no store {store!r}: use one of {sorted(self._reloaders)}"
        before = reloader.manifest.generation
        try:
            now = reloader.reload()
        except StoreError as error:
            return str(error)
        if now != before:
            edits = self._memoir.stores[store].router.edits
            named = f"{store}, " if store else ""
            logger.info("memoir: serving %sgeneration %d with %d edits, was %d", named, now, edits, before)
        return now

    def memoir_stats(self) -> dict[str, Any] | None:
        """Counters of this worker; `collective_rpc("memoir_stats")` reads those of all that hold the edited layer."""
        return None if self._memoir is None else self._memoir.stats()
