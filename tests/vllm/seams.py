"""Every function of vLLM that the plugin wraps, overrides or relies on, as it was when it was last read.

    python tests/vllm/seams.py [VLLM]            # what changed in a vLLM against the first recorded version
    python tests/vllm/seams.py [VLLM] --write    # after reading the changes: record it in seams.json
    python tests/vllm/seams.py --table           # print docs/reference/compatibility.md

VLLM: a folder of that name from any wheel of vLLM; the installed one by default. Files are parsed, not imported, so
both model runners are seen on any machine, and versions that this machine cannot run.

`runs` in seams.json says by hand what was run on a version, `read` what a changed function means for the plugin.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).with_name("seams.json")

SEAMS = {
    "engine/arg_utils.py": ("EngineArgs.create_engine_config",),
    "v1/engine/input_processor.py": ("InputProcessor.process_inputs",),
    "transformers_utils/repo_utils.py": ("is_mistral_model_repo",),
    "plugins/__init__.py": ("load_endpoint_plugins", "load_plugins_by_group"),
    "plugins/endpoint_plugins/interface.py": ("attach_endpoint_plugins", "init_endpoint_plugins_state"),
    "entrypoints/openai/chat_completion/serving.py": (
        "OpenAIServingChat.create_chat_completion",
        "OpenAIServingChat.chat_completion_stream_generator",
    ),
    "entrypoints/openai/completion/serving.py": (
        "OpenAIServingCompletion.create_completion",
        "OpenAIServingCompletion.completion_stream_generator",
        "OpenAIServingCompletion.request_output_to_completion_response",
    ),
    "entrypoints/openai/chat_completion/batch_serving.py": (
        "OpenAIServingChatBatch.chat_completion_full_generator_batch",
    ),
    "entrypoints/anthropic/serving.py": (
        "AnthropicServingMessages.message_stream_converter",
        "AnthropicServingMessages.chat_completion_stream_generator",
    ),
    "config/parallel.py": ("ParallelConfig.local_engines_only",),
    "v1/executor/multiproc_executor.py": ("MultiprocExecutor.collective_rpc",),
    "v1/engine/core_client.py": ("AsyncMPClient.call_utility_all_async",),
    "v1/engine/output_processor.py": (
        "RequestState.make_request_output",
        "OutputProcessor.process_outputs",
        "OutputProcessor.abort_requests",
    ),
    "v1/engine/parallel_sampling.py": ("ParentRequest.get_outputs",),
    "v1/engine/core.py": (
        "EngineCore.collective_rpc",
        "EngineCore.preprocess_add_request",
        "EngineCore.sleep",
        "EngineCore.step",
        "EngineCore.step_with_batch_queue",
        "EngineCoreProc._invoke_utility_method",
    ),
    "v1/core/sched/scheduler.py": (
        "Scheduler.add_request",
        "Scheduler.schedule",
        "Scheduler.update_from_output",
        "Scheduler.reset_prefix_cache",
        "Scheduler._free_request",
        "Scheduler._holds_kv_blocks",
        "Scheduler._preempt_request",
    ),
    "v1/core/sched/async_scheduler.py": (
        "AsyncScheduler._update_after_schedule",
        "AsyncScheduler._update_request_with_output",
    ),
    "v1/core/kv_cache_manager.py": (
        "KVCacheManager.get_computed_blocks",
        "KVCacheManager.allocate_slots",
        "KVCacheManager.cache_blocks",
        "KVCacheManager.evict_blocks",
    ),
    "v1/core/kv_cache_coordinator.py": (
        "KVCacheCoordinator.cache_blocks",
        "UnitaryKVCacheCoordinator.find_longest_cache_hit",
        "HybridKVCacheCoordinator.find_longest_cache_hit",
    ),
    "v1/core/kv_cache_utils.py": (
        "generate_block_hash_extra_keys",
        "get_request_block_hasher",
        "_gen_lora_extra_hash_keys",
        "_gen_mm_extra_hash_keys",
    ),
    "lora/layers/base_linear.py": ("BaseLinearLayerWithLoRA._apply_sync",),
    "lora/ops/torch_ops/lora_ops.py": ("bgmv_expand", "bgmv_expand_slice", "sgmv_expand", "sgmv_expand_slice"),
    "v1/core/block_pool.py": ("BlockPool.cache_full_blocks",),
    "distributed/kv_transfer/kv_connector/v1/offloading/scheduler.py": (
        "OffloadingConnectorScheduler.on_new_request",
        "OffloadingConnectorScheduler.get_num_new_matched_tokens",
        "OffloadingConnectorScheduler._lookup_complete_chunks",
        "OffloadingConnectorScheduler._calc_num_offloadable_tokens",
        "OffloadingConnectorScheduler._build_store_jobs",
        "RequestOffloadState.update_offload_keys",
    ),
    "lora/utils.py": ("get_adapter_absolute_path",),
    "v1/outputs.py": ("AsyncModelRunnerOutput",),
    "forward_context.py": ("set_forward_context",),
    "v1/request.py": ("Request.update_block_hashes",),
    "v1/cudagraph_dispatcher.py": ("CudagraphDispatcher.dispatch",),
    "v1/worker/gpu/cudagraph_utils.py": (
        "BatchExecutionDescriptor",
        "_is_compatible",
        "CudaGraphManager.capture",
        "CudaGraphManager.dispatch",
    ),
    "v1/worker/gpu/dp_utils.py": ("dispatch_cg_and_sync_dp", "sync_cudagraph_and_dp_padding"),
    "v1/worker/gpu_model_runner.py": (
        "GPUModelRunner.execute_model",
        "GPUModelRunner.sample_tokens",
        "GPUModelRunner._determine_batch_execution_and_padding",
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
        "Worker.execute_model",
        "Worker.determine_available_memory",
        "Worker.initialize_from_config",
        "Worker.compile_or_warm_up_model",
        "Worker.execute_dummy_batch",
        "Worker.sleep",
        "Worker.reload_weights",
        "Worker.reset_weights",
        "Worker.discard",
        "Worker.start_weight_update",
    ),
    "v1/worker/cpu_worker.py": ("CPUWorker.compile_or_warm_up_model", "CPUWorker.determine_available_memory"),
    "model_executor/layers/linear.py": ("RowParallelLinear.forward",),
    "model_executor/models/utils.py": ("WeightsMapper.map_name", "WeightsMapper._map_name_with_shard"),
    "model_executor/layers/utils.py": ("dispatch_cpu_unquantized_gemm", "dispatch_unquantized_gemm"),
    "model_executor/layers/fusion/quant_activation.py": ("get_input_quant_key",),
    "sequence.py": ("IntermediateTensors",),
    "distributed/parallel_state.py": (
        "GroupCoordinator.isend_tensor_dict",
        "GroupCoordinator.irecv_tensor_dict",
        "GroupCoordinator._should_use_all_gather",
    ),
    "utils/torch_utils.py": ("direct_register_custom_op",),
}


def installed() -> Path:
    """The folder of the vLLM that is installed here."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def version_of(folder: Path) -> str:
    version: dict[str, str] = {}
    exec((folder / "_version.py").read_text(), version)
    return version["__version__"]


