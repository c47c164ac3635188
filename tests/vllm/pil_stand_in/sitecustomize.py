"""Stand-in for torchvision, which the CPU set-up leaves out: images are prepared by Pillow.

Python imports this at start-up in every process whose PYTHONPATH holds this folder. vLLM's Gemma 3 names the image
processor that needs torchvision, as a type only. It gets the one that transformers takes itself without torchvision.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "transformers.models.gemma3.image_processing_gemma3"


class _Pillow(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == NAME else None

    def exec_module(self, module: ModuleType) -> None:
        pillow: Any = import_module("transformers.models.gemma3.image_processing_pil_gemma3")
        module.__dict__["Gemma3ImageProcessor"] = pillow.Gemma3ImageProcessorPil


sys.meta_path.insert(0, _Pillow())
