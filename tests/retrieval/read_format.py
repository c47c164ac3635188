"""Reads a store with nothing but numpy, json and safetensors, by what docs/reference/format.md says."""

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
    assert manifest["format"] in (1, 2, 3, 4, 5, 6, 7)
    if manifest["format"] > 1:
        unsigned = content.replace(manifest["sha256"].encode(), b"0" * 64)
        assert hashlib.sha256(unsigned).hexdigest() == manifest["sha256"]
    data = {}
    for kind in ("memory", "codes", "edits"):
        entry = manifest[kind]
        data[kind] = (folder / entry["name"]).read_bytes()
        assert len(data[kind]) == entry["size"]
        assert hashlib.sha256(data[kind]).hexdigest() == entry["sha256"]
    memories, codes, lines = load(data["memory"])["memory"], load(data["codes"]), data["edits"]
    after, number = manifest.get("sha256"), manifest["generation"] + 1
    while manifest["format"] > 2 and (addition := folder / f"added-{number}.safetensors").exists():
        content, number = addition.read_bytes(), number + 1
        added = load(content)
        assert json.loads(added["head"].tobytes())["after"] == after
        after = hashlib.sha256(content[:-32]).hexdigest()
        assert added["sha256"].tobytes().hex() == after
        memories[added["memories"], :, added["columns"]] = added["weights"]
        codes = {name: np.concatenate([codes[name], added[name]]) for name in codes}
        lines += added["edits"].tobytes()
    edits = {edit["id"]: edit for edit in map(json.loads, lines.split(b"\n")[:-1])}
    masks = np.unpackbits(codes["codes"], axis=1, bitorder="little").astype(bool)
    assert masks.shape[1] == manifest["d"] and (masks.sum(1) == manifest["k"]).all()
    assert {*edits} == {*codes["ids"].tolist()}
    for number, edit in edits.items():
        rows = codes["ids"] == number
        assert (codes["memory_of"][rows] == edit.get("memory", 0)).all()
        edits[number] = edit, masks[rows], memories[edit.get("memory", 0)]
    return edits


if __name__ == "__main__":
    for number, (edit, masks, _) in read(Path(sys.argv[1])).items():
        print(number, edit["prompt"], "->", edit["target"], masks.sum(1).tolist())
