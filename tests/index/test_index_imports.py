"""What the package exports, and that it stays light."""

import subprocess
import sys

import memoir_index


def test_importing_the_index_loads_neither_torch_nor_transformers():
    code = (
        "import sys, memoir_index\n"
        "loaded = {'torch', 'transformers', 'vllm', 'memoir_retrieval', 'memoir_vllm'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_exported_name_exists_and_is_documented():
    assert memoir_index.__all__ == sorted(memoir_index.__all__)
    for name in memoir_index.__all__:
        assert getattr(memoir_index, name).__doc__
