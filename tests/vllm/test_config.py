"""What stops an engine before it starts, what is chosen for it, and that without a memoir section nothing happens."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engines import flags, make_store
from vllm.config import CompilationConfig, CUDAGraphMode, KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs

from memoir_retrieval.errors import ConfigError, StoreError, StoreMismatch
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.question.span import derive_span_rule
from memoir_vllm import config, refusals
from memoir_vllm.front import engine


@pytest.fixture(autouse=True)
def _restore_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks of this process go with each test, but for those that vLLM's loader of plugins leaves, once."""
    from vllm.plugins import load_general_plugins
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import RequestState

    load_general_plugins()
    monkeypatch.setattr(EngineArgs, "create_engine_config", EngineArgs.create_engine_config)
    monkeypatch.setattr(InputProcessor, "process_inputs", InputProcessor.process_inputs)
    monkeypatch.setattr(RequestState, "make_request_output", RequestState.make_request_output)
    engine.install()


def create(model_folder: Path, store: Path | None, **more: Any) -> VllmConfig:
    return EngineArgs(**flags(model_folder, store, **more)).create_engine_config()


@pytest.fixture(scope="module")
def section(model_folder: Path, store_folder: Path) -> Any:
    """Create a config from any memoir section."""

    def with_section(given: Any) -> VllmConfig:
        return EngineArgs(**flags(model_folder, additional_config={"memoir": given})).create_engine_config()

    return with_section


SINGLE = {"mode": "single"}


def test_vllms_flags_are_kept(model_folder: Path, store_folder: Path) -> None:
    ours, plain = create(model_folder, store_folder), create(model_folder, None)
    for part, name in (("cache_config", "enable_prefix_caching"), ("scheduler_config", "enable_chunked_prefill")):
        assert getattr(getattr(ours, part), name) is getattr(getattr(plain, part), name) is True
    assert ours.scheduler_config.max_num_batched_tokens == plain.scheduler_config.max_num_batched_tokens


def test_open_flags_are_chosen_in_mode_single(model_folder: Path, store_folder: Path) -> None:
    vllm_config = create(model_folder, store_folder, memoir=SINGLE)
    assert vllm_config.cache_config.enable_prefix_caching is False
    assert vllm_config.scheduler_config.enable_chunked_prefill is False


