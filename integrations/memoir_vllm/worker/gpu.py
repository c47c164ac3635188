"""The worker class for CUDA and ROCm."""

from vllm.v1.worker.gpu_worker import Worker

from memoir_vllm.worker.mixin import MemoirWorker

__all__ = ["MemoirGPUWorker"]


class MemoirGPUWorker(MemoirWorker, Worker):
    """vLLM's GPU worker, with edits."""
