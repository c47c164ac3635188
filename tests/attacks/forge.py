"""Making a damaged store look sound: sizes and digests that fit what was put into its files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

KINDS = ("memory", "codes", "edits")


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "memoir.json").read_bytes())


def sign(folder: Path, content: dict[str, Any] | bytes) -> None:
    """Write a manifest, an object or bytes in which 64 zeros stand for the digest, with the digest that fits it."""
    zeros = b"0" * 64
    if isinstance(content, dict):
        data = json.dumps({key: value for key, value in content.items() if key != "sha256"} | {"sha256": "0" * 64})
        content = data.encode()
    head, separator, tail = content.rpartition(zeros)
    digest = hashlib.sha256(content).hexdigest().encode()
    (folder / "memoir.json").write_bytes(head + digest + tail if separator else content)


def put(folder: Path, kind: str, data: bytes) -> None:
    """Replace the content of one of the three files, and what the manifest says of it."""
    entries = manifest(folder)
    (folder / entries[kind]["name"]).write_bytes(data)
    entries[kind] |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    sign(folder, entries)


def get(folder: Path, kind: str) -> bytes:
    return (folder / manifest(folder)[kind]["name"]).read_bytes()


def add(folder: Path, generation: int, changed: dict[str, Any]) -> None:
    """Change tensors of an addition, given as arrays or bytes, or keys of its head, and make its digest fit."""
    path = folder / f"added-{generation}.safetensors"
    tensors = {**load(path.read_bytes())}
    for name, value in changed.items():
        if name == "head" and isinstance(value, dict):
            value = json.dumps(json.loads(tensors["head"].tobytes()) | value).encode()
        tensors[name] = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value
    path.write_bytes(signed(save(tensors)))


def signed(addition: bytes) -> bytes:
    """An addition with the digest that fits it."""
    return addition[:-32] + hashlib.sha256(addition[:-32]).digest()
