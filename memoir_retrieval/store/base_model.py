"""The base model of a store."""

from __future__ import annotations

from pathlib import Path

from memoir_retrieval.model.base import BaseModel, load_model
from memoir_retrieval.store.manifest import Manifest

__all__ = ["load_model_of"]


def load_model_of(
    manifest: Manifest, name: str | Path | None, *, dtype: str | None = None, device: str = "cpu"
) -> BaseModel:
    """The model of a store, cut at the projection that its edits are beside.

    manifest: of the store.
    name: a folder, an embedded model's name or a Hub id; None: the one that the store names.
    dtype: see `load_model` (default: the store's own).
    device: see `load_model`, and so are the errors.
    """
    return load_model(
        name or manifest.model,
        layer=manifest.layer,
        place=manifest.place,
        dtype=dtype or manifest.dtype,
        device=device,
    )