def test_another_dtype_than_the_stores_is_named_in_the_log(
    model_folder: Path, store_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    monkeypatch.setattr(config.logger, "warning", lambda text, *values: log.append(text % values))
    create(model_folder, store_folder)
    assert not log
    create(model_folder, store_folder, dtype="bfloat16")
    assert len(log) == 1 and log[0].endswith("made in float32 and are served in bfloat16: use --dtype float32")


@pytest.fixture(scope="module")
def older_store(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its edits act from the question's first token on."""
    rule = msgspec.structs.replace(derive_span_rule(base.tokenizer), acts="first", behind=0)
    return make_store(base, tmp_path_factory.mktemp("older") / "edits", rule=rule)


def test_a_store_that_acts_from_the_first_token_is_served_in_mode_single(
    model_folder: Path, store_folder: Path, older_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    monkeypatch.setattr(config.logger, "warning", lambda text, *values: log.append(text % values))
    for store, mode in ((store_folder, "inline"), (older_store, "single")):
        assert config.section_of(create(model_folder, store)).mode == mode
    assert f"`memoir compact {older_store} --acts last` trains them again" in log[0]
    log.clear()
    create(model_folder, older_store, memoir=SINGLE)
    assert not any("memoir compact" in line for line in log), "who asked for the mode knows"
    with pytest.raises(ConfigError, match="act from the question's first token on, which mode inline cannot serve"):
        create(model_folder, older_store, memoir={"mode": "inline"})


def test_our_classes_are_named(model_folder: Path, store_folder: Path) -> None:
    vllm_config = create(model_folder, store_folder)
    assert vllm_config.scheduler_config.scheduler_cls == "memoir_vllm.core.scheduler.MemoirScheduler"
    assert vllm_config.parallel_config.worker_cls == "memoir_vllm.worker.cpu.MemoirCPUWorker"


@pytest.mark.parametrize("mode", ["inline", "single"])
def test_vllms_choice_of_cuda_graphs_is_kept(mode: str, model_folder: Path, store_folder: Path) -> None:
    args = EngineArgs(**flags(model_folder, enforce_eager=False))
    ours = config.parse_section({"store": str(store_folder), "mode": mode})
    config.prefer(ours, args)
    assert args.compilation_config.cudagraph_mode is None
    vllm_config = args.create_engine_config()
    splits = vllm_config.compilation_config.splitting_ops = ["vllm::unified_attention_with_output"]
    for graphs in CUDAGraphMode:
        vllm_config.compilation_config.cudagraph_mode = graphs
        refusals.refuse(ours, vllm_config)
        splits.clear()
        if graphs.requires_piecewise_compilation():
            with pytest.raises(ConfigError, match="piecewise CUDA graphs that are not split"):
                refusals.refuse(ours, vllm_config)
        else:
            refusals.refuse(ours, vllm_config)
        splits.append("vllm::unified_attention_with_output")


def test_the_log_says_what_mode_single_turns_off(
    model_folder: Path, store_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(config.logger, "warning", said.append)
    section = config.parse_section({"store": str(store_folder), "mode": "single"})
    config.prefer(section, EngineArgs(**flags(model_folder)))
    assert [" ".join(line.split()[4:8]) for line in said] == ["prefix caching off: every", "chunked prefill off: a"]
    said.clear()
    config.prefer(section, EngineArgs(**flags(model_folder, enable_prefix_caching=False, enable_chunked_prefill=False)))
    assert said == []


def test_files_in_mistrals_own_format_are_not_read(
    model_folder: Path, store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM prefers them where they lie beside those of Hugging Face, and takes Mistral's own tokenizer with them."""
    said: list[str] = []
    monkeypatch.setattr(config.logger, "warning", said.append)
    section = config.parse_section({"store": str(store_folder)})
    plain = EngineArgs(**flags(model_folder))
    config.prefer(section, plain)
    assert (plain.load_format, plain.config_format, plain.tokenizer_mode, said) == ("auto", "auto", "auto", [])
    both = tmp_path / "both"
    both.mkdir()
    for file in (*model_folder.iterdir(), model_folder / "model.safetensors"):
        name = "consolidated.safetensors" if (both / file.name).exists() else file.name
        (both / name).symlink_to(file)
    args = EngineArgs(**flags(both))
    config.prefer(section, args)
    assert (args.load_format, args.config_format, args.tokenizer_mode) == ("safetensors", "hf", "hf")
    assert "Mistral's own format" in said[0]
    refusals.refuse(section, args.create_engine_config())
    chosen = EngineArgs(**flags(both, load_format="mistral"))
    config.prefer(section, chosen)
    with pytest.raises(ConfigError, match="--load-format mistral"):
        refusals.refuse(section, chosen.create_engine_config())


def test_the_graph_is_split_at_the_op(model_folder: Path, store_folder: Path) -> None:
    split = CompilationConfig(splitting_ops=["vllm::unified_attention_with_output"])
    vllm_config = create(model_folder, store_folder, enforce_eager=False, compilation_config=split)
    assert vllm_config.compilation_config.splitting_ops == [
        "vllm::unified_attention_with_output",
        "vllm::memoir_residual",
    ]


def test_the_compile_cache_tells_engines_with_and_without_edits_apart(model_folder: Path, store_folder: Path) -> None:
    assert create(model_folder, store_folder).compute_hash() != create(model_folder, None).compute_hash()


def test_the_users_arguments_are_left_alone(model_folder: Path, store_folder: Path) -> None:
    """An API server makes its configuration from the same arguments once more."""
    args = EngineArgs(**flags(model_folder, store_folder))
    first, second = args.create_engine_config(), args.create_engine_config()
    assert args.additional_config == {"memoir": {"store": str(store_folder)}}
    assert first.additional_config == second.additional_config


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stor": "x"}, "unknown field `stor`"),
        ({"store": "x", "layer": 3}, "unknown field `layer`"),
        ({}, "no store for requests that name none: add"),
        ({"store": ""}, "no store for requests that name none: add"),
        ({"stores": {"other": "x"}}, "no store for requests that name none: add"),
        ({"store": "x", "stores": {"": "y"}}, 'store and stores."" are the same: give one'),
        ({"store": "x", "stores": {"a/b": "y"}}, "a store is called 'a/b': use letters"),
        ({"store": "x", "stores": {"other": ""}}, "length >= 1"),
        ({"store": "x", "stores": {"other": "y"}, "tau": 0.5}, "tau is of one store, and there are several"),
        ({"store": "x", "tau": 0}, "tau"),
        ({"store": "x", "tau": 1.5}, "tau"),
        ({"store": "x", "mode": "fast"}, "mode"),
        ("x", "Expected `object`"),
    ],
    ids=str,
)
def test_a_bad_section_names_the_key_and_the_known_ones(given: Any, says: str, section: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        section(given)
    assert says in str(refused.value)
    assert "known keys: store, stores, mode, tau, token_file" in str(refused.value)
    assert "\n" not in str(refused.value)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "prefix caching": ({"enable_prefix_caching": True, "memoir": SINGLE}, "--no-enable-prefix-caching"),
    "chunked prefill": ({"enable_chunked_prefill": True, "memoir": SINGLE}, "--no-enable-chunked-prefill"),
    "split prompts": ({"long_prefill_token_threshold": 16, "memoir": SINGLE}, "--long-prefill-token-threshold"),
    "KV transfer": (
        {"kv_transfer_config": KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")},
        "--kv-transfer-config",
    ),
    "KV offloading": ({"kv_offloading_size": 1, "memoir": SINGLE}, "(leave out --kv-offloading-size and"),
    "quantisation while loading": ({"quantization": "fp8", "dtype": "bfloat16"}, "--quantization"),
    "another configuration": ({"hf_overrides": {"rms_norm_eps": 1e-3}}, "--hf-overrides"),
    "random weights": ({"load_format": "dummy"}, "--load-format dummy"),
    "weights of other files": ({"load_format": "npcache"}, "--load-format npcache"),
    "weights from elsewhere": ({"model_weights": "/elsewhere"}, "the weights of /elsewhere (leave out model_weights"),
    "code from elsewhere": ({"code_revision": "v2"}, "code of revision v2 (leave out --code-revision)"),
    "quantisation by configuration": (
        {"quantization_config": {"linear": {"weight": "fp8_per_tensor_static"}}},
        "leave out --quantization-config",
    ),
    "prompt embeddings": ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
    "scheduler": ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
    "worker": ({"worker_cls": "vllm.v1.worker.xpu_worker.XPUWorker"}, "--worker-cls"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_flags_are_named(what: str, model_folder: Path, store_folder: Path) -> None:
    given, flag = REFUSED[what]
    with pytest.raises(ConfigError, match="cannot serve edits") as refused:
        create(model_folder, store_folder, **given)
    assert flag in str(refused.value)
    assert "\n" not in str(refused.value)


# Settings that vLLM itself does not accept on a CPU: set on a finished configuration.
REFUSED_ELSEWHERE: dict[str, tuple[str, str, Any]] = {
    "--decode-context-parallel-size": ("parallel_config", "decode_context_parallel_size", 2),
    "--prefill-context-parallel-size": ("parallel_config", "prefill_context_parallel_size", 2),
    "--enable-dbo": ("parallel_config", "enable_dbo", True),
    "--ubatch-size": ("parallel_config", "ubatch_size", 2),
    "--enable-return-routed-experts": ("aux_output_config", "enable_return_routed_experts", True),
    "leave out --kv-cache-dtype": ("cache_config", "cache_dtype", "fp8"),
    "--kv-sharing-fast-prefill": ("cache_config", "kv_sharing_fast_prefill", True),
    "--load-format tensorizer": ("load_config", "load_format", "tensorizer"),
    "--model-class-overrides": ("model_config", "model_class_overrides", {"LlamaForCausalLM": "elsewhere:Llama"}),
    "--quantization-config": ("model_config", "quantization_config", object()),
    "--runner generate": ("model_config", "runner_type", "pooling"),
    "decoder-only": ("model_config", "is_encoder_decoder", True),
    "--tokenizer": ("model_config", "tokenizer", "elsewhere"),
    "--hf-config-path": ("model_config", "hf_config_path", "elsewhere"),
    "VLLM_USE_BREAKABLE_CUDAGRAPH=0": ("compilation_config", "cudagraph_mode", CUDAGraphMode.FULL_AND_PIECEWISE),
    "splitting_ops": ("compilation_config", "cudagraph_mode", CUDAGraphMode.PIECEWISE),
}


@pytest.mark.parametrize("flag", REFUSED_ELSEWHERE)
def test_refused_settings_are_named(flag: str, model_folder: Path, store_folder: Path) -> None:
    ours = config.parse_section({"store": str(store_folder)})
    args = EngineArgs(**flags(model_folder))
    config.prefer(ours, args)
    vllm_config = args.create_engine_config()
    refusals.refuse(ours, vllm_config)
    part, name, value = REFUSED_ELSEWHERE[flag]
    object.__setattr__(getattr(vllm_config, part), name, value)
    with pytest.raises(ConfigError) as refused:
        refusals.refuse(ours, vllm_config)
    assert flag in str(refused.value)


def test_a_checkpoint_that_names_another_dtype_of_the_kv_cache_is_refused(
    model_folder: Path, store_folder: Path
) -> None:
    ours = config.parse_section({"store": str(store_folder)})
    args = EngineArgs(**flags(model_folder) | {"dtype": "bfloat16"})
    config.prefer(ours, args)
    vllm_config = args.create_engine_config()
    refusals.refuse(ours, vllm_config)
    scheme = {"num_bits": 8, "type": "float"}
    vllm_config.model_config.model_arch_config.quantization_config = {"kv_cache_scheme": scheme}
    with pytest.raises(ConfigError, match=r"kv_cache_scheme names.*\(use --kv-cache-dtype bfloat16\)"):
        refusals.refuse(ours, vllm_config)
    vllm_config.cache_config.cache_dtype = "bfloat16"  # as the flag sets it
    refusals.refuse(ours, vllm_config)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantised_checkpoint_is_served_as_it_is(
    key: str, model_folder: Path, store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever key says so; what changes its numbers further is refused."""
    for path in model_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    settings = json.loads((model_folder / "config.json").read_text())
    number = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = number | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": number, "input_activations": activations}
    settings[key] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(settings))
    ours = config.parse_section({"store": str(store_folder)})
    vllm_config = EngineArgs(**flags(tmp_path)).create_engine_config()
    assert vllm_config.model_config.quantization == "compressed-tensors"
    refusals.refuse(ours, vllm_config)
    monkeypatch.setenv("VLLM_MARLIN_INPUT_DTYPE", "int8")
    object.__setattr__(vllm_config.model_config, "quantization_config", object())
    with pytest.raises(ConfigError, match=r"--quantization-config\); .*leave VLLM_MARLIN_INPUT_DTYPE unset"):
        refusals.refuse(ours, vllm_config)


def test_variables_that_edits_do_not_bear_are_refused(
    model_folder: Path, store_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = config.parse_section({"store": str(store_folder)})
    vllm_config = EngineArgs(**flags(model_folder)).create_engine_config()
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    monkeypatch.setenv("VLLM_MARLIN_INPUT_DTYPE", "int8")  # which is of quantised models alone
    refusals.refuse(ours, vllm_config)
    vllm_config.parallel_config.distributed_executor_backend = "ray"
    if hasattr(refusals.envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND"):
        with pytest.raises(ConfigError, match="leave VLLM_USE_RAY_V2_EXECUTOR_BACKEND unset"):
            refusals.refuse(ours, vllm_config)
    monkeypatch.delenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND")
    refusals.refuse(ours, vllm_config)
    monkeypatch.setenv("VLLM_ENABLE_STARTUP_PLAN", "1")
    with pytest.raises(ConfigError, match="leave VLLM_ENABLE_STARTUP_PLAN unset"):
        refusals.refuse(ours, vllm_config)


def test_the_page_on_serving_names_every_flag_that_is_refused() -> None:
    source = inspect.getsource(refusals._checks) + inspect.getsource(refusals._transfer_fault)
    page = (Path(__file__).parents[2] / "docs/reference/serving.md").read_text(encoding="utf-8")
    section = page.split("## What is refused\n")[1].split("\n### ")[0]
    refused, named = (set(re.findall(r"--[a-z]+(?:-[a-z]+)+|--[a-z]{4,}|VLLM_\w+", text)) for text in (source, section))
    assert len(refused) > 15 and refused <= named


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("method", "eagle", r"speculative decoding by eagle \(use the method ngram or draft_model\)"),
        ("enable_adaptive_verification", True, "adaptive verification .*leave enable_adaptive_verification out"),
        ("rejection_sample_method", "synthetic", "drafts that are taken where .*leave rejection_sample_method synth"),
        ("rejection_sample_method", "fly", "drafts that are taken where .*leave rejection_sample_method fly out"),
    ],
)
def test_drafts_are_made_and_verified_by_methods_that_were_run(
    name: str, value: Any, says: str, model_folder: Path, store_folder: Path
) -> None:
    """With any method a GPU's runner takes adaptive verification: it then spreads a step's rows on the device."""
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    vllm_config = create(model_folder, store_folder, speculative_config=ngram)
    vllm_config.scheduler_config.scheduler_cls = None  # as before ours was put there
    setattr(vllm_config.speculative_config, name, value)
    with pytest.raises(ConfigError, match=f"settings: {says}"):
        refusals.refuse(config.parse_section({"store": str(store_folder)}), vllm_config)


def test_every_connector_but_that_to_host_memory_is_refused_by_name(model_folder: Path, store_folder: Path) -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    ours = config.parse_section({"store": str(store_folder)})
    vllm_config = EngineArgs(**flags(model_folder)).create_engine_config()
    assert refusals.CONNECTORS.keys() <= KVConnectorFactory._registry.keys()
    for name in KVConnectorFactory._registry:
        vllm_config.kv_transfer_config = transfer = KVTransferConfig(kv_connector=name, kv_role="kv_both")
        if name == "OffloadingConnector":
            refusals.refuse(ours, vllm_config)
            transfer.kv_connector_extra_config = {"sync_load_budget_bytes": 1 << 20}
            with pytest.raises(ConfigError, match="leave sync_load_budget_bytes out"):
                refusals.refuse(ours, vllm_config)
            transfer.kv_connector_extra_config = {"spec_name": "TieringOffloadingSpec"}
        with pytest.raises(ConfigError, match=rf"KV transfer by {name}, which .* \(leave out --kv-transfer-config\)"):
            refusals.refuse(ours, vllm_config)


def test_lora_is_served_unless_its_layers_hide_the_op(
    model_folder: Path, store_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = config.parse_section({"store": str(store_folder)})
    vllm_config = EngineArgs(**flags(model_folder, enable_lora=True)).create_engine_config()
    refusals.refuse(ours, vllm_config)
    monkeypatch.setenv("VLLM_LORA_ENABLE_DUAL_STREAM", "1")
    with pytest.raises(ConfigError, match="leave VLLM_LORA_ENABLE_DUAL_STREAM unset"):
        refusals.refuse(ours, vllm_config)


def test_a_pipeline_is_served_in_both_modes(model_folder: Path, store_folder: Path) -> None:
    for mode in ("inline", "single"):
        vllm_config = create(model_folder, store_folder, memoir={"mode": mode}, pipeline_parallel_size=2)
        assert vllm_config.parallel_config.worker_cls == "memoir_vllm.worker.cpu.MemoirCPUWorker"


def test_what_a_model_is_may_be_refused(
    model_folder: Path, store_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = config.parse_section({"store": str(store_folder)})
    vllm_config = EngineArgs(**flags(model_folder)).create_engine_config()
    monkeypatch.setattr(type(vllm_config.model_config), "is_hybrid", True)
    with pytest.raises(ConfigError, match=r"recurrent layers \(use --no-enable-prefix-caching\)"):
        refusals.refuse(ours, vllm_config)
    vllm_config.cache_config.enable_prefix_caching = False


def test_a_model_of_the_hub_is_served_as_the_library_takes_it(model_folder: Path, store_folder: Path) -> None:
    """vLLM writes the commit of the branch in place of a revision that was not given."""
    from huggingface_hub import ResolvedRevision

    ours = config.parse_section({"store": str(store_folder)})
    vllm_config = EngineArgs(**flags(model_folder)).create_engine_config()
    model = vllm_config.model_config
    model.model = model.tokenizer = "org/name"
    model.revision = model.tokenizer_revision = ResolvedRevision(resolved="c" * 40)
    refusals.refuse(ours, vllm_config)
    for tokenizer, says in ("v2", "tokenizer revision v2"), (ResolvedRevision(resolved="d" * 40, initial="v3"), "v3"):
        model.tokenizer_revision = tokenizer
        with pytest.raises(ConfigError, match=rf"settings: .*{says} .*leave out --tokenizer-revision"):
            refusals.refuse(ours, vllm_config)
    for revision in ("main", ResolvedRevision(resolved="c" * 40, initial="main")):
        model.revision = model.tokenizer_revision = revision
        with pytest.raises(ConfigError, match="settings: revision main of a Hub model"):
            refusals.refuse(ours, vllm_config)


def test_all_problems_come_in_one_message(model_folder: Path, store_folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--no-enable-prefix-caching.*--no-enable-chunked-prefill.*--enable-prompt-embeds"
    ):
        create(
            model_folder,
            store_folder,
            memoir=SINGLE,
            enable_prefix_caching=True,
            enable_chunked_prefill=True,
            enable_prompt_embeds=True,
        )


def test_an_untested_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.version.__version_tuple__", (0, 99, 0))
    monkeypatch.setattr("vllm.version.__version__", "0.99.0")
    monkeypatch.delenv("MEMOIR_ALLOW_UNTESTED", raising=False)
    with pytest.raises(
        ConfigError,
        match=r"0\.32\.x, 0\.33\.x, this is 0\.99\.0.*MEMOIR_ALLOW_UNTESTED=1",
    ):
        refusals.check_version()
    monkeypatch.setenv("MEMOIR_ALLOW_UNTESTED", "1")
    refusals.check_version()


def test_a_token_without_routes_stops_a_server(
    model_folder: Path, store_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.usage.usage_lib import UsageContext

    def serve() -> None:
        EngineArgs(**flags(model_folder, store_folder)).create_engine_config(UsageContext.OPENAI_API_SERVER)

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    serve()
    monkeypatch.setenv("MEMOIR_ADMIN_TOKEN", "0123456789abcdef")
    with pytest.raises(ConfigError, match="set VLLM_PLUGINS=memoir"):
        serve()
    create(model_folder, store_folder)  # no server
    monkeypatch.setenv("VLLM_PLUGINS", "memoir")
    serve()


def test_a_missing_store_stops_the_engine(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        create(model_folder, tmp_path / "none")


def test_a_damaged_store_stops_the_engine(base: BaseModel, model_folder: Path, tmp_path: Path) -> None:
    folder = make_store(base, tmp_path / "edits")
    memory = folder / "memory-3.safetensors"
    memory.write_bytes(memory.read_bytes()[:-1] + b"!")
    with pytest.raises(StoreError, match=r"memory-3\.safetensors is damaged"):
        create(model_folder, folder)


def test_a_store_of_another_model_stops_the_engine(model_folder: Path, store_folder: Path, tmp_path: Path) -> None:
    """The same weights under another rope base are another model."""
    other = tmp_path / "other"
    other.mkdir()
    for path in model_folder.iterdir():
        (other / path.name).symlink_to(path)
    changed = json.loads((model_folder / "config.json").read_text()) | {"rms_norm_eps": 1e-6}
    (other / "config.json").unlink()
    (other / "config.json").write_text(json.dumps(changed))
    with pytest.raises(StoreMismatch, match=r"config\.json"):
        create(other, store_folder)


UNCONFIGURED = """
import sys
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import WorkerWrapperBase

classes = (RowParallelLinear, Scheduler, InputProcessor, CPUWorker, GPUModelRunner, WorkerWrapperBase)
before = [dict(vars(c)) for c in classes]
original = EngineArgs.create_engine_config
args = EngineArgs(model=sys.argv[1], max_model_len=256)          # loads the plugins
assert EngineArgs.create_engine_config is not original, "the plugin is not installed"
made = args.create_engine_config()
assert made.additional_config == {}, made.additional_config
assert made.scheduler_config.scheduler_cls is None
assert made.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
assert made.cache_config.enable_prefix_caching and made.scheduler_config.enable_chunked_prefill
assert [dict(vars(c)) for c in classes] == before, "a class of vLLM was changed"
import memoir_vllm
hook = EngineArgs.create_engine_config
memoir_vllm.register()
assert EngineArgs.create_engine_config is hook, "registered twice"
ours = sorted(m for m in sys.modules if m.startswith(("memoir", "faiss")))
assert ours == ["memoir_vllm", "memoir_vllm.front", "memoir_vllm.front.engine", "memoir_vllm.patches"], ours
"""


def test_without_a_section_nothing_is_patched_or_imported(model_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNCONFIGURED, str(model_folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
