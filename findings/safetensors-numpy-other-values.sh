#!/usr/bin/env bash
# safetensors 0.8.0 (numpy 2.4.6): a numpy array that does not lie row by row in memory is written with its values in
# other places.
#
# Seen: a transposed matrix, one in Fortran order and every second row or column of one come back with the same shape,
# dtype and name, and other values. `save` and `save_file` do so, for one array among others, without error or warning.
# Arrays of the other byte order come back right.
# Expected: the values of the array; safetensors 0.7 wrote them. `safetensors.torch` refuses such tensors.
# Cause: since 0.8 the address of the array's memory is handed on, and read row by row. The docstring asks for arrays
# that are "contiguous and dense", which a transposed one is in the words of numpy (`F_CONTIGUOUS`).
# Why it matters here: memories, adapters and checkpoints lie in such files, and weights are transposed between the
# conventions of two libraries: a server loads the result and serves noise. A store is written by the product itself
# (`memoir_retrieval/store/tensors.py`), which copies each array row by row.
# Source: https://github.com/safetensors/safetensors/issues/825 (open)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import safetensors
from safetensors.numpy import load, load_file, save, save_file

a = np.arange(6, dtype=np.float32).reshape(2, 3)
arrays = {
    "as it is": a,
    "transposed": a.T,
    "Fortran order": np.asfortranarray(a),
    "columns 0 and 2": a[:, ::2],
    "column 0": a[:, 0],
    "big endian": a.astype(">f4"),
    "copied": np.ascontiguousarray(a.T),
}
save_file(arrays, "arrays.safetensors")
from_file, from_bytes = load_file("arrays.safetensors"), load(save(arrays))
print("safetensors", safetensors.__version__)
for name, array in arrays.items():
    loaded = from_file[name]
    print(f"{name}: saved {array.tolist()}, loaded {loaded.tolist()}")
    assert loaded.shape == array.shape and np.array_equal(loaded, from_bytes[name]), f"changed: {name}"
    assert np.array_equal(loaded, array) == (name in ("as it is", "big endian", "copied")), f"changed: {name}"
PY
