"""The worker class for CPU; apart from `gpu.py` because vLLM's module configures the CPU at import."""

from vllm.v1.worker.cpu_worker import CPUWorker

from memoir_vllm.worker.mixin import MemoirWorker

__all__ = ["MemoirCPUWorker"]


class MemoirCPUWorker(MemoirWorker, CPUWorker):
    """vLLM's CPU worker, with edits."""
