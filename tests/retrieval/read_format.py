"""Reads a store with nothing but numpy, json and safetensors, by what docs/format.md says."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load


def read(folder: Path) -> dict[int, tuple[dict, np.ndarray, np.ndarray]]:
    """Edit id -> (edit, mask bool [D], masked residual memory float32 [H, D])."""
    manifest = json.loads((folder / "memoir.json").read_bytes())
    assert manifest["format"] == 1
    data = {}
    for kind in ("memory", "codes", "edits"):
        entry = manifest[kind]
        data[kind] = (folder / entry["name"]).read_bytes()
        assert len(data[kind]) == entry["size"]
        assert hashlib.sha256(data[kind]).hexdigest() == entry["sha256"]
    memory, codes = load(data["memory"]), load(data["codes"])
    edits = {edit["id"]: edit for edit in map(json.loads, data["edits"].splitlines())}
    bits = np.unpackbits(codes["codes"], axis=1, bitorder="little").astype(bool)
    assert bits.shape[1] == manifest["d"] and (bits.sum(1) == manifest["k"]).all()
    return {
        int(i): (edits[int(i)], mask, memory["memory"][m] * mask)
        for i, mask, m in zip(codes["ids"], bits, codes["memory_of"], strict=True)
    }


if __name__ == "__main__":
    for number, (edit, mask, _) in read(Path(sys.argv[1])).items():
        print(number, edit["prompt"], "->", edit["target"], int(mask.sum()))
