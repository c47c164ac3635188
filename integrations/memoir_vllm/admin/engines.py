"""All engines behind one API server. A data-parallel deployment has several, and each must agree."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from memoir_retrieval.errors import StoreError
from memoir_vllm.core.rpc import LOADS

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

__all__ = ["Engines"]

# A store that is written while it is read is read again, so often.
TRIES = 3
LOADS_S = 30.0  # so long it is tried to find a moment in which no decided request waits for offloaded blocks
READ_S = 1800.0  # a file system that gives nothing for so long fails the reload; the engines go on all the while


class Engines:
    """Calls to every worker of every engine that this server talks to."""

    def __init__(self, client: EngineClient, store: str = ""):
        """client: of the engines.
        store: name of the one that is reloaded and counted.
        """
        self._client = client
        self._store = store
        self._reloading = asyncio.Lock()

    async def counters(self) -> list[dict[str, Any]]:
        """Counters of each engine, under `stores` those of other stores than the default one.

        Its workers decide alike, so the first speaks for all.
        """
        return [workers[0] for workers in await self._call("memoir_stats")]

    async def stats(self) -> list[dict[str, Any]]:
        """Counters of each engine, with what it holds of this store."""
        engines = []
        for counters in await self.counters():
            stores = {"": {}} | counters.pop("stores", {})
            engines.append(counters | stores[self._store])
        return engines

    async def reload(self) -> int:
        """Have every worker adopt the store's present generation; returns its number.

        The store is read while the engines go on; what is between two steps is the exchange alone. Raises StoreError
        where a worker refuses or engines disagree; what each engine serves then is what its responses report.
        """
        async with self._reloading:
            generations: set[int] = set()
            for _ in range(TRIES):
                try:
                    await self._call("memoir_stage", self._store)
                    until = time.monotonic() + READ_S
                    while not all(all(workers) for workers in await self._call("memoir_staged", self._store)):
                        if time.monotonic() > until:
                            raise TimeoutError
                        await asyncio.sleep(0.02)
                    generations = {number for workers in await self._adopt() for number in workers}
                except TimeoutError:
                    raise StoreError(
                        f"the workers have not read the store within {READ_S:.0f} seconds: reload again"
                    ) from None
                except Exception as error:  # vLLM knows one class for whatever a worker raises
                    raise StoreError(await self._explain(error)) from error
                if len(generations) == 1:
                    return generations.pop()
            raise StoreError(
                f"the store keeps changing while engines read it (generations {sorted(generations)}): reload again"
            )

    async def _adopt(self) -> list[list[Any]]:
        until = time.monotonic() + LOADS_S
        while True:
            try:
                return await self._call("memoir_reload", self._store)
            except Exception as error:  # vLLM knows one class for whatever is raised there
                if LOADS not in str(error) or time.monotonic() > until:
                    raise
                await asyncio.sleep(0.02)

    async def _explain(self, error: Exception) -> str:
        lines = str(error).removeprefix("Call to collective_rpc method failed: ").splitlines()
        reason = lines[0] if lines else type(error).__name__
        try:
            serve = sorted({engine["generation"] for engine in await self.stats()})
        except Exception:  # an engine that has died answers nothing more
            return f"{reason}; the engines do not say what they serve"
        return f"{reason}; generation {serve[0]} is served" if len(serve) == 1 else f"{reason}; engines serve {serve}"

    async def _call(self, method: str, *args: str) -> list[list[Any]]:
        """By engine and worker. `EngineClient.collective_rpc` reaches all engines but tells what the first one said."""
        every = getattr(getattr(self._client, "engine_core", None), "call_utility_all_async", None)
        if every is not None:
            return await every("collective_rpc", method, None, args, None)
        return [await self._client.collective_rpc(method, args=args)]