def seams_of(folder: Path) -> dict[str, str]:
    """For each seam its signature and a digest of its source, "" where it is gone."""
    return {f"{file}: {name}": _describe(folder / file, name) for file, names in SEAMS.items() for name in names}


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _describe(path: Path, name: str) -> str:
    if not path.exists():
        return ""
    node: Any = _tree(path)
    for part in name.split("."):
        seams = [
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name == part
        ]
        if not seams:
            return ""
        node = seams[-1]
    code = ast.unparse(ast.Module([node], []))  # comments and formatting may change
    signature = "" if isinstance(node, ast.ClassDef) else ast.unparse(node.args)
    return f"({signature}) {hashlib.sha256(code.encode()).hexdigest()[:16]}"


def read() -> dict[str, dict[str, Any]]:
    """For each recorded version, oldest first: `runs`, `read` (of seams that changed), `seams`."""
    return json.loads(RECORDED.read_text())


def changed(seams: dict[str, str], recorded: dict[str, dict[str, Any]]) -> list[str]:
    """Seams that are not what the first recorded version has."""
    first = next(iter(recorded.values()))["seams"]
    return [seam for seam, was in seams.items() if first.get(seam) != was]


def table() -> str:
    """docs/reference/compatibility.md."""
    recorded = read()
    lines = [
        "# Compatibility with vLLM",
        "",
        "Printed by `python tests/vllm/seams.py --table`. The plugin builds on "
        f"{sum(map(len, SEAMS.values()))} functions of vLLM; `tests/vllm/seams.json`",
        "holds a digest of each. A version that was not run is refused at start-up, unless "
        "`MEMOIR_ALLOW_UNTESTED=1` is set.",
        "",
        "| vLLM | served | functions that changed | what was run |",
        "|---|---|---|---|",
    ]
    for version, entry in recorded.items():
        served = "yes" if entry["served"] else "only with `MEMOIR_ALLOW_UNTESTED=1`"
        lines.append(f"| {version} | {served} | {len(changed(entry['seams'], recorded))} | {entry['runs']} |")
    for version, entry in recorded.items():
        if entry["read"]:
            first = next(iter(recorded))
            lines += ["", f"## {version} against {first}", "", "| function | what changed, and what it means here |"]
            lines += ["|---|---|"]
            lines += [f"| `{seam.rsplit(' ', 1)[1]}` | {note} |" for seam, note in entry["read"].items()]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    if "--table" in arguments:
        print(table(), end="")
        return
    folders = [Path(given) for given in arguments if not given.startswith("--")]
    folder = folders[0] if folders else installed()
    version, seams, recorded = version_of(folder), seams_of(folder), read()
    if "--write" in arguments:
        entry = recorded.get(version, {"served": False, "runs": "nothing", "read": {}})
        recorded[version] = {**entry, "seams": seams}
        RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
        return
    print(f"vLLM {version}; first recorded: {next(iter(recorded))}")
    for seam in changed(seams, recorded):
        print(f"changed: {seam}\n  now {seams[seam]}")


if __name__ == "__main__":
    main(sys.argv[1:])
