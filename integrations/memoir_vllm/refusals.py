"""What of vLLM's is refused, since edits would be wrong or missing under it: versions, flags, calls."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.logger import init_logger

from memoir_retrieval.errors import ConfigError
from memoir_retrieval.store.manifest import Manifest
from memoir_vllm.config import WORKERS, MemoirConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["check_version", "refusal_of", "refuse", "warn_of_dtype"]

logger = init_logger("vllm.memoir")

TESTED = ((0, 32), (0, 33))  # what was run: docs/reference/compatibility.md
# The ways to make drafts that were run with edits (tests/vllm/test_engine_speculative.py).
DRAFTS = ("ngram", "draft_model")
# The ways to verify them that give the model's own tokens, or its own distribution of them.
EXACT = ("standard", "block")
# Why vLLM's KV connectors are refused, as read in their source (vllm/distributed/kv_transfer/kv_connector).
_BY_TOKENS = "keys blocks by their tokens alone, so a block that an edit has changed would reach other requests"
_BY_HASH = "takes the hashes of a prompt's blocks before it is known which edit they belong to"
_BY_REQUEST = "hands on blocks of a prompt without its decision, as disaggregated prefill does"
CONNECTORS = {
    "ExampleConnector": _BY_TOKENS,
    "FlexKVConnectorV1": _BY_TOKENS,
    "HF3FSKVConnector": _BY_TOKENS,
    "LMCacheConnectorV1": _BY_TOKENS,
    "LMCacheMPConnector": _BY_TOKENS,
    "MooncakeStoreConnector": _BY_HASH,
    "SimpleCPUOffloadConnector": _BY_HASH,
    "MooncakeConnector": _BY_REQUEST,
    "MoRIIOConnector": _BY_REQUEST,
    "NixlConnector": _BY_REQUEST,
    "NixlPullConnector": _BY_REQUEST,
    "NixlPushConnector": _BY_REQUEST,
}
_HOST_MEMORY = "CPUOffloadingSpec"
# What reads the model's safetensors files, of which a store knows the edited layer.
LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")


def check_version() -> None:
    """Raises ConfigError for a vLLM that this plugin was never run on: its internals move with every release."""
    from vllm.version import __version__, __version_tuple__

    if tuple(__version_tuple__[:2]) in TESTED or os.environ.get("MEMOIR_ALLOW_UNTESTED") == "1":
        return
    tested = ", ".join(f"{major}.{minor}.x" for major, minor in TESTED)
    raise ConfigError(
        f"memoir was tested with vLLM {tested}, this is {__version__}: "
        "install a tested version, or set MEMOIR_ALLOW_UNTESTED=1 to try"
    )


def refusal_of(call: str) -> str | None:
    """Why a call of an engine or a worker is not made; None for one that is.

    call: such as "sleep level 2".
    """
    again = "start the engine again with the store of the model"
    advice = {
        "sleep level 2": "use level 1",
        "discard of weights": "use sleep level 1",
        "reload_weights": again,
        "reset_weights": again,
        "start_weight_update": again,
    }.get(call)
    if advice is None:
        return None
    return f"memoir refuses {call}: edits only hold on the weights that they were made on; {advice}"


def refuse(config: MemoirConfig, vllm_config: VllmConfig) -> None:
    """Raises one ConfigError that names every setting under which the edits would be wrong or missing.

    config: the section.
    vllm_config: of the engine.
    """
    faults = [text for wrong, text in _checks(config, vllm_config) if wrong]
    if faults:
        raise ConfigError("memoir cannot serve edits with these settings: " + "; ".join(faults))


def _checks(config: MemoirConfig, vllm_config: VllmConfig) -> list[tuple[bool, str]]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    scheduler, cache, graphs = vllm_config.scheduler_config, vllm_config.cache_config, vllm_config.compilation_config
    drafts = vllm_config.speculative_config
    piecewise = graphs.cudagraph_mode is not None and graphs.cudagraph_mode.has_piecewise_cudagraphs()
    single = config.mode == "single"
    offloads = _offloads(vllm_config)
    # vLLM writes a commit's number there; `initial` is what was typed.
    revision, tokenizer_revision = (
        getattr(given, "initial", given) for given in (model.revision, model.tokenizer_revision)
    )
    dtype, cached = _name(model.dtype), _cached_as(vllm_config)
    quantised, load_format = _quantised(vllm_config) is not None, vllm_config.load_config.load_format
    # vLLM 0.33 has no other executor for Ray, and no such variable.
    ray_v2 = getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", True)
    return [
        (
            single and bool(cache.enable_prefix_caching),
            "prefix caching in mode single (use --no-enable-prefix-caching)",
        ),
        (
            single and bool(scheduler.enable_chunked_prefill),
            "chunked prefill in mode single (use --no-enable-chunked-prefill)",
        ),
        (
            single and scheduler.long_prefill_token_threshold > 0,
            "split long prompts in mode single (leave out --long-prefill-token-threshold)",
        ),
        (
            model.is_hybrid and bool(cache.enable_prefix_caching),
            "prefix caching of a model with recurrent layers (use --no-enable-prefix-caching)",
        ),
        (parallel.decode_context_parallel_size > 1, "context parallelism (use --decode-context-parallel-size 1)"),
        (parallel.prefill_context_parallel_size > 1, "context parallelism (use --prefill-context-parallel-size 1)"),
        (parallel.use_ubatching, "micro-batches (leave out --enable-dbo and --ubatch-size)"),
        (vllm_config.kv_transfer_config is not None and not offloads, _transfer_fault(vllm_config)),
        (offloads and single, "KV offloading in mode single (leave out --kv-offloading-size and --kv-transfer-config)"),
        (
            offloads and bool(vllm_config.kv_transfer_config.kv_connector_extra_config.get("sync_load_budget_bytes")),
            "blocks that come back within a step (leave sync_load_budget_bytes out of --kv-transfer-config)",
        ),
        (
            vllm_config.lora_config is not None and envs.VLLM_LORA_ENABLE_DUAL_STREAM,
            "LoRA adapters on a second stream (leave VLLM_LORA_ENABLE_DUAL_STREAM unset)",
        ),
        (
            drafts is not None and drafts.method not in DRAFTS,
            f"speculative decoding by {drafts and drafts.method} (use the method {' or '.join(DRAFTS)})",
        ),
        (
            drafts is not None and drafts.enable_adaptive_verification,
            "adaptive verification of drafts, by which the device alone knows whose rows are whose (leave "
            "enable_adaptive_verification out of --speculative-config)",
        ),
        (
            drafts is not None and drafts.rejection_sample_method not in EXACT,
            "drafts that are taken where the model would say something else (leave rejection_sample_method "
            f"{drafts and drafts.rejection_sample_method} out of --speculative-config)",
        ),
        (
            vllm_config.aux_output_config.enabled,
            "experts of each token in responses, kept by hashes from before the decision (leave out "
            "--enable-return-routed-experts and --aux-output-config)",
        ),
        (cache.kv_sharing_fast_prefill, "skipped prompt rows (leave out --kv-sharing-fast-prefill)"),
        (model.runner_type != "generate", f"a {model.runner_type} model (use --runner generate)"),
        (model.is_encoder_decoder, "an encoder-decoder model (serve a decoder-only model)"),
        (model.enable_prompt_embeds, "prompt embeddings (leave out --enable-prompt-embeds)"),
        (
            str(model.tokenizer) != str(model.model) and not model.skip_tokenizer_init,
            f"another tokenizer, {model.tokenizer} (leave out --tokenizer)",
        ),
        (model.tokenizer_mode == "mistral", "Mistral's own tokenizer (leave out --tokenizer-mode)"),
        (
            model.config_format not in ("auto", "hf"),
            f"a model configuration in another format (leave out --config-format {model.config_format})",
        ),
        (
            tokenizer_revision != revision and not Path(str(model.tokenizer)).is_dir(),
            f"tokenizer revision {tokenizer_revision} of a Hub model (leave out --tokenizer-revision)",
        ),
        (
            revision is not None and not Path(model.model).is_dir(),
            f"revision {revision} of a Hub model (download that revision and serve its folder)",
        ),
        (
            load_format not in LOAD_FORMATS,
            f"weights that are not read from the model's safetensors files (leave out --load-format {load_format})",
        ),
        (
            model.model_weights not in ("", model.model),
            f"the weights of {model.model_weights} (leave out model_weights, and serve a folder)",
        ),
        (
            model.code_revision is not None,
            f"code of revision {getattr(model.code_revision, 'initial', model.code_revision)} (leave out "
            "--code-revision)",
        ),
        (bool(model.model_class_overrides), "another class of the model (leave out --model-class-overrides)"),
        (
            model.quantization is not None and not quantised,
            f"weights that are quantised while they are loaded, as {model.quantization} (leave out --quantization, or "
            "make edits on a quantised checkpoint)",
        ),
        (
            model.quantization_config is not None and (quantised or model.quantization is None),
            "quantisation that the checkpoint does not name (leave out --quantization-config)",
        ),
        (
            quantised and envs.VLLM_MARLIN_INPUT_DTYPE is not None,
            "activations that are quantised for a kernel (leave VLLM_MARLIN_INPUT_DTYPE unset)",
        ),
        (
            bool(model.hf_overrides),
            "another model configuration (leave out --hf-overrides: change config.json and make edits on that model)",
        ),
        (
            model.hf_config_path not in (None, model.model),
            f"the model configuration of {model.hf_config_path} (leave out --hf-config-path)",
        ),
        (
            cached not in ("auto", dtype),
            f"a KV cache in {cached}, behind which no edit was made ("
            + ("leave out --kv-cache-dtype)" if dtype == "float32" else f"use --kv-cache-dtype {dtype})"),
        ),
        (
            bool(envs.VLLM_ENABLE_STARTUP_PLAN),
            "a KV cache of the size that an earlier start measured, perhaps beside fewer edits (leave "
            "VLLM_ENABLE_STARTUP_PLAN unset)",
        ),
        (
            parallel.distributed_executor_backend == "ray" and not ray_v2,
            "Ray's compiled graphs, in which a reload and a step have no order (leave VLLM_USE_RAY_V2_EXECUTOR_BACKEND "
            "unset)",
        ),
        (scheduler.scheduler_cls is not None, f"scheduler {scheduler.scheduler_cls} (leave out --scheduler-cls)"),
        (
            parallel.worker_cls not in WORKERS,
            f"worker {parallel.worker_cls} (leave out --worker-cls, serve on CPU or CUDA)",
        ),
        (
            piecewise and not graphs.splitting_ops,
            "piecewise CUDA graphs that are not split (leave splitting_ops out of --compilation-config, and set "
            "VLLM_USE_BREAKABLE_CUDAGRAPH=0)",
        ),
    ]


def _cached_as(vllm_config: VllmConfig) -> str:
    """The dtype of the KV cache; "auto" is the model's. A checkpoint may name another, which vLLM takes up with it."""
    dtype = str(vllm_config.cache_config.cache_dtype)
    quantised = _quantised(vllm_config)
    if dtype == "auto" and quantised is not None and quantised.get("kv_cache_scheme"):
        return "the dtype that the checkpoint's kv_cache_scheme names"
    return dtype


