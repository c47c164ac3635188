"""Every function of vLLM that the plugin wraps, overrides or relies on, as it was when it was last read.

    python tests/vllm/seams.py            # what changed in the installed vLLM since seams.json was written
    python tests/vllm/seams.py --write    # after reading the changes: record the installed vLLM

vLLM's files are parsed, not imported, so both model runners are seen on any machine.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sys
from functools import cache
from pathlib import Path

RECORDED = Path(__file__).with_name("seams.json")

SEAMS = {
    "engine/arg_utils.py": ("EngineArgs.create_engine_config",),
    "v1/engine/input_processor.py": ("InputProcessor.process_inputs",),
    "plugins/__init__.py": ("load_endpoint_plugins", "load_plugins_by_group"),
    "plugins/endpoint_plugins/interface.py": ("attach_endpoint_plugins", "init_endpoint_plugins_state"),
    "entrypoints/openai/chat_completion/serving.py": (
        "OpenAIServingChat.create_chat_completion",
        "OpenAIServingChat.chat_completion_stream_generator",
    ),
    "entrypoints/openai/completion/serving.py": (
        "OpenAIServingCompletion.create_completion",
        "OpenAIServingCompletion.completion_stream_generator",
    ),
    "v1/engine/core_client.py": ("AsyncMPClient.call_utility_all_async",),
    "v1/engine/output_processor.py": ("OutputProcessor.process_outputs",),
    "v1/engine/core.py": (
        "EngineCore.collective_rpc",
        "EngineCore.step",
        "EngineCore.step_with_batch_queue",
        "EngineCoreProc._invoke_utility_method",
    ),
    "v1/core/sched/scheduler.py": (
        "Scheduler.add_request",
        "Scheduler.schedule",
        "Scheduler.update_from_output",
        "Scheduler.reset_prefix_cache",
        "Scheduler._reserve_prefill_lookahead",
        "Scheduler._preempt_request",
        "Scheduler._free_request",
    ),
    "v1/core/sched/async_scheduler.py": (
        "AsyncScheduler._update_after_schedule",
        "AsyncScheduler._update_request_with_output",
    ),
    "v1/core/kv_cache_manager.py": (
        "KVCacheManager.get_computed_blocks",
        "KVCacheManager.allocate_slots",
        "KVCacheManager.cache_blocks",
    ),
    "v1/core/kv_cache_coordinator.py": (
        "KVCacheCoordinator.cache_blocks",
        "UnitaryKVCacheCoordinator.find_longest_cache_hit",
        "HybridKVCacheCoordinator.find_longest_cache_hit",
    ),
    "v1/core/kv_cache_utils.py": ("generate_block_hash_extra_keys", "get_request_block_hasher"),
    "v1/core/block_pool.py": ("BlockPool.cache_full_blocks",),
    "v1/request.py": ("Request.update_block_hashes",),
    "v1/worker/gpu_model_runner.py": (
        "GPUModelRunner.execute_model",
        "GPUModelRunner.sample_tokens",
        "GPUModelRunner._prepare_inputs",
        "GPUModelRunner._update_states",
        "GPUModelRunner._dummy_run",
    ),
    "v1/worker/gpu/model_runner.py": (
        "GPUModelRunner.execute_model",
        "GPUModelRunner.sample_tokens",
        "GPUModelRunner.prepare_inputs",
        "GPUModelRunner._dummy_run",
    ),
    "v1/worker/gpu_worker.py": (
        "Worker.load_model",
        "Worker.compile_or_warm_up_model",
        "Worker.sleep",
        "Worker.reload_weights",
        "Worker.start_weight_update",
    ),
    "v1/worker/cpu_worker.py": ("CPUWorker.compile_or_warm_up_model",),
    "model_executor/layers/linear.py": ("RowParallelLinear.forward",),
    "utils/torch_utils.py": ("direct_register_custom_op",),
}


def installed() -> tuple[str, dict[str, str]]:
    """The version of vLLM here, and for each seam its signature and a digest of its source ("" where it is gone)."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    version: dict[str, str] = {}
    exec((folder / "_version.py").read_text(), version)
    return version["__version__"], {
        f"{file}: {name}": _describe(folder / file, name) for file, names in SEAMS.items() for name in names
    }


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _describe(path: Path, name: str) -> str:
    if not path.exists():
        return ""
    node: ast.AST = _tree(path)
    for part in name.split("."):
        found = [
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name == part
        ]
        if not found:
            return ""
        node = found[-1]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    code = ast.unparse(ast.Module([node], []))  # comments and formatting may change
    return f"({ast.unparse(node.args)}) {hashlib.sha256(code.encode()).hexdigest()[:16]}"


def main() -> None:
    version, found = installed()
    if "--write" in sys.argv[1:]:
        RECORDED.write_text(json.dumps({"vllm": version, "seams": found}, indent=1) + "\n")
        return
    recorded = json.loads(RECORDED.read_text())
    print(f"recorded {recorded['vllm']}, installed {version}")
    for seam, was in recorded["seams"].items():
        if found.get(seam) != was:
            print(f"changed: {seam}\n  was {was}\n  now {found.get(seam)}")


if __name__ == "__main__":
    main()
