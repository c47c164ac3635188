"""The proof, before the first request, that the op is in the model's real forward and that its output is used.

Model code may bypass a layer's quant method (hand-fused kernels), and a graph that has captured the op never runs its
Python again. In both cases the base model would be served without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from vllm.logger import init_logger

from memoir_retrieval.errors import ConfigError
from memoir_vllm.worker.residual import ResidualLayer
from memoir_vllm.worker.rows import Batch

__all__ = ["dummy_step", "self_test"]

logger = init_logger("vllm.memoir")

# A dummy step has no attention, and vLLM leaves what attention would write as it was: memory of any content. Where that
# makes hidden states huge, a small probe is rounded away; NaN, the last resort, is so only where they are NaN already.
PROBES = (1.0, 1e4, 1e12, float("nan"))


def self_test(runner: Any, layer: ResidualLayer) -> None:
    """Run vLLM's dummy decode step without and with a probe, each as a step with edits runs: in no full graph.

    Every tensor-parallel rank runs it, in step, on its own shard. Where the hidden states of that step are NaN or
    infinite, no probe need be felt: the log then says that nothing was proven of the op's output.

    runner: of this worker.
    layer: which is probed.

    Raises ConfigError where the probe is not felt.
    """
    plain = _probed(runner, layer, lambda x, y: None)
    for size in PROBES:
        probe = _Probe(layer, size)
        probed = _probed(runner, layer, probe)
        if not _alike(plain, probed):
            break
    where = f"the model's forward ({type(runner.get_model()).__name__}, {type(runner).__name__})"
    if not probe.calls:
        raise ConfigError(
            f"memoir self-test: {where} does not run the edited layer's op, so edits would not act: serve with "
            "--enforce-eager, and report the model and the flags if that does not help"
        )
    if probe.error is not None:
        raise ConfigError(f"memoir self-test: in {where} the residual is wrong by {probe.error:.2g} of its size")
    if not _alike(plain, probed):
        return
    if plain.isfinite().all():
        raise ConfigError(
            f"memoir self-test: {where} runs the edited layer's op but does not use its output: serve with "
            "--enforce-eager, and report the model and the flags if that does not help"
        )
    logger.warning(
        "memoir self-test: the op runs in %s, but that its output is used is not proven, since the hidden states of "
        "vLLM's dummy step are NaN or infinite: ask for edits with `memoir verify --server URL --store DIR`",
        where,
    )


def _alike(plain: torch.Tensor, probed: torch.Tensor) -> bool:
    """Whether a probe was not felt; NaN is like NaN."""
    return torch.allclose(plain, probed, rtol=0, atol=0, equal_nan=True)


def _probed(runner: Any, layer: ResidualLayer, probe: Callable[[torch.Tensor, torch.Tensor], None]) -> torch.Tensor:
    layer.probe = probe
    try:
        return dummy_step(runner)
    finally:
        layer.probe = None


def dummy_step(runner: Any) -> torch.Tensor:
    """What leaves this rank for one decode token, in the shape and graph of `Worker.execute_dummy_batch`.

    runner: of this worker.
    """
    with torch.inference_mode():
        out, _ = runner._dummy_run(1, uniform_decode=True)
    tensors = getattr(out, "tensors", None)  # a stage of a pipeline that is not the last hands on several
    return out.clone() if tensors is None else torch.cat(list(tensors.values()))


class _Probe:
    """Stands in for a step's plan: every row belongs to one request with a random mask."""

    def __init__(self, layer: ResidualLayer, size: float):
        self.calls = 0
        self._size = size
        self.error: float | None = None
        self._layer = layer

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.calls += 1
        if len(self._layer.now.memories):
            self._check_residual(x, y)
        y += self._size  # whatever the memory holds, this is felt in every row

    def _check_residual(self, x: torch.Tensor, y: torch.Tensor) -> None:
        memory = self._layer.now.memories[0]
        generator = torch.Generator().manual_seed(0)
        mask = (torch.rand(x.shape[1], generator=generator) < 0.5).to(x)
        noise = torch.randn(x.shape, generator=generator).to(x)
        got = torch.zeros_like(y)
        rows = torch.arange(len(x), device=x.device)
        Batch(memory, rows, mask[None], torch.zeros_like(rows)).add(noise, got)
        want = functional.linear((noise * mask).float(), memory.weight.float())
        size = float(want.abs().max())
        wrong = float((got.float() - want).abs().max())
        if wrong > 0.05 * size:
            self.error = wrong / size
