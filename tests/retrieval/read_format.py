"""Reads a store with nothing but numpy, json and safetensors, by what docs/format.md says."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load


def read(folder: Path) -> dict[int, tuple[dict, np.ndarray, np.ndarray]]:
    """Edit id -> (edit, its masks bool [n, D], its residual memory float32 [H, D])."""
    content = (folder / "memoir.json").read_bytes()
    manifest = json.loads(content)
    assert manifest["format"] in (1, 2)
    if manifest["format"] == 2:
        unsigned = content.replace(manifest["sha256"].encode(), b"0" * 64)
        assert hashlib.sha256(unsigned).hexdigest() == manifest["sha256"]
    data = {}
    for kind in ("memory", "codes", "edits"):
        entry = manifest[kind]
        data[kind] = (folder / entry["name"]).read_bytes()
        assert len(data[kind]) == entry["size"]
        assert hashlib.sha256(data[kind]).hexdigest() == entry["sha256"]
    memories, codes = load(data["memory"])["memory"], load(data["codes"])
    edits = {edit["id"]: edit for edit in map(json.loads, data["edits"].split(b"\n")[:-1])}
    masks = np.unpackbits(codes["codes"], axis=1, bitorder="little").astype(bool)
    assert masks.shape[1] == manifest["d"] and (masks.sum(1) == manifest["k"]).all()
    assert {*edits} == {*codes["ids"].tolist()}
    found = {}
    for number, edit in edits.items():
        rows = codes["ids"] == number
        assert (codes["memory_of"][rows] == edit.get("memory", 0)).all()
        found[number] = edit, masks[rows], memories[edit.get("memory", 0)]
    return found


if __name__ == "__main__":
    for number, (edit, masks, _) in read(Path(sys.argv[1])).items():
        print(number, edit["prompt"], "->", edit["target"], masks.sum(1).tolist())
