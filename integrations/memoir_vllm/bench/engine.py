"""An engine in a process of its own that takes turns with others on the same cores.

The ones that wait are stopped by a signal, since vLLM's threads spin while idle and would slow the one that runs.
Speeds are reported as ratios of neighbouring turns, so that a machine whose speed drifts does not matter.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

__all__ = ["BenchEngine", "EngineFlags", "Turn"]

START_TIMEOUT = 900.0
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes for the largest of an adapter


class EngineFlags(msgspec.Struct, kw_only=True, frozen=True):
    """Of one engine.

    model: its folder.
    store: served with the plugin, or None for vLLM alone.
    dtype: of the model.
    eager: whether nothing is compiled.
    batch: requests at a time.
    max_model_len: tokens of a request.
    budget: tokens of a step.
    adapter: folder of a LoRA adapter, or None for an engine that takes none.
    drafts: tokens of an n-gram draft, or None for an engine that does not speculate.
    """

    model: str
    store: str | None = None
    dtype: str = "float32"
    eager: bool = True
    batch: int = 32
    max_model_len: int = 2048
    budget: int = 2048
    adapter: str | None = None
    drafts: int | None = None


class Turn(msgspec.Struct):
    """What one turn of an engine took.

    seconds: of the whole turn.
    tokens: for each request the seconds from its submission to each of its tokens.
    matched: whether an edit answered it.
    cost: milliseconds per step that the plugin spent on lookup and residual.
    """

    seconds: float
    tokens: list[list[float]]
    matched: list[bool]
    cost: dict[str, float]


class BenchEngine:
    """One vLLM engine, stopped unless it has the turn. Use it as a context manager."""

    def __init__(self, flags: EngineFlags):
        """flags: of the engine, which is started."""
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, msgspec.to_builtins(flags)), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()
        self._signal(signal.SIGSTOP)

    def __enter__(self) -> BenchEngine:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._process.is_alive():
            self._signal(signal.SIGCONT)
            self._process.terminate()
            self._process.join(30)

    def run(
        self,
        prompts: Sequence[list[int]],
        tokens: int,
        *,
        concurrent: int | None = None,
        warm: bool = False,
        off: bool = False,
        adapted: bool = False,
    ) -> Turn:
        """One turn.

        prompts: token ids of each.
        tokens: new ones per request.
        concurrent: requests at a time, all by default.
        warm: keep the prefix cache.
        off: opted out.
        adapted: asked with the adapter.
        """
        self._signal(signal.SIGCONT)
        self._pipe.send((list(prompts), tokens, concurrent or len(prompts), warm, off, adapted))
        turn = self._receive()
        self._signal(signal.SIGSTOP)
        return msgspec.convert(turn, Turn)

    def _signal(self, number: int) -> None:
        if self._process.pid is not None:
            os.kill(self._process.pid, number)

    def _receive(self) -> Any:
        if not self._pipe.poll(START_TIMEOUT):
            raise TimeoutError(f"the engine gave no answer in {START_TIMEOUT:.0f} s")
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("the engine stopped; its log above says why") from None


def _serve(pipe: Connection, raw: dict[str, Any]) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the whole engine in this process, so that signals reach it
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform

    flags = msgspec.convert(raw, EngineFlags)
    llm = LLM(
        flags.model,
        dtype=flags.dtype,
        enforce_eager=flags.eager,
        max_num_seqs=flags.batch,
        max_model_len=flags.max_model_len,
        max_num_batched_tokens=flags.budget,
        additional_config={"memoir": {"store": flags.store}} if flags.store else {},
        seed=0,
        # Two engines take turns on one GPU.
        **({"gpu_memory_utilization": 0.4} if current_platform.is_cuda_alike() else {}),
        **_lora(flags),
        **_drafts(flags),
    )
    adapter = LoRARequest("adapter", 1, flags.adapter) if flags.adapter else None

    def stats() -> dict[str, float]:
        return llm.collective_rpc("memoir_stats")[0] if flags.store else {}

    pipe.send("ready")
    while True:
        prompts, tokens, concurrent, warm, off, adapted = pipe.recv()
        if not warm:
            llm.reset_prefix_cache()  # and what the scheduler remembers of prompts
        before, began = stats(), time.perf_counter()
        times, matched = _run(llm.llm_engine, prompts, tokens, concurrent, off, adapter if adapted else None)
        seconds, after = time.perf_counter() - began, stats()
        steps = max(1, after.get("steps", 0) - before.get("steps", 0))
        cost = {key: 1e3 * (after[key] - before[key]) / steps for key in after if key.endswith("_s")}
        pipe.send(msgspec.to_builtins(Turn(seconds, times, matched, cost)))


def _lora(flags: EngineFlags) -> dict[str, Any]:
    if flags.adapter is None:
        return {}
    rank = json.loads((Path(flags.adapter) / "adapter_config.json").read_bytes())["r"]
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": min(size for size in RANKS if size >= rank)}


def _drafts(flags: EngineFlags) -> dict[str, Any]:
    if flags.drafts is None:
        return {}
    drafts = {"method": "ngram", "num_speculative_tokens": flags.drafts, "prompt_lookup_max": flags.drafts}
    return {"speculative_config": drafts}


def _run(
    engine: Any, prompts: list[list[int]], tokens: int, concurrent: int, off: bool, adapter: Any
) -> tuple[list[list[float]], list[bool]]:
    from vllm import SamplingParams

    xargs = {"memoir": "off"} if off else None
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, extra_args=xargs)
    submitted: list[float] = []
    times: list[list[float]] = [[] for _ in prompts]
    matched = [False] * len(prompts)
    while len(submitted) < len(prompts) or engine.has_unfinished_requests():
        live = len(submitted) - sum(len(t) >= tokens for t in times)
        for n in range(len(submitted), min(len(prompts), len(submitted) + concurrent - live)):
            submitted.append(time.perf_counter())
            engine.add_request(str(n), {"prompt_token_ids": prompts[n]}, sampling, lora_request=adapter)
        for output in engine.step():
            now, n = time.perf_counter(), int(output.request_id)
            times[n] += [now - submitted[n]] * (len(output.outputs[0].token_ids) - len(times[n]))
            if output.finished:
                matched[n] = (output.kv_transfer_params or {}).get("memoir", {}).get("result") == "matched"
    return times, matched
