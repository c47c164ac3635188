#!/usr/bin/env bash
# safetensors 0.8.0 (numpy 2.4.6): every file that is saved can be read by its user alone, and a link is replaced.
#
# Seen: `save_file` leaves mode 600 under umask 022, where `open` leaves 644; so it does to a file that had mode 644
# before. Where the path is a symbolic link, the link is gone afterwards, and the file that it pointed to is unchanged.
# Expected: the mode that the umask gives, or the one that the file had; the file behind the link written.
# Cause: since 0.8 the bytes go to a temporary file, which is made with mode 600 and then renamed.
# Why it matters here: `save_pretrained` of models and adapters saves so. Weights made by one user (when an image is
# built, or by a training job) cannot be read by the user that a server runs as, though the folder and its other files
# can; vLLM says then that no adapter was found. The embedded model was made so, and gets the mode of its other files
# now. A store is written by the product itself.
# Source: https://github.com/safetensors/safetensors/issues/782 (open)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import os
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save_file

os.umask(0o022)
weights = {"weight": np.ones(2, np.float32)}


def mode(path: str) -> str:
    return oct(Path(path).stat().st_mode & 0o777)


Path("config.json").write_text("{}")
save_file(weights, "new.safetensors")
Path("old.safetensors").write_bytes(b"before")
before = mode("old.safetensors")
Path("link.safetensors").symlink_to("old.safetensors")
save_file(weights, "link.safetensors")
link, behind = Path("link.safetensors").is_symlink(), Path("old.safetensors").read_bytes()
save_file(weights, "old.safetensors")
print("safetensors", safetensors.__version__)
print("a file by open:", mode("config.json"), "a new file of weights:", mode("new.safetensors"))
print("an old file of weights:", before, "then", mode("old.safetensors"))
print("the path is still a link:", link, "the file behind it:", behind)
assert mode("config.json") == before == "0o644", "changed: open"
assert mode("new.safetensors") == mode("old.safetensors") == "0o600", "changed: the mode"
assert not link and behind == b"before", "changed: the link"
PY
