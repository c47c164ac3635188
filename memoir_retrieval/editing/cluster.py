"""Connecting to a Ray cluster."""

from __future__ import annotations

from typing import Any

from memoir_retrieval.errors import ConfigError, Reason

__all__ = ["connect"]


def connect(ray: Any, address: str, work: str) -> None:
    """Connect this process to a cluster, unless it is connected.

    ray: the module.
    address: as `ray.init` takes it, "local" for a cluster of this machine alone.
    work: what this process could do without one, such as "train", for the error.
    Raises ConfigError where the cluster does not answer.
    """
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address} ({error})",
            cure=f"start one, or {work} in this process",
            reason=Reason.NO_CLUSTER,
        ) from None
