"""Finding Ray, connecting to a cluster of it, and which model its workers load."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from memoir_retrieval.errors import ConfigError, Reason

if TYPE_CHECKING:
    from memoir_retrieval.model.base import BaseModel

__all__ = ["connect", "load_ray", "loading"]


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


def loading(base: BaseModel, device: str) -> dict[str, Any]:
    """What `load_model` takes on a worker to load the model of this process, from the folder of its files.

    base: the model, as it is loaded here.
    device: of the worker.
    """
    return {
        "name": str(base.path),
        "layer": base.layer,
        "place": base.place,
        "dtype": base.dtype,
        "device": device,
    }
