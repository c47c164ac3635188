"""Tests over the Python of another vLLM than the installed one.

    pip download --no-deps vllm==0.33.0
    pip install --no-deps --target needs orjson            # what the installed vLLM does not need
    PYTHONPATH=needs python tests/vllm/another_version.py vllm-0.33.0-*.whl [tests' names] [pytest's options]

The wheel's Python files are unpacked beside the compiled kernels of the installed vLLM, and are put in front of it. So
a version that has no build for this machine is run as far as it goes. Without names these are the tests that need no
engine; `engine_inline server -m engine` runs test_engine_inline.py and test_server.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from itertools import takewhile
from pathlib import Path

from seams import installed

HERE = Path(__file__).parent
TESTS = ("seams", "scheduling", "chunks", "isolation", "config", "requests", "residual", "attach", "admin_parts")


def unpack(wheel: Path, folder: Path) -> None:
    """Everything of the wheel but its kernels, and the installed ones."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if not name.endswith(".so")])
    for kernels in installed().glob("*.so"):
        shutil.copy(kernels, folder / "vllm" / kernels.name)


def main(wheel: str, *options: str) -> int:
    """The exit code of pytest."""
    names = [*takewhile(lambda option: not option.startswith("-"), options)]  # a marker may be named as a test is
    files = [str(HERE / f"test_{name}.py") for name in names or TESTS]
    rest = options[len(names) :]
    with tempfile.TemporaryDirectory() as folder:
        unpack(Path(wheel), Path(folder))
        paths = [folder, os.environ.get("PYTHONPATH", "")]
        environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "MEMOIR_ALLOW_UNTESTED": "1",
            "VLLM_TARGET_DEVICE": "cpu",  # the platform that the wheel was built for is another
        }
        command = [sys.executable, "-m", "pytest", "-m", "not slow and not engine", *files, *rest]
        return subprocess.run(command, env={**os.environ, **environment}).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
