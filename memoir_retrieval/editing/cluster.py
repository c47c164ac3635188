"""Finding Ray, and connecting to a cluster of it."""

from __future__ import annotations

import importlib
from typing import Any

from memoir_retrieval.errors import ConfigError, Reason

__all__ = ["connect", "load_ray"]


def load_ray(*parts: str) -> Any:
    """The module `ray`.

    parts: modules of it that are loaded, too, such as "ray.data".

    Raises ConfigError where it is not installed.
    """
    try:
        for part in parts:
            importlib.import_module(part)
        return importlib.import_module("ray")
    except ImportError:
        raise ConfigError("Ray is not installed: pip install 'memoir-retrieval[ray]'") from None


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