def _quantised(vllm_config: VllmConfig) -> dict[str, Any] | None:
    """How the checkpoint says that it is quantised, under whichever key of its configuration vLLM looks."""
    settings: dict[str, Any] | None = vllm_config.model_config.model_arch_config.quantization_config
    return settings


def _name(dtype: Any) -> str:
    """Of a torch dtype, as vLLM's flags and our manifests write it."""
    return str(dtype).removeprefix("torch.")


def _offloads(vllm_config: VllmConfig) -> bool:
    """Whether KV blocks go to this host's memory by vLLM's own connector, which `core/offloading.py` knows."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector != "OffloadingConnector":
        return False
    return bool(transfer.kv_connector_extra_config.get("spec_name", _HOST_MEMORY) == _HOST_MEMORY)


def _transfer_fault(vllm_config: VllmConfig) -> str:
    """What is wrong with the connector of a configuration, if it has one."""
    connector = getattr(vllm_config.kv_transfer_config, "kv_connector", None)
    why = CONNECTORS.get(connector or "", "was not run with edits")
    offloads = vllm_config.cache_config.kv_offloading_size is not None
    flag = "--kv-offloading-size" if offloads else "--kv-transfer-config"
    return f"KV transfer by {connector}, which {why} (leave out {flag})"


def warn_of_dtype(config: MemoirConfig, vllm_config: VllmConfig, manifests: Mapping[str, Manifest]) -> None:
    """Say in the log where a store was made in another dtype: masks are surest in the one that they were pooled in.

    config: the section.
    vllm_config: of the engine.
    manifests: of the stores, by name.
    """
    served = _name(vllm_config.model_config.dtype)
    for name, manifest in manifests.items():
        if manifest.dtype != served:
            logger.warning(
                "memoir: some questions may match another edit or none, since the edits of store %s were made in %s "
                "and are served in %s: use --dtype %s",
                config.folders[name],
                manifest.dtype,
                served,
                manifest.dtype,
            )
