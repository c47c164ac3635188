"""What this API process sees of decisions: Prometheus series, and one log line for each matched request at debug level.

Workers and engine core run in other processes, whose registries /metrics never shows. Every request ends here, with its
decision (`decisions.py`).
"""

from __future__ import annotations

import secrets
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter as CounterSeries
from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from vllm.logger import init_logger

if TYPE_CHECKING:
    from prometheus_client.core import Metric

__all__ = ["LOOKUP_ID", "TRAFFIC", "EngineCollector", "Traffic"]

logger = init_logger("vllm.memoir")

# In the ids of requests that administration makes itself: they are no traffic. A client can name its requests too, so
# this is nothing that one could know.
LOOKUP_ID = f"memoir-lookup-{secrets.token_hex(16)}"
TOP = 20  # edits that are named on /metrics, and go on being named
NAMED = 200  # so many of a store at most
RECENT = 50

_REQUESTS = CounterSeries("memoir_requests", "Finished requests by result and store.", ["result", "store"])
_OVERLAP = Histogram(
    "memoir_overlap",
    "Overlap of a looked-up request with the nearest edit.",
    ["result"],
    buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0),
)


class Traffic:
    """Counts of this process for one store, and for every other one that was asked."""

    def __init__(self) -> None:
        self._others: dict[str, Traffic] = {}
        self.results: Counter[str] = Counter()
        self.hits: Counter[int] = Counter()
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)

    def of(self, store: str) -> Traffic:
        """The counts of a store.

        store: its name; "" for the one whose counts these are.
        """
        return self._others.setdefault(store, Traffic()) if store else self

    def stores(self) -> dict[str, Traffic]:
        """The counts of every store, by name."""
        return {"": self} | self._others

    def count(self, request_id: str, said: dict[str, Any]) -> None:
        """Take up a request that is finished.

        request_id: as the client sees it.
        said: its `kv_transfer_params["memoir"]`.
        """
        if LOOKUP_ID in request_id:
            return
        result, edit, overlap, store = said["result"], said["edit"], said["overlap"], said.get("store", "")
        counts = self.of(store)
        counts.results[result] += 1
        _REQUESTS.labels(result, store).inc()
        if result in ("matched", "unmatched"):
            _OVERLAP.labels(result).observe(overlap)
        if edit is None:
            return
        counts.hits[edit] += 1
        generation = said["generation"]
        counts.recent.append({"when": time.time(), "edit": edit, "overlap": overlap, "generation": generation})
        logger.debug(
            'memoir: {"request": "%s", "store": "%s", "edit": %d, "overlap": %.4f, "generation": %d}',
            request_id,
            store,
            edit,
            overlap,
            generation,
        )


TRAFFIC = Traffic()


# Counters of a worker (`ResidualLayer.stats`) and its scheduler -> series; a name that ends in _total only grows.
_ENGINE_SERIES = (
    ("edits", "memoir_edits", "Edits that are served."),
    ("generation", "memoir_generation", "Generation of the store that is served."),
    ("older_generations", "memoir_older_generations", "Older generations that still answer requests."),
    ("remembered", "memoir_remembered_decisions", "Prompts whose decision is remembered."),
    ("routed", "memoir_lookups_total", "Questions that were looked up in the index."),
    (
        "recalled",
        "memoir_remembered_hits_total",
        "Requests that needed no lookup, because their decision was remembered.",
    ),
    ("rows", "memoir_residual_rows_total", "Token rows to which a residual was added."),
    (
        "routing_s",
        "memoir_routing_seconds_total",
        "Seconds that workers spent on pooling and lookup, by the clock of the host.",
    ),
    (
        "residual_s",
        "memoir_residual_seconds_total",
        "Seconds that workers spent on adding residuals, by the clock of the host.",
    ),
)


# Those that each store has.
_OF_STORES = ("edits", "generation", "older_generations")


class EngineCollector:
    """Series of engines, as last reported, and the edits that answered most.

    A collector of its own, since the numbers are counted elsewhere. vLLM with several API servers merges files of
    plain metrics and shows no collectors.
    """

    def __init__(self, traffic: Traffic) -> None:
        """traffic: of this process."""
        self.engines: list[dict[str, Any]] = []
        self._traffic = traffic
        self._named: dict[str, set[int]] = {}

    def describe(self) -> Iterable[Metric]:
        """Nothing: so no name is taken, and nothing collected, when it is registered."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The counters of each engine, as they were polled last, and those of this process."""
        for key, name, text in _ENGINE_SERIES:
            family: Metric
            of_stores = key in _OF_STORES
            labels = ["engine", "store"] if of_stores else ["engine"]
            if name.endswith("_total"):
                family = CounterMetricFamily(name.removesuffix("_total"), text, labels=labels)
            else:
                family = GaugeMetricFamily(name, text, labels=labels)
            for number, stats in enumerate(self.engines):
                stores = {"": stats} | stats.get("stores", {}) if of_stores else {}
                for store, held in stores.items():
                    family.add_metric([str(number), store], held[key])
                if not of_stores:
                    family.add_metric([str(number)], stats[key])
            yield family
        top = CounterMetricFamily(
            "memoir_edit_hits",
            f"Requests answered by an edit; edits that were among the {TOP} of their store that answered most.",
            labels=["edit", "store"],
        )
        for store, traffic in self._traffic.stores().items():
            for edit, hits in self._hits(store, traffic.hits).items():
                top.add_metric([str(edit), store], hits)
        yield top

    def _hits(self, store: str, hits: Counter[int]) -> dict[int, int]:
        """Of the edits that are shown. A series that went and came again would look like a restart to `rate`."""
        named = self._named.get(store, set()).union(edit for edit, _ in hits.most_common(TOP))
        shown = dict(Counter({edit: hits[edit] for edit in named}).most_common(NAMED))
        self._named[store] = set(shown)
        return shown
