"""Stand-in for a GPU: Triton kernels run in Triton's interpreter, so that Model Runner V2 runs on a CPU.

Python imports this at start-up in every process whose PYTHONPATH holds this folder. vLLM asks Triton for an active
driver; this one claims the CPU.
"""

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import triton.backends


class _CpuDriver:
    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, *_: Any) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        import torch

        return torch.cpu

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cpu", 0, 1)


triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=_CpuDriver)
