#!/usr/bin/env bash
# numpy 2.4.6: which of equal values are among the k largest depends on the processor's instructions.
#
# Seen: `np.argpartition` and `np.argsort` of one array choose other positions among equal values when numpy may not use
# AVX2 and AVX-512 than when it may. Nothing random is involved: each machine repeats itself.
# Expected: the same positions for the same array and the same version, as `kind="stable"` gives.
# Why it matters here: a mask is the k largest of D activations. Were ties left to numpy, a store made on one machine
# would be looked up with other masks on another.
# Source: the documentation of numpy says that the order of equal elements is undefined for these functions, not that it
# differs between processors. On a machine without AVX2 there is nothing to see and the script says so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6
cd "$folder"
cat > look.py <<'PY'
import hashlib

import numpy as np

values = np.random.default_rng(0).integers(0, 40, 1536).astype(np.float32)
for name, positions in (
    ("argpartition", np.argpartition(values, -64)[-64:]),
    ("argsort", np.argsort(values)[-64:]),
    ("argsort stable", np.argsort(values, kind="stable")[-64:]),
):
    print(name, hashlib.sha256(np.sort(positions).astype(np.int64).tobytes()).hexdigest()[:12])
PY
if ! grep -qm1 avx2 /proc/cpuinfo; then echo "no AVX2 on this machine: nothing to compare"; exit 0; fi
with=$("$folder/venv/bin/python" look.py)
without=$(NPY_DISABLE_CPU_FEATURES="X86_V3 X86_V4 AVX512_ICL AVX512_SPR" "$folder/venv/bin/python" -W ignore look.py)
"$folder/venv/bin/python" -c 'import numpy; print("numpy", numpy.__version__)'
printf 'with AVX2:\n%s\nwithout:\n%s\n' "$with" "$without"
line() { printf '%s\n' "$1" | sed -n "$2p"; }
[ "$(line "$with" 1)" != "$(line "$without" 1)" ] || { echo "changed: argpartition agrees now"; exit 1; }
[ "$(line "$with" 2)" != "$(line "$without" 2)" ] || { echo "changed: argsort agrees now"; exit 1; }
[ "$(line "$with" 3)" = "$(line "$without" 3)" ] || { echo "changed: the stable sort differs too"; exit 1; }
